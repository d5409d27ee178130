"""One optimizer step on DeepSpeed's engines, with and without a pipeline."""
