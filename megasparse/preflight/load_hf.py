"""`--load-hf DIR`: the model's sizes and its tokenizer come from the folder.

What flags and YAML files set must agree with the folder; all differences are told at once.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from megasparse.config import CompleteModel, RunConfig
from megasparse.convert.huggingface.architecture import defining_fields, model_config
from megasparse.data.tokenizers.special_tokens import read_json_object
from megasparse.data.tokenizers.tokenizer import NULL, tokenizer_file_of
from megasparse.errors import CheckpointError

# Of the model's settings those that a run may choose otherwise.
_PREFERRED = ("seq_length", "max_position_embeddings")


def take_over(config: RunConfig, given: Collection[str]) -> list[str]:
    """Fill in what the folder of `load_hf` says; what contradicts it.

    Args:
        config: as loaded; its model and tokenizer are changed.
        given: names of the settings that flags or files set.

    Raises:
        CheckpointError, DataError: the folder is no model, or not one that can be trained.
    """
    if config.checkpoint.load_hf is None:
        return []
    folder = Path(config.checkpoint.load_hf)
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"load_hf: {folder} holds no config.json of a model")
    found = model_config(read_json_object(path), str(path))
    _take_tokenizer(config, given, folder)
    differences = []
    for name in (*defining_fields(found), "vocab_size"):
        here, there = getattr(config.model, name), getattr(found, name)
        setting = _SETTING_OF.get(name, name)
        if setting not in given or here is None:
            setattr(config.model, setting, getattr(found, setting))
        elif here != there:
            differences.append(f"{name} {_shown(there)}, found {_shown(here)}")
    _take_lengths(config, found, given)
    if differences:
        return [f"load_hf: {folder} has " + "; ".join(differences) + "; leave these settings out"]
    return []


# What follows from a setting, and is compared in its place: two spellings may mean the same.
_SETTING_OF = {"expert_layers": "moe_layer_freq"}


def _shown(value: object) -> str:
    return json.dumps(value)


def _take_lengths(config: RunConfig, found: CompleteModel, given: Collection[str]) -> None:
    for name in _PREFERRED:
        if name not in given:
            setattr(config.model, name, getattr(found, name))
    if "max_position_embeddings" not in given:  # a longer sequence was asked for: rotary positions
        longest = max(config.model.seq_length, found.max_position_embeddings)
        if found.position_embedding_type == "rope":
            config.model.max_position_embeddings = longest


def _take_tokenizer(config: RunConfig, given: Collection[str], folder: Path) -> None:
    data = config.data
    chosen = {"tokenizer_model", "vocab_file"} & set(given) or data.tokenizer_type == NULL
    file = None if chosen else tokenizer_file_of(folder)
    if file is not None:
        data.tokenizer_model = str(file)
