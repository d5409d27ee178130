"""Device functions that the kernels of `grad_pack24` share; see triton.py."""
