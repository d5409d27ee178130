"""Data: corpus and tokenizer files, Megatron's `.bin`/`.idx` datasets, blends and splits.

Nothing is imported here, so that reading an index does not load the tokenizer libraries.
"""

from megasparse.extras import require

require("sentencepiece", "megasparse.data")
require("tokenizers", "megasparse.data")
