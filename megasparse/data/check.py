"""What a run reads, checked on every rank before anything heavy is imported or allocated."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from megasparse.config import DataConfig, ResolvedConfig
from megasparse.data.bert.labelled import Classes, read_classes
from megasparse.data.bert.masked_tokens import MaskedTokens, masked_tokens
from megasparse.data.blend import SPLITS, parse_data_path
from megasparse.data.chat.packing import answer_tokens
from megasparse.data.fingerprint import sampled_digest, whole_digest
from megasparse.data.indexed import Index, validate
from megasparse.data.mixture import Source, check_shares, shares, tell_repeated
from megasparse.data.sidecar import (
    AUTO_VERIFY_BYTES,
    bin_path,
    check_sidecar,
    idx_path,
    mask_path,
    read_sidecar,
)
from megasparse.data.tokenizers.special_tokens import TokenOptions
from megasparse.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, token_rules
from megasparse.errors import ConfigError, DataError


@dataclass(frozen=True)
class CheckedData:
    """All files of a run.

    Attributes:
        tokenizer: None when the run has only token ids.
        vocab_size: tokens before padding.
        sources: by split; "all" when one set is split.
        masked: of BERT, the tokens that no text has.
        classes: that texts are to be put into, and those texts.
    """

    tokenizer: Tokenizer | None
    vocab_size: int
    sources: dict[str, list[Source]]
    masked: MaskedTokens | None = None
    classes: Classes | None = None

    def of_split(self, split: str) -> list[Source]:
        """The datasets that a split comes from, if there are any."""
        return self.sources.get("all") or self.sources.get(split, [])

    @property
    def eod(self) -> int:
        """The token that ends a document: the tokenizer's, the datasets', or the last one.

        Raises:
            DataError: a run on token ids alone, whose datasets differ.
        """
        if self.tokenizer is not None:
            return self.tokenizer.eod
        found = {s.eod: s.prefix for group in self.sources.values() for s in group}
        found.pop(None, None)
        if len(found) > 1:
            told = " and ".join(f"{eod} in {prefix}" for eod, prefix in found.items())
            raise DataError(f"documents end with other tokens: {told}; expected one")
        last = self.vocab_size if self.masked is None else self.masked.ordinary
        return next((eod for eod in found if eod is not None), last - 1)

    @property
    def chat_template(self) -> str | None:
        """Of the conversations; None: there are none.

        Raises:
            DataError: datasets differ.
        """
        found = {s.template: s.prefix for group in self.sources.values() for s in group}
        if len(found) > 1:
            told = " and ".join(found.values())
            raise DataError(f"{told}: made with different chat templates, expected one")
        return next(iter(found), None)

    @property
    def digests(self) -> dict[str, str]:
        """Of data (by split and prefix) and tokenizer, to be kept with the run.

        Those of the tokens are by kind, split and place: "sampled:train:0".
        """
        found = {f"{split}.{s.prefix}": s.digest for split, g in self.sources.items() for s in g}
        for split, group in self.sources.items():
            for number, source in enumerate(group):
                found |= {f"{kind}:{split}:{number}": d for kind, d in source.tokens.items()}
        if self.tokenizer is not None:
            found["tokenizer"] = self.tokenizer.digest
            found["tokens"] = json.dumps(token_rules(self.tokenizer))
        if self.classes is not None:
            found |= self.classes.digests
        return found


def token_options(data: DataConfig) -> TokenOptions:
    """What the flags of a run say of its tokenizer's tokens."""
    return TokenOptions(data.eod_token, data.bos_token, data.add_bos, data.parse_special)


def check_data(config: ResolvedConfig, every_byte: bool = False) -> CheckedData:
    """Check tokenizer and datasets.

    Args:
        every_byte: of datasets of any size, as with `verify_data` full.

    Raises:
        DataError, ConfigError: one line that names file, found and expected.
    """
    data, model = config.data, config.model
    every_byte = every_byte or data.verify_data == "full"
    tokenizer: Tokenizer | None = None
    if data.tokenizer_model is not None or data.mock_data:
        tokenizer = load_tokenizer(
            data.tokenizer_model,
            data.tokenizer_type,
            vocab_size=model.vocab_size,
            options=token_options(data),
        )
    if tokenizer and model.vocab_size and model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"vocab_size {model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}"
        )
    vocab_size = model.vocab_size or (tokenizer.vocab_size if tokenizer else 0)
    masked = masked_tokens(config, tokenizer) if model.is_bert else None
    if masked is not None:
        vocab_size = model.vocab_size or masked.vocab_size
    if model.num_classes is not None:
        classes = read_classes(config)
        check_amounts(config, len(classes.splits["train"].texts), "valid" in classes.splits)
        return CheckedData(tokenizer, vocab_size, {}, masked, classes)
    paths = {
        "train": data.train_data_path,
        "valid": data.valid_data_path,
        "test": data.test_data_path,
    }
    if data.data_path:
        paths = {"all": data.data_path}
    sources = {}
    for split, arguments in paths.items():
        if not arguments:
            continue
        blend = parse_data_path(arguments)
        weights = blend.weights or (None,) * len(blend.prefixes)
        sources[split] = [
            _check_source(prefix, weight, vocab_size, tokenizer, every_byte, config)
            for prefix, weight in zip(blend.prefixes, weights, strict=True)
        ]
    checked = CheckedData(tokenizer, vocab_size, sources, masked)
    if sources:
        _ = checked.eod, checked.chat_template
        tell_repeated(sources)
        amounts = {}
        for split in SPLITS:
            found = shares(checked.of_split(split), split, config)
            check_shares(found, split, config)
            amounts[split] = sum(share.samples for share in found)
            if split == "train":
                check_amounts(config, amounts[split], True)
        check_amounts(config, amounts["train"], amounts["valid"] > 0)
    return checked


def check_amounts(config: ResolvedConfig, train_samples: int, has_valid: bool) -> None:
    """Refuse data that no step or no validation can be made of.

    Args:
        train_samples: of the training split.
        has_valid: whether the validation split holds a sample.

    Raises:
        DataError: fewer training samples than a global batch, or nothing to validate on.
    """
    batch, length = config.train.global_batch_size, config.model.seq_length
    if train_samples < batch:
        raise DataError(
            f"the training data holds {train_samples} samples of {length} tokens, expected at "
            f"least one global batch of {batch}"
        )
    if config.logging.eval_iters and not has_valid:
        raise DataError(
            f"the validation data holds no sample of {length} tokens; give more of it by --split "
            "or --valid-data-path, or set --eval-iters 0"
        )


def _check_source(
    prefix: str,
    weight: float | None,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    every_byte: bool,
    config: ResolvedConfig,
) -> Source:
    index = validate(prefix, vocab_size)
    template = _check_kind(prefix, index, config.data.sft)
    whole = every_byte or index.bin_size < AUTO_VERIFY_BYTES
    verify = "full" if whole else "index"
    if tokenizer is None:
        sidecar = check_sidecar(prefix, verify=verify)
    else:
        rules = token_rules(tokenizer)
        sidecar = check_sidecar(prefix, tokenizer.digest, rules=rules, verify=verify)
    tokens = {"sampled": sampled_digest(bin_path(prefix))}
    if whole:
        own = sidecar.bin_sha256 if sidecar is not None else whole_digest(bin_path(prefix))
        tokens["sha256"] = own
    if sidecar is not None:
        mask = sidecar.conversations.mask_sha256 if sidecar.conversations is not None else ""
        parts = f"{sidecar.idx_sha256}{sidecar.bin_sha256}{mask}"
        digest = hashlib.sha256(parts.encode()).hexdigest()
    else:
        digest = whole_digest(idx_path(prefix))
    eod = sidecar.eod if sidecar is not None else None
    answers = None
    if template is not None:
        mask_bytes = np.memmap(mask_path(prefix), dtype=np.uint8, mode="r")
        answers = answer_tokens(mask_bytes, index.lengths, config.model.seq_length)
    return Source(prefix, weight, digest, index.lengths, eod, tokens, answers, template)


def _check_kind(prefix: str, index: Index, sft: bool) -> str | None:
    """The chat template of conversations; None of texts.

    Raises:
        DataError: texts for a fine-tuning, or conversations for another run, or a mask of another
            length.
    """
    sidecar = read_sidecar(prefix)
    chat = sidecar.conversations if sidecar is not None else None
    if sft and chat is None:
        raise DataError(
            f"{prefix}: holds texts, expected conversations with --sft "
            "(tools/preprocess_data.py --sft makes them)"
        )
    if chat is None:
        return None
    if not sft:
        raise DataError(f"{prefix}: holds conversations, expected --sft, or texts without it")
    if chat.mask_size != index.num_tokens:
        raise DataError(
            f"{mask_path(prefix)}: found {chat.mask_size} bytes, expected one for each of "
            f"{index.num_tokens} tokens"
        )
    return chat.template
