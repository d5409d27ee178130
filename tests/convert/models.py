"""Randomly initialised Hugging Face models, saved, and what they compute."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from tools.bench.parts.family_models import FAMILIES, KINDS, TOKENS, VOCAB, make_model

__all__ = [
    "FAMILIES", "KINDS", "TOKENS", "VOCAB", "load_logits", "make_model", "megasparse_logits",
    "save_model", "tensors",
]  # fmt: skip


def save_model(
    folder: Path, kind: str, shard: str = "8KB", dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Save a model in several shards; its float32 logits `(B, S, V)` of TOKENS."""
    model = make_model(kind).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text("{}")  # carried along, not read
    with torch.no_grad():
        return model.float()(torch.tensor(TOKENS)).logits


@functools.lru_cache(maxsize=1)
def _loaded(folder: Path):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a folder's model, as transformers loads it, in float32."""
    with torch.no_grad():
        return _loaded(folder)(tokens).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the safetensors library."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def megasparse_logits(
    rank: int, world: int, folder: str, tokens: list[list[int]] = TOKENS
) -> torch.Tensor:
    """Logits of a checkpoint or Hugging Face folder, tensor-parallel over all ranks."""
    from megasparse.checkpoint.model import StoredModel, open_checkpoint
    from megasparse.convert.huggingface.folder import HuggingFaceModel
    from megasparse.distributed.control_plane import make_control_plane
    from megasparse.inference.loading import load_model

    path = Path(folder)
    if (path / "config.json").exists():
        source = HuggingFaceModel(path)
    else:
        source = StoredModel(open_checkpoint(path, make_control_plane()))
    model, _ = load_model(source, torch.device("cpu"), world, bf16=False)
    inputs = torch.tensor(tokens)
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    with torch.no_grad():
        logits = model(inputs, positions, None, runtime_gather_output=True)
    # What pads the vocabulary is beyond the last real token, with probability 0.
    assert torch.softmax(logits, -1)[..., VOCAB:].sum() == 0
    return logits[..., : source.model.vocab_size]
