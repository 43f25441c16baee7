"""The algorithm: draft, verify, accept; what the sparse model keeps; what is counted."""
