"""Device functions for the packed 2:4 layout of `packed24.py`; the kernels that write it share them.

They are in `triton.py`; this folder holds no operation of its own.
"""
