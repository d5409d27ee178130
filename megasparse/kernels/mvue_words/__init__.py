"""Device functions that the kernels that prune and pack a gradient share; see triton.py."""
