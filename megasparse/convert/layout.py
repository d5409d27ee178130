"""Which Hugging Face tensors make up which parameter, and how.

megasparse's parameters are megatron-core's. Where the two differ:

- Q, K and V are one matrix, interleaved by query group: for each group its queries, its key, its
  value, `kv_channels` rows each. Hugging Face has three (LLaMA), or one after the other (GPT-2);
- gate and up are one matrix, one after the other;
- GPT-2's matrices are stored `(in, out)` ("Conv1D"), megasparse's `(out, in)`.

Rotary positions rotate halves in both, so no rows are permuted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megasparse.config import CompleteModel
from megasparse.config.shapes import parameters
from megasparse.convert.architecture import GPT2

Tensors = list[torch.Tensor]


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
    split: Callable[[torch.Tensor], Tensors]
    join: Callable[[Tensors], torch.Tensor]
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
    return list(_gpt2(model) if architecture == GPT2 else _llama(model))


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


def _one(name: str, shape: tuple[int, ...], part: str) -> Rule:
    return Rule(name, shape, (part,), lambda whole: [whole], lambda parts: parts[0])


def _conv1d(name: str, shape: tuple[int, ...], part: str) -> Rule:
    """A weight stored `(in, out)`."""
    return Rule(
        name,
        shape,
        (part,),
        lambda whole: [whole.t().contiguous()],
        lambda parts: parts[0].t().contiguous(),
        transposed=True,
    )


def _llama(model: CompleteModel) -> Iterator[Rule]:
    simple = {
        "embedding.word_embeddings": "model.embed_tokens",
        "decoder.final_layernorm": "model.norm",
        "output_layer": "lm_head",
        "input_layernorm": "input_layernorm",
        "pre_mlp_layernorm": "post_attention_layernorm",
        "self_attention.linear_proj": "self_attn.o_proj",
        "mlp.linear_fc2": "mlp.down_proj",
    }
    for name, shape in parameter_shapes(model).items():
        module, kind, layer = _place(name, "model.layers.")
        if module == "self_attention.linear_qkv":
            parts = tuple(f"{layer}self_attn.{one}_proj.{kind}" for one in "qkv")
            yield Rule(
                name,
                shape,
                parts,
                lambda whole: split_qkv(whole, model),
                lambda parts: join_qkv(parts, model),
            )
        elif module == "mlp.linear_fc1":
            parts = tuple(f"{layer}mlp.{one}_proj.{kind}" for one in ("gate", "up"))
            yield Rule(name, shape, parts, lambda whole: list(whole.chunk(2)), torch.cat)
        else:
            yield _one(name, shape, f"{layer}{simple[module]}.{kind}")


def _gpt2(model: CompleteModel) -> Iterator[Rule]:
    simple = {
        "embedding.word_embeddings": "transformer.wte",
        "embedding.position_embeddings": "transformer.wpe",
        "decoder.final_layernorm": "transformer.ln_f",
        "output_layer": "lm_head",
        "input_layernorm": "ln_1",
        "pre_mlp_layernorm": "ln_2",
        "self_attention.linear_proj": "attn.c_proj",
        "self_attention.linear_qkv": "attn.c_attn",
        "mlp.linear_fc1": "mlp.c_fc",
        "mlp.linear_fc2": "mlp.c_proj",
    }

    def split(whole: torch.Tensor) -> Tensors:
        flat = torch.cat(split_qkv(whole, model))
        return [flat.t().contiguous() if flat.dim() == 2 else flat]

    def join(parts: Tensors) -> torch.Tensor:
        flat = parts[0].t() if parts[0].dim() == 2 else parts[0]
        return join_qkv(flat.chunk(3), model).contiguous()

    for name, shape in parameter_shapes(model).items():
        module, kind, layer = _place(name, "transformer.h.")
        part = f"{layer}{simple[module]}.{kind}"
        if module == "self_attention.linear_qkv":
            yield Rule(name, shape, (part,), split, join, transposed=kind == "weight")
        elif layer and len(shape) == 2:
            yield _conv1d(name, shape, part)
        else:
            yield _one(name, shape, part)


def _place(name: str, layers: str) -> tuple[str, str, str]:
    """A parameter's name -> module (within its layer), weight or bias, Hugging Face's layer."""
    module, kind = name.rsplit(".", 1)
    prefix = "decoder.layers."
    if not module.startswith(prefix):
        return module, kind, ""
    number, module = module.removeprefix(prefix).split(".", 1)
    return module, kind, f"{layers}{number}."
