"""Making a trained model smaller: one-shot pruning and quantization, on single matrices."""
