"""The ops: one checked function each, where they run, and their twins in plain torch."""
