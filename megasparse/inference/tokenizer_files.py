"""What goes to a Hugging Face folder beside a run's weights: config.json, tokenizer, model card."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megasparse.checkpoint.importer import CARRIED_FOLDER
from megasparse.checkpoint.model import StoredModel
from megasparse.convert.export import ExportOptions
from megasparse.convert.huggingface.folder import CARRIED, CONFIG
from megasparse.convert.huggingface.model_card import Facts
from megasparse.convert.huggingface.tokenizer_export import exported_tokenizer, pad_id
from megasparse.data.check import token_options
from megasparse.data.tokenizers.special_tokens import TokenOptions
from megasparse.data.tokenizers.token_flags import token_flags
from megasparse.data.tokenizers.tokenizer import (
    Tokenizer,
    load_tokenizer,
    token_rules,
    tokenizer_file_of,
)
from megasparse.errors import CheckpointError, DataError
from megasparse.inference.chat import add_chat_template
from megasparse.input_files import refuse_links
from megasparse.log import logger
from megasparse.metrics.schema import read_metrics

# Of a model's folder what is not its tokenizer.
_NO_TOKENIZER = ("generation_config.json", "LICENSE", "LICENSE.txt", "USE_POLICY.md")


def export_options(
    stored: StoredModel,
    max_shard_bytes: int,
    reference: Path | None = None,
    tokenizer_model: Path | None = None,
    tokens: TokenOptions | None = None,
    with_tokenizer: bool = True,
    bar: bool = False,
) -> ExportOptions:
    """Options for `write_huggingface` of a run's weights.

    The `config.json` that the weights once came with is taken along: from `reference`, or from
    where the run started; else it is made. The tokenizer is the run's; a run on token ids alone
    takes along that of the same folder, as it is.

    Args:
        tokenizer_model: where the run's tokenizer is now, or of a run without one.
        tokens: what flags say of its tokens, and where they are unset, the run.
        with_tokenizer: False leaves it out.

    Raises:
        CheckpointError: `reference` holds no config.json. DataError: the run's tokenizer is not
            there, is another one, or other tokens are asked for.
    """
    folder = reference or _origin(stored)
    if reference is not None and not (reference / CONFIG).is_file():
        raise CheckpointError(f"{reference}: holds no {CONFIG}")
    options = ExportOptions(max_shard_bytes, bar=bar, facts=_facts(stored))
    if folder is not None:
        refuse_links(folder, CheckpointError)
        options.config = folder / CONFIG
    names: tuple[str, ...] = _NO_TOKENIZER
    if with_tokenizer:
        tokenizer, file = tokenizer_of(stored, tokens, tokenizer_model)
        if tokenizer is not None and file is not None:
            _add_tokenizer(options, tokenizer, file, stored)
        elif folder is not None:
            names = CARRIED
        else:
            logger.warning("the run has no tokenizer; the output has none (--tokenizer-model)")
    if folder is not None:
        carried = {name: folder / name for name in names if (folder / name).is_file()}
        options.carried = {**carried, **options.carried}
    return options


def run_options(stored: StoredModel, args: argparse.Namespace) -> ExportOptions:
    """`export_options` of the flags that `convert.flags.add_common` adds."""
    return export_options(
        stored,
        args.max_shard_size,
        args.reference,
        args.tokenizer_model,
        token_flags(args, token_options(stored.config.data)),
        args.tokenizer,
        bar=True,
    )


def _add_tokenizer(
    options: ExportOptions, tokenizer: Tokenizer, file: Path, stored: StoredModel
) -> None:
    files = exported_tokenizer(tokenizer, file, stored.model.max_position_embeddings)
    options.extra_files |= files.written
    options.carried |= files.copied
    options.special = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eod,
        "pad_token_id": pad_id(tokenizer),
    }
    if options.facts is not None:
        options.facts.tokens = token_rules(tokenizer)
    add_chat_template(options, stored, tokenizer, file)


def _facts(stored: StoredModel) -> Facts | None:
    """What the run's checkpoint and its log of metrics say; None: weights from elsewhere."""
    if stored.reader.imported:
        return None
    data = stored.config.data
    prefixes = [*data.data_path, *data.train_data_path]
    names = [Path(word).name for word in prefixes] or ["generated tokens"]
    metrics = stored.reader.folder.parent.parent / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.is_file() else []
    losses = {}
    for key, name in (("loss", "training loss"), ("valid_loss", "validation loss")):
        found = [
            row[key] for row in rows if row["step"] <= stored.step and row.get(key) is not None
        ]
        if found:
            losses[name] = float(found[-1])
    return Facts(
        stored.recipe.name,
        stored.step,
        names,
        stored.reader.meta["consumed_samples"],
        stored.model.seq_length,
        losses,
    )


def carried_files(folder: Path) -> list[Path]:
    """Files of a Hugging Face model that hold no weights, but its config.json.

    Raises:
        CheckpointError: a link to a file outside of the folder.
    """
    refuse_links(folder, CheckpointError)
    return [folder / name for name in CARRIED if (folder / name).is_file()]


def tokenizer_of(
    stored: StoredModel,
    tokens: TokenOptions | None = None,
    tokenizer_model: Path | None = None,
    same_tokens: bool = True,
) -> tuple[Tokenizer | None, Path | None]:
    """The tokenizer that the run was trained with and its file; None: it had none.

    Args:
        tokens: what flags say of its tokens; None: the run's settings.
        tokenizer_model: where it is now, or of a run without one.
        same_tokens: refuse other tokens than the run's.

    Raises:
        DataError: it is not there, is another one, or other tokens are asked for.
    """
    data, digests = stored.config.data, stored.reader.meta["digests"]
    name = tokenizer_model or data.tokenizer_model
    if name is None:
        return None, None
    path = Path(name).expanduser()
    if path.is_dir():
        path = tokenizer_file_of(path) or path
    options = token_options(data) if tokens is None else tokens
    try:
        tokenizer = load_tokenizer(path, data.tokenizer_type, options=options)
    except DataError as error:
        raise DataError(
            f"{error} (the run's tokenizer; --tokenizer-model says where it is)"
        ) from None
    if tokenizer.digest != digests.get("tokenizer", tokenizer.digest):
        raise DataError(f"{path}: is not the tokenizer that the run was trained with")
    before, now = digests.get("tokens"), json.dumps(token_rules(tokenizer))
    if same_tokens and before is not None and before != now:
        raise DataError(f"{path}: the run was trained with the tokens {before}, found {now}")
    return tokenizer, path


def _origin(stored: StoredModel) -> Path | None:
    """The files of the model that the run started from."""
    settings = stored.config.checkpoint
    folders = [stored.reader.folder.parent / CARRIED_FOLDER]
    if settings.load_hf is not None:
        folders.append(Path(settings.load_hf))
    if settings.load is not None:
        folders.append(Path(settings.load) / CARRIED_FOLDER)
    return next((folder for folder in folders if (folder / CONFIG).is_file()), None)
