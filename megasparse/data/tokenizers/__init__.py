"""Tokenizers: SentencePiece, Hugging Face, byte-pair files; special tokens and their flags."""
