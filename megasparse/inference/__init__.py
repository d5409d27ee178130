"""Trained models in use: loading, generation, perplexity, work on weights without an engine."""
