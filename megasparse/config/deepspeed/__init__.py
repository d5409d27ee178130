"""DeepSpeed's configuration: derived from ours, and its JSON as a source of settings."""
