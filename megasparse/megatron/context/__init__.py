"""Context parallelism: sequences that are divided over ranks."""
