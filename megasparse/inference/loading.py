"""A checkpoint loaded for inference: `launch/generate.py` and `launch/evaluate.py`.

Sparse layers get W~, mask and scale applied, as a dense weight with zeros: what they compute is
what the training's GEMMs compute, by dense GEMMs.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megasparse.checkpoint.model import StoredModel, open_checkpoint
from megasparse.config import (
    ParallelConfig,
    RunConfig,
    TrainConfig,
    fill_defaults,
    padded_vocab_size,
)
from megasparse.convert.huggingface.folder import HuggingFaceModel
from megasparse.convert.source import PartSource, require_decoder
from megasparse.data.check import token_options
from megasparse.data.tokenizers.token_flags import add_token_flags, token_flags
from megasparse.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, tokenizer_file_of
from megasparse.distributed.control_plane import ControlPlane, make_control_plane
from megasparse.distributed.rendezvous import join_group, own_device
from megasparse.errors import ConfigError, DataError
from megasparse.inference.tokenizer_files import tokenizer_of
from megasparse.megatron.grid import Grid, collective_timeout, make_grid
from megasparse.megatron.init import parameter_shard
from megasparse.megatron.model import build_model, hide_padding

_TIMEOUT_MINUTES = 10.0
# Megatron uses names of collectives that newer torch versions call differently.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.*")


@dataclass
class LoadedModel:
    """A model ready to compute, on every rank.

    Attributes:
        source: where its weights came from.
        tokenizer: None if none was found.
        tokenizer_file: that it was loaded from.
    """

    source: PartSource
    model: torch.nn.Module
    grid: Grid
    control: ControlPlane
    tokenizer: Tokenizer | None
    tokenizer_file: Path | None = None

    @property
    def vocab_size(self) -> int:
        """Tokens without padding."""
        return self.source.model.vocab_size

    @property
    def context_length(self) -> int:
        """Tokens that the model has positions for."""
        return self.source.model.max_position_embeddings

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            DataError: there is none.
        """
        if self.tokenizer is None:
            raise DataError(f"{self.source.where}: no tokenizer found (--tokenizer-model)")
        return self.tokenizer


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say which model, and how it is computed."""
    group = parser.add_argument_group("model")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--load", metavar="DIR", type=Path, help="a run, its checkpoints, or one")
    which.add_argument("--load-hf", metavar="DIR", type=Path, help="a Hugging Face folder")
    group.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="INT")
    group.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="compute in bfloat16 (default: if the weights are 16-bit)",
    )
    group.add_argument("--tokenizer-model", help="default: the run's, or that of the folder")
    add_token_flags(group)
    group.add_argument("--vocab-size", type=int, help="where the checkpoint does not say it")
    group.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def open_model(args: argparse.Namespace) -> LoadedModel:
    """Join the group of ranks and load the model that the flags name.

    Raises:
        MegasparseError: one line, on every rank.
    """
    device = own_device()
    join_group(device, collective_timeout(_TIMEOUT_MINUTES))
    control = make_control_plane()
    source: PartSource
    tokenizer, file = None, None
    if args.load is not None:
        source = StoredModel(open_checkpoint(args.load, control), vocab_size=args.vocab_size)
    else:
        source = HuggingFaceModel(args.load_hf)
    run = token_options(source.config.data) if isinstance(source, StoredModel) else None
    tokens = token_flags(args, run)
    if args.tokenizer_model is not None:
        given = Path(args.tokenizer_model).expanduser()
        file = (tokenizer_file_of(given) if given.is_dir() else None) or given
        tokenizer = load_tokenizer(file, options=tokens)
    elif isinstance(source, StoredModel):
        tokenizer, file = tokenizer_of(source, tokens, same_tokens=False)
    elif isinstance(source, HuggingFaceModel) and (file := tokenizer_file_of(source.folder)):
        tokenizer = load_tokenizer(file, options=tokens)
    model, grid = load_model(source, device, args.tensor_model_parallel_size, args.bf16, control)
    return LoadedModel(source, model, grid, control, tokenizer, file)


def load_model(
    source: PartSource,
    device: torch.device,
    tensor_parallel: int = 1,
    bf16: bool | None = None,
    control: ControlPlane | None = None,
    grid: Grid | None = None,
) -> tuple[torch.nn.Module, Grid]:
    """The model of a source on this rank (torch.distributed must be up), in evaluation mode.

    Args:
        tensor_parallel: ranks that share each layer; the world's other ranks are copies.
        bf16: compute in bfloat16, else in float32; None: bfloat16 if the weights are 16-bit.
        control: of all ranks, where one's error is to be an error of all.
        grid: of these ranks, if it is there; process groups keep their threads to the end.
    """
    if tensor_parallel < 1 or dist.get_world_size() % tensor_parallel:
        raise ConfigError(
            f"world size {dist.get_world_size()} is not divisible by tensor_model_parallel_size "
            f"{tensor_parallel}"
        )
    require_decoder(source.model, source.where, "texts are written and scored by decoders")
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if getattr(source.model, name) % tensor_parallel:
            raise ConfigError(
                f"{name} {getattr(source.model, name)} is not divisible by "
                f"tensor_model_parallel_size {tensor_parallel}"
            )
    wide = any(entry.dtype == torch.float32 for entry in source.entries())
    train = TrainConfig(
        bf16=not wide if bf16 is None else bf16,
        transformer_impl="local",  # decoding masks with keys that were seen before
    )
    parallel = ParallelConfig(tensor_model_parallel_size=tensor_parallel)
    config = fill_defaults(RunConfig(source.model, parallel, train), dist.get_world_size())
    if grid is None:
        grid = make_grid(tensor_parallel, device, config.train.seed, _TIMEOUT_MINUTES)
    rows = padded_vocab_size(source.model.vocab_size, config)
    model = build_model(config, grid, rows)
    hide_padding(model, grid, source.model.vocab_size)

    def put() -> None:
        for name, parameter in model.named_parameters():
            shard = parameter_shard(parameter, grid.tp_rank, grid.tp_size)
            with torch.no_grad():
                parameter.copy_(source.read_part(name, shard))

    (control or ControlPlane(None)).on_all_ranks(put)
    return model.eval(), grid


def leave(code: int) -> None:
    """End this rank; after an error at once, as other ranks may not answer its goodbye.

    Args:
        code: of the process, 0 after success.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()
