"""The group of the configuration that says what BERT learns from: masked tokens, or classes."""

from __future__ import annotations

from dataclasses import dataclass

from megasparse.config.schema.option import option


@dataclass
class BertConfig:
    """Samples of BERT; all of it without effect in other models."""

    mask_prob: float = option(
        0.15, "share of the tokens that are masked and predicted", above=0.0, below=1.0
    )
    short_seq_prob: float = option(
        0.1,
        "share of the samples that are cut to a length drawn at random, and padded",
        at_least=0.0,
        below=1.0,
    )
    cls_token: str | None = option(
        None, "token that begins a sample; default: the tokenizer's [CLS], or a new one"
    )
    sep_token: str | None = option(
        None, "token that ends a segment; default: the tokenizer's [SEP], or a new one"
    )
    mask_token: str | None = option(
        None, "token in the place of a masked one; default: the tokenizer's [MASK], or a new one"
    )
    train_data: str | None = option(
        None,
        'with num-classes: JSON lines to fine-tune on, {"text": ..., "label": ...}',
        path="read",
    )
    valid_data: str | None = option(
        None, "with num-classes: like train-data, to measure loss and accuracy on", path="read"
    )
