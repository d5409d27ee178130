"""A Hugging Face model folder as a `Source`: checked whole before anything is read.

`config.json` and one `model.safetensors`, or shards with `model.safetensors.index.json`. Pickled
`.bin` files are not read. Tensors are mapped and copied one parameter at a time.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from megasparse.convert.huggingface.architecture import architecture_of, model_config
from megasparse.convert.huggingface.families import FAMILIES
from megasparse.convert.huggingface.layout import Rule, rules
from megasparse.convert.source import part_of_whole, require_finite
from megasparse.errors import CheckpointError, one_line
from megasparse.input_files import open_regular, read_regular, refuse_links
from megasparse.sparsity.shard import WeightShard
from megasparse.tensor_files import DTYPES, Entry, SafetensorError, safe_open

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What a tokenizer and a generation need; carried along, never read here.
CARRIED = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "tokenizer_original.json", "sentencepiece.model",
    "LICENSE", "LICENSE.txt", "USE_POLICY.md",
)  # fmt: skip
_MAX_JSON_BYTES = 1 << 28
_DTYPES = {name: dtype for dtype, name in DTYPES.items() if name in ("F32", "BF16", "F16")}
# S-STE's scale of each weight, where the folder holds the dense weights of such a run.
SCALES = "s_ste_scale.json"
# Buffers that old checkpoints carry: functions of the configuration.
_BUFFERS = re.compile(r".*(\.rotary_emb\.inv_freq|\.(attn|attention)\.(bias|masked_bias))")


class HuggingFaceModel:
    """A `Source`; see there.

    Args:
        folder: of the model.
        dtype: weights are given in; None: as stored.

    Raises:
        CheckpointError: a file is missing or damaged, the architecture is unknown, a tensor is
            missing, too many, or has another shape or type than `config.json` says.
    """

    def __init__(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        self.folder, self._dtype = folder, dtype
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: is no folder, expected a Hugging Face model")
        refuse_links(folder, CheckpointError)
        self.config = read_json(folder / CONFIG)
        self.where = str(folder)
        self.model = model_config(self.config, str(folder / CONFIG))
        self.architecture = architecture_of(self.config, str(folder / CONFIG))
        self._family = FAMILIES[self.architecture]
        # The output layer's weight, which a tied model may store too.
        self._tied = f"{self._family.modules['output_layer']}.weight"
        self.origin: dict[str, Any] = {
            "format": "huggingface",
            "architecture": self.architecture,
            "folder": str(folder.absolute()),
        }
        self._found = self._scan(self._file_of_tensors())
        self._rules = {rule.name: rule for rule in rules(self.model, self.architecture)}
        self._strip_prefix()
        self._check()

    def entries(self) -> list[Entry]:
        return [
            Entry(rule.name, self._dtype or self._dtype_of(rule), rule.shape)
            for rule in self._rules.values()
        ]

    def read(self, name: str) -> torch.Tensor:
        rule = self._rules[name]
        parts = [self._tensor(part) for part in rule.parts]
        if len({part.dtype for part in parts}) > 1:  # a rare mixture: the wider holds both
            parts = [part.to(self._dtype_of(rule)) for part in parts]
        return rule.join(parts).to(self._dtype or parts[0].dtype)

    def read_part(self, name: str, shard: WeightShard) -> torch.Tensor:
        return part_of_whole(self, name, shard)

    def frozen_scales(self) -> dict[str, float]:
        path = self.folder / SCALES
        if not path.is_file():
            return {}
        found = read_json(path)
        for name, value in found.items():
            known = name in self._rules and isinstance(value, float) and math.isfinite(value)
            if not known:
                raise CheckpointError(
                    f"{path}: found {name}: {value!r}, expected a weight's name and its scale"
                )
        return found

    def carried_files(self) -> list[Path]:
        """Files that belong to the model and hold no weights."""
        names = (self.folder / name for name in (CONFIG, *CARRIED))
        return [path for path in names if path.is_file()]

    def _tensor(self, part: str) -> torch.Tensor:
        file, key, _, _ = self._found[part]
        try:
            with open_regular(file), safe_open(file, framework="pt") as stream:
                value = stream.get_tensor(key).clone()
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{file}: {key}: {one_line(error)}") from None
        require_finite(value, f"{file}: {key}")
        return value

    def _dtype_of(self, rule: Rule) -> torch.dtype:
        dtypes = [self._found[part][2] for part in rule.parts]
        whole = dtypes[0]
        for dtype in dtypes[1:]:
            whole = torch.promote_types(whole, dtype)
        return whole

    def _file_of_tensors(self) -> dict[Path, set[str] | None]:
        """The files, with the tensors that the index expects in them (None: no index)."""
        index, single = self.folder / INDEX, self.folder / SINGLE
        if not index.is_file():
            if single.is_file():
                return {single: None}
            pickles = sorted(path.name for path in self.folder.glob("*.bin"))
            found = f"found {pickles[0]} (a pickle, which is not read), " if pickles else ""
            raise CheckpointError(f"{self.folder}: {found}expected {SINGLE} or {INDEX}")
        mapping = read_json(index).get("weight_map")
        if not isinstance(mapping, dict) or not mapping:
            raise CheckpointError(f"{index}: weight_map: expected tensors with their files")
        files: dict[Path, set[str] | None] = {}
        for tensor, name in mapping.items():
            if not isinstance(name, str) or Path(name).name != name:
                raise CheckpointError(f"{index}: {tensor}: found file {name!r}, expected a name")
            path = self.folder / name
            if not path.is_file():
                raise CheckpointError(f"{path}: missing shard (holds {tensor} by {INDEX})")
            expected = files.setdefault(path, set())
            assert expected is not None
            expected.add(tensor)
        return files

    def _scan(
        self, files: dict[Path, set[str] | None]
    ) -> dict[str, tuple[Path, str, torch.dtype, tuple[int, ...]]]:
        """Every tensor's file, name there, dtype and shape, from the headers."""
        found = {}
        for path, expected in files.items():
            try:
                with safe_open(path, framework="pt") as stream:
                    names = set(stream.keys())
                    if missing := sorted((expected or set()) - names):
                        raise CheckpointError(f"{path}: holds no {missing[0]}, which {INDEX} names")
                    for name in names if expected is None else expected:
                        piece = stream.get_slice(name)
                        kind, shape = piece.get_dtype(), tuple(piece.get_shape())
                        if _BUFFERS.fullmatch(name):
                            continue
                        if kind not in _DTYPES:
                            raise CheckpointError(
                                f"{path}: {name}: found {kind}, expected {', '.join(_DTYPES)}"
                            )
                        found[name] = (path, name, _DTYPES[kind], shape)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: damaged: {one_line(error)}") from None
        return found

    def _strip_prefix(self) -> None:
        """The base model's names, as GPT-2's first release has them, become the whole model's."""
        wanted = self._family.prefix
        if not any(name.startswith(wanted) for name in self._found):
            self._found = {
                name if name == self._tied else wanted + name: value
                for name, value in self._found.items()
            }

    def _check(self) -> None:
        """All tensors there, with the shapes that the configuration implies, and no others."""
        used = set()
        for rule in self._rules.values():
            for part, shape in zip(rule.parts, rule.part_shapes(), strict=True):
                if part not in self._found:
                    self._complain_of_missing(part)
                file, key, _, found = self._found[part]
                if found != shape:
                    raise CheckpointError(
                        f"{file}: {key}: found shape {found}, expected {shape} ({CONFIG})"
                    )
                used.add(part)
        if not self.model.untie_embeddings_and_output_weights and self._tied in self._found:
            self._check_tied(used)
        if unknown := sorted(self._found.keys() - used):
            raise CheckpointError(
                f"{self.folder}: {len(unknown)} tensors that {self.architecture} does not have, "
                f"the first is {unknown[0]}"
            )

    def _complain_of_missing(self, part: str) -> None:
        if part == self._tied:
            raise CheckpointError(
                f"{self.folder}: holds no {part}, but {CONFIG} says tie_word_embeddings false"
            )
        if part in self._rules["embedding.word_embeddings.weight"].parts:
            tied = self._tied in self._found
            alone = f" ({self._tied} alone: the tied weights are kept with the embedding)"
            hint = alone if tied else ""
            raise CheckpointError(f"{self.folder}: holds no {part}{hint}")
        raise CheckpointError(f"{self.folder}: holds no {part}, which {CONFIG} implies")

    def _check_tied(self, used: set[str]) -> None:
        """A tied model may store its output weights all the same, if they are the embedding."""
        rule = self._rules["embedding.word_embeddings.weight"]
        (embedding,) = rule.parts
        if self._found[self._tied][3] != rule.shape or not torch.equal(
            self._tensor(self._tied), self._tensor(embedding)
        ):
            raise CheckpointError(
                f"{self._found[self._tied][0]}: {self._tied} is not the embedding, but {CONFIG} "
                "says tie_word_embeddings true"
            )
        used.add(self._tied)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, too large, or no JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: longer than {_MAX_JSON_BYTES} bytes")
        value = json.loads(read_regular(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: found {type(value).__name__}, expected an object")
    return value
