"""Documents apart by packed sequences: the cumulative lengths say what Megatron's masks say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megasparse.config import load_config, resolve
from megasparse.megatron.blocks.packing import CU_SEQLENS, cumulative_lengths, packed
from megasparse.megatron.data.datasets import SampleOptions, build_mock_stream
from megasparse.megatron.graphs.captured import GraphedLayer
from megasparse.megatron.model import packs_documents
from megasparse.train.engine.deepspeed import start_process, stop_process
from megasparse.train.engine.plain import LanguageModelLoss
from tests.runs import LLAMA, TINY
from tools.bench.parts.short_runs import stand_alone

ROOT = Path(__file__).parents[2]

EOD = 7


def random_tokens(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 10, (3, 16), generator=generator)


def allowed_by(bounds: torch.Tensor, samples: int, length: int) -> torch.Tensor:
    """`(B S, B S)` bool: what sees what, by the cumulative lengths."""
    document = torch.bucketize(torch.arange(samples * length), bounds[1:].long(), right=True)
    causal = torch.ones(samples * length, samples * length, dtype=torch.bool).tril()
    return causal & (document[:, None] == document[None])


@pytest.mark.parametrize("seed", range(20))
def test_cumulative_lengths_are_megatrons_masks_and_positions(seed):
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    tokens = random_tokens(seed)
    bounds = cumulative_lengths(tokens, EOD)
    assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == tokens.numel()
    assert (bounds.diff() > 0).all()
    found = allowed_by(bounds, *tokens.shape)
    positions = []
    wanted = torch.zeros_like(found)
    for number, row in enumerate(tokens):
        mask, _, ids = _get_ltor_masks_and_position_ids(row, EOD, True, True, False, True)
        part = slice(number * len(row), (number + 1) * len(row))
        wanted[part, part] = ~mask[0]
        positions.append(ids)
    assert torch.equal(found, wanted)
    starts = torch.repeat_interleave(bounds[:-1].long(), bounds.diff().long())
    assert torch.equal(torch.cat(positions), torch.arange(tokens.numel()) - starts)


def test_a_packed_micro_batch_is_one_row_with_its_lengths():
    tokens = random_tokens(0)
    batch = {"tokens": tokens, "position_ids": tokens, "labels": tokens + 1}
    batch |= {"loss_mask": torch.ones(3, 16), "sample_id": torch.zeros(3, 2)}
    assert packed(batch)[1] is None and packed(batch)[0]["tokens"] is tokens
    batch[CU_SEQLENS] = cumulative_lengths(tokens, EOD)
    flat, lengths = packed(batch)
    for name in ("tokens", "position_ids", "labels", "loss_mask"):
        assert torch.equal(flat[name], batch[name].reshape(1, 48)), name
    assert lengths.qkv_format == "thd" and lengths.max_seqlen_q == lengths.max_seqlen_kv == 16
    assert torch.equal(lengths.cu_seqlens_q, batch[CU_SEQLENS])
    assert torch.equal(lengths.cu_seqlens_kv, batch[CU_SEQLENS])

    class Model(torch.nn.Module):
        def forward(self, tokens, position_ids, mask, labels, packed_seq_params):
            assert mask is None and packed_seq_params.qkv_format == "thd"
            return (labels - tokens).float() * torch.arange(48.0)

    batch["loss_mask"][0] = 0.0
    loss = LanguageModelLoss(Model())(batch)
    assert float(loss) == torch.arange(16.0, 48.0).mean()


def test_samples_of_packed_runs_have_no_masks():
    options = SampleOptions(64, 1, EOD, 128, True, True, attention_masks=False)
    stream = build_mock_stream(options, "train")
    assert "attention_mask" not in stream[0] and stream.packed_by == EOD
    plain = SampleOptions(64, 1, EOD, 128, True, True)
    assert build_mock_stream(plain, "train").packed_by is None


@pytest.mark.parametrize("flags", [[], ["--pipeline-model-parallel-size", "2"]])
def test_masks_stay_where_transformer_engine_is_not(flags):
    argv = [*TINY, *LLAMA, *flags, "--mock-data", "--bf16", "--reset-attention-mask"]
    assert not packs_documents(resolve(load_config(argv), 2), torch.device("cpu"))


def test_layers_that_see_lengths_are_not_captured():
    layer = GraphedLayer(torch.nn.Identity(), False)
    hidden = torch.zeros(2)
    layer.seen = (
        hidden,
        {
            "packed_seq_params": packed(
                {"tokens": random_tokens(0), CU_SEQLENS: cumulative_lengths(random_tokens(0), EOD)}
            )[1]
        },
    )
    assert layer.refusal() == "layers are called with packed_seq_params, which change"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [LLAMA, []])
def test_packed_sequences_give_the_loss_and_gradients_of_masks(kind, tmp_path):
    """Transformer Engine with packed sequences against torch's attention with masks, in BF16."""
    flags = [*TINY, *kind, "--bf16", "--mock-data", "--seq-length", "256"]
    flags += ["--reset-position-ids", "--reset-attention-mask"]
    packed_run, masked_run = (
        _in_a_process(tmp_path / "results.pt", [*flags, *more])
        for more in ([], ["--transformer-impl", "local"])
    )
    assert packed_run[0] and not masked_run[0]
    assert packed_run[1] == pytest.approx(masked_run[1], rel=5e-3)
    for ours, theirs in zip(packed_run[2], masked_run[2], strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 5e-2


def _in_a_process(results: Path, flags: list[str]) -> tuple[bool, float, list[torch.Tensor]]:
    """`_loss_and_gradient` on the GPU."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, __file__, str(results), *flags]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, timeout=200)
    return torch.load(results)


def _loss_and_gradient(flags: list[str]) -> tuple[bool, float, list[torch.Tensor]]:
    from megasparse.megatron.data.batches import batches, build_data
    from megasparse.megatron.grid import make_grid
    from megasparse.megatron.model import build_model

    config = resolve(load_config(flags), 1)
    grid = make_grid(1, torch.device("cuda"), config.train.seed)
    data = build_data(config, grid)
    model = build_model(config, grid, 128)
    batch = next(iter(batches(data.streams["train"], config, grid, 0)))
    assert CU_SEQLENS not in batch or batch[CU_SEQLENS].numel() > 3
    loss = LanguageModelLoss(model)(batch)
    loss.backward()
    gradients = [p.grad.float().cpu() for p in model.parameters()]
    return CU_SEQLENS in batch, float(loss), gradients


if __name__ == "__main__":
    stand_alone()
    start_process(1.0)
    torch.save(_loss_and_gradient(sys.argv[2:]), sys.argv[1])
    stop_process()
