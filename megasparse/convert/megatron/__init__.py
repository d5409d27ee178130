"""Checkpoints of Megatron: `.pt` files and `torch_dist`; nothing that is in them is run."""
