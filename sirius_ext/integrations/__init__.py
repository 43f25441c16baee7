"""Sirius inside other packages: transformers, lm-eval."""
