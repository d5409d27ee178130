"""Making a trained model smaller: one-shot pruning and quantisation, on single matrices."""
