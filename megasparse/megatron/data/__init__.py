"""Samples and batches of a run, from megatron-core's indexed datasets."""
