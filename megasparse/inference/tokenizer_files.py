"""What goes to a Hugging Face folder beside a run's weights: config.json and the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megasparse.checkpoint.importer import CARRIED_FOLDER
from megasparse.checkpoint.model import StoredModel
from megasparse.convert.export import ExportOptions
from megasparse.convert.huggingface import CARRIED, CONFIG, read_json
from megasparse.data.spm_json import tokenizer_json
from megasparse.data.tokenizer import HUGGINGFACE, Tokenizer, load_tokenizer
from megasparse.errors import CheckpointError, DataError
from megasparse.log import logger

TOKENIZER_JSON, TOKENIZER_MODEL = "tokenizer.json", "tokenizer.model"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_MADE_FROM = "made_from"  # in it: the file that its tokenizer.json was converted from


def export_options(
    stored: StoredModel, max_shard_bytes: int, reference: Path | None = None, bar: bool = False
) -> ExportOptions:
    """Options for `write_huggingface` of a run's weights.

    The `config.json` and tokenizer that the weights once came with are taken along: from
    `reference`, or from where the run started. Else `config.json` is made, and the tokenizer is
    the run's, if its file is still there.

    Raises:
        CheckpointError: `reference` holds no config.json.
    """
    folder = reference or _origin(stored)
    if reference is not None and not (reference / CONFIG).is_file():
        raise CheckpointError(f"{reference}: holds no {CONFIG}")
    options = ExportOptions(max_shard_bytes, bar=bar)
    if folder is not None:
        options.config = folder / CONFIG
        options.carried = {file.name: file for file in carried_files(folder)}
        return options
    tokenizer, file = tokenizer_of(stored)
    if tokenizer is None or file is None:
        logger.warning("the run's tokenizer is not found; the output has none (--reference)")
        return options
    options.eod = tokenizer.eod
    _add_tokenizer(options, tokenizer, file, stored)
    return options


def _add_tokenizer(
    options: ExportOptions, tokenizer: Tokenizer, file: Path, stored: StoredModel
) -> None:
    """The tokenizer under the names that engines look for."""
    config: dict[str, Any] = {
        "eos_token": tokenizer.eod_piece,
        "bos_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "model_max_length": stored.model.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    options.extra_files[_TOKENIZER_CONFIG] = config
    if tokenizer.tokenizer_type == HUGGINGFACE:
        options.carried[TOKENIZER_JSON] = file
    else:
        options.carried[TOKENIZER_MODEL] = file
        converted = tokenizer_json(file)
        if converted is None:
            logger.warning(
                "%s: has no equal tokenizer.json, the output has %s alone; engines may put a "
                "space before each text",
                file,
                TOKENIZER_MODEL,
            )
            return
        options.extra_files[TOKENIZER_JSON] = converted
        config[_MADE_FROM] = TOKENIZER_MODEL
    # As in training: "<eod>" in a text is text.
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True}


def tokenizer_file_of(folder: Path) -> Path | None:
    """The tokenizer of a Hugging Face folder: what its tokenizer.json was made from, or that.

    Datasets are made with the original, and compare digests with it.

    Raises:
        CheckpointError: tokenizer_config.json is damaged.
    """
    names = [TOKENIZER_JSON, TOKENIZER_MODEL]
    config = folder / _TOKENIZER_CONFIG
    if config.is_file() and read_json(config).get(_MADE_FROM) == TOKENIZER_MODEL:
        names.reverse()
    return next((folder / name for name in names if (folder / name).is_file()), None)


def carried_files(folder: Path) -> list[Path]:
    """Files of a Hugging Face model that hold no weights, but its config.json."""
    return [folder / name for name in CARRIED if (folder / name).is_file()]


def tokenizer_of(stored: StoredModel) -> tuple[Tokenizer | None, Path | None]:
    """The tokenizer that the run was trained with and its file; None if it is gone or changed."""
    name = stored.config.data.tokenizer_model
    if name is None:
        return None, None
    path = Path(name)
    if path.is_dir():
        found = [path / one for one in (TOKENIZER_JSON, TOKENIZER_MODEL)]
        path = next((one for one in found if one.is_file()), path)
    try:
        tokenizer = load_tokenizer(path, stored.config.data.tokenizer_type)
    except DataError as error:
        logger.warning("%s", error)
        return None, None
    if tokenizer.digest != stored.reader.meta["digests"].get("tokenizer", tokenizer.digest):
        logger.warning("%s: is not the tokenizer that the run was trained with", path)
        return None, None
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
