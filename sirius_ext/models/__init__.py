"""Models: families, loading, weights as the kernels read them."""
