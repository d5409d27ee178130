"""FP8 scaling of GEMM operands, delayed and current; the door to Transformer Engine."""
