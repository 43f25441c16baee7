"""What runs a pass over a model: on the CPU, on a CUDA device, in CUDA graphs."""
