"""Which Hugging Face tensors make up which parameter, and how.

megasparse's parameters are megatron-core's. Where the two differ:

- Q, K and V are one matrix, interleaved by query group: for each group its queries, its key, its
  value, `kv_channels` rows each. Hugging Face has three (LLaMA), one after the other (GPT-2), or
  the same order (GPT-NeoX);
- gate and up are one matrix, one after the other; Hugging Face has two or the same;
- GPT-2's matrices are stored `(in, out)` ("Conv1D"), megasparse's `(out, in)`;
- the weights of a layer's experts are stacked, one expert after the other;
- OPT's table of positions begins with rows for padding.

Rotary positions rotate halves in both, so no rows are permuted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megasparse.config import CompleteModel
from megasparse.config.shapes import parameters
from megasparse.convert.huggingface.families import FAMILIES
from megasparse.convert.huggingface.family import Family
from megasparse.errors import ConfigError

Tensors = list[torch.Tensor]
Split = Callable[[torch.Tensor], Tensors]
Join = Callable[[Tensors], torch.Tensor]


@dataclass(frozen=True)
class Rule:
    """One parameter and the tensors that it is made of.

    Attributes:
        name: of the parameter in megasparse.
        shape: of the parameter, without padding of the vocabulary.
        parts: names of the Hugging Face tensors, in order.
        split: parameter to parts; exact, and run on meta tensors it tells their shapes.
        join: the inverse.
        transposed: the parts are stored `(in, out)`.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    split: Split
    join: Join
    transposed: bool = False

    def part_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the Hugging Face tensors."""
        whole = torch.empty(self.shape, device="meta")
        return [tuple(part.shape) for part in self.split(whole)]


def rules(model: CompleteModel, architecture: str) -> list[Rule]:
    """All parameters of a model, in order.

    Args:
        model: its sizes and style.
        architecture: of Hugging Face.
    """
    family = FAMILIES[architecture]
    return [_rule(name, shape, model, family) for name, shape in parameter_shapes(model).items()]


def parameter_shapes(model: CompleteModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all parameters, without padding of the vocabulary, in order."""
    return {one.name: one.shape for one in parameters(model, model.vocab_size)}


def split_qkv(whole: torch.Tensor, model: CompleteModel) -> Tensors:
    """`(groups * (queries + 2) * D, ...)` -> Q, K, V, each of its heads one after the other."""
    groups, width = model.num_query_groups, model.kv_channels
    queries = model.num_attention_heads // groups
    rest = whole.shape[1:]
    view = whole.reshape(groups, queries + 2, width, *rest)
    return [
        view[:, :queries].reshape(-1, *rest),
        view[:, queries].reshape(-1, *rest),
        view[:, queries + 1].reshape(-1, *rest),
    ]


def join_qkv(parts: Sequence[torch.Tensor], model: CompleteModel) -> torch.Tensor:
    """The inverse of `split_qkv`."""
    groups, width = model.num_query_groups, model.kv_channels
    rest = parts[0].shape[1:]
    views = [part.reshape(groups, -1, width, *rest) for part in parts]
    return torch.cat(views, 1).reshape(-1, *rest)


def _rule(name: str, shape: tuple[int, ...], model: CompleteModel, family: Family) -> Rule:
    module, kind, layer = _place(name, family.layers)
    theirs = family.modules.get(module)
    if theirs is None:
        raise ConfigError(f"{family.architecture} has no tensors for {name}")
    parts = (theirs,) if isinstance(theirs, str) else theirs
    if "{}" in parts[0]:
        parts = tuple(p.format(n) for n in range(model.num_experts or 0) for p in parts)
    split, join = _parts(module, len(parts), model, family)
    # Weights of norms are vectors.
    transposed = family.transposed and bool(layer) and len(shape) == 2
    if transposed:
        split, join = _in_out(split, join)
    return Rule(name, shape, tuple(f"{layer}{p}.{kind}" for p in parts), split, join, transposed)


def _parts(module: str, count: int, model: CompleteModel, family: Family) -> tuple[Split, Join]:
    """How a parameter of ours becomes theirs, and back."""
    if module == "self_attention.linear_qkv":
        if count == 3:
            return lambda w: split_qkv(w, model), lambda parts: join_qkv(parts, model)
        if family.fused_qkv == "one after the other":
            return _one_after_the_other(model)
    if count > 1:
        return lambda w: list(w.chunk(count)), torch.cat
    if module == "embedding.position_embeddings" and family.first_position:
        first = family.first_position
        return lambda w: [torch.cat([w.new_zeros(first, w.shape[1]), w])], lambda p: p[0][first:]
    return lambda w: [w], lambda parts: parts[0]


def _one_after_the_other(model: CompleteModel) -> tuple[Split, Join]:
    """Q, K and V in one tensor."""
    keys = model.num_query_groups * model.kv_channels
    sizes = [model.num_attention_heads * model.kv_channels, keys, keys]
    return (
        lambda whole: [torch.cat(split_qkv(whole, model))],
        lambda parts: join_qkv(parts[0].split(sizes), model),
    )


def _in_out(split: Split, join: Join) -> tuple[Split, Join]:
    """The same of matrices that are stored `(in, out)`."""
    return (
        lambda whole: [part.t().contiguous() for part in split(whole)],
        lambda parts: join([part.t() for part in parts]).contiguous(),
    )


def _place(name: str, layers: str) -> tuple[str, str, str]:
    """A parameter's name -> module (within its layer), weight or bias, Hugging Face's layer."""
    module, kind = name.rsplit(".", 1)
    prefix = "decoder.layers."
    if not module.startswith(prefix):
        return module, kind, ""
    number, module = module.removeprefix(prefix).split(".", 1)
    return module, kind, f"{layers}{number}."
