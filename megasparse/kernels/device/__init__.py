"""Functions for kernels: what the Triton kernels of several operations call.

| module   | what it holds                                                                  |
|----------|--------------------------------------------------------------------------------|
| groups   | groups of 4 entries as integers; conversions to and from 16 bits; flags         |
| float8   | float32 to e4m3 and e5m2; largest magnitudes; the operands of an 8-bit GEMM     |
| layout24 | groups as words, and where the codes of a packed 2:4 matrix lie                 |
| philox   | the random numbers of `random.py`                                               |

Nothing here is launched on its own: an operation is a folder beside this one.
"""
