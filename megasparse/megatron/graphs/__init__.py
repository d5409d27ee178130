"""CUDA graphs of Transformer layers: recording, capturing, and their life over a run."""
