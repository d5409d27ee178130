"""The only door to megatron-core: grid of ranks, layers, spec provider, model, datasets."""
