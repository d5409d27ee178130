"""Counter-based random numbers inside of kernels."""
