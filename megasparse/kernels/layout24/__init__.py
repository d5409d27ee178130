"""Device functions for the packed 2:4 layout of `packed24.py`, shared by the kernels that write it.

They are in `triton.py`; this folder holds no operation of its own.
"""
