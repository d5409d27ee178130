"""Checkpoints of a run: written by all ranks, published by one rename, verified when read."""
