"""What BERT reads: its tokens that no text has, and texts with classes."""
