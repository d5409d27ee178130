"""The public functional API: pure functions on local tensors."""
