"""AdamW with masked decay, and the learning-rate schedule."""
