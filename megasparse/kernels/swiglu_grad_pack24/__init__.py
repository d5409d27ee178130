"""The Triton implementation of `grad_pack24.swiglu_grad_pack24`; see triton.py."""
