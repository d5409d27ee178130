"""Model folders of Hugging Face: the table of families, `config.json`, tensors, tokenizer, card."""
