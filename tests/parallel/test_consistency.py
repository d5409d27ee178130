"""One flipped bit on one rank is found within the interval, and rank and tensor are named."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megasparse.errors import ReplicaError
from megasparse.megatron import consistency
from megasparse.megatron.consistency import digest
from tests import dist
from tests.parallel.layouts import BASE, GPT, PP2, S_STE, TP2

# Masks are refreshed before steps 0, 4 and 8: one that is corrupted after 5 is in use at the check.
INTERVAL, CORRUPTED_AFTER = 3, 5


def _flip_bit(tensor: torch.Tensor) -> None:
    """The lowest bit of the last element, in place."""
    tensor.detach().reshape(-1)[-1:].view(torch.uint8)[:1].bitwise_xor_(1)


def _corrupted_run(rank, world, flags, where, kind, name):
    """A run in which one rank's tensor gets a flipped bit; (steps done, error) of this rank."""
    from megasparse.config import load_config, resolve
    from megasparse.train import loop, main

    steps = []

    class Trainer(loop.Trainer):
        def _step(self, stream):
            if self.controller.clock.step == CORRUPTED_AFTER and rank == where:
                if kind == "parameter":
                    _flip_bit(dict(self.engine.model.named_parameters())[name])
                else:
                    (state,) = (s for s, _ in self.controller.weights if s.name == name)
                    _flip_bit(getattr(state, kind))
            steps.append(self.controller.clock.step)
            return super()._step(stream)

    with mock.patch.object(main, "Trainer", Trainer):
        try:
            main.pretrain(resolve(load_config(flags), world))
        except ReplicaError as error:
            return len(steps), str(error)
    return len(steps), None


FC2 = "decoder.layers.1.mlp.linear_fc2.weight"
NORM = "decoder.layers.2.input_layernorm.weight"
EMBEDDING = "embedding.word_embeddings.weight"
CASES = {
    # name: (ranks, flags, corrupted rank, kind, tensor, expected in the message)
    "parameter over dp": (2, [], 1, "parameter", FC2, f"{FC2} on rank 1 differs from rank 0's"),
    "mask over dp": (2, [], 1, "mask", FC2, f"mask of {FC2} on rank 1 differs from rank 0's"),
    "scale over dp": (2, S_STE, 1, "scale", FC2, f"scale of {FC2} on rank 1 differs"),
    "norm over tp": (2, TP2, 1, "parameter", NORM, f"{NORM} on rank 1 differs from rank 0's"),
    "scale over tp": (2, [*TP2, *S_STE], 1, "scale", FC2, "(tensor parallel)"),
    "tied over pp": (2, PP2, 1, "parameter", EMBEDDING, f"{EMBEDDING} on rank 1 differs"),
    "one of four": (4, [], 2, "parameter", FC2, f"{FC2} on rank 2 differs from rank 0's"),
    "a later stage": (4, PP2, 3, "mask", "decoder.layers.3.mlp.linear_fc1.weight",
                      "linear_fc1.weight on rank 3 differs from rank 2's"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_flipped_bit_is_found_within_the_interval(tmp_path, dataset, case):
    world, flags, where, kind, name, expected = CASES[case]
    arguments = [
        *BASE,
        *GPT,
        *flags,
        "--data-path",
        dataset,
        "--run-dir",
        str(tmp_path / "run"),
        "--replica-check-interval",
        str(INTERVAL),
        "--mask-update-interval",
        "4",
        "--train-iters",
        "10",
        "--eval-iters",
        "0",
    ]
    results = dist.run(_corrupted_run, world, arguments, where, kind, name)
    for steps, error in results:
        assert error is not None and expected in error and "step 6" in error
        assert steps == 6  # the first check after the corruption
    assert len({error for _, error in results}) == 1
    assert ReplicaError.exit_code != 0


def test_an_undisturbed_run_passes_and_the_check_can_be_off(tmp_path, dataset):
    arguments = [
        *BASE,
        *GPT,
        "--data-path",
        dataset,
        "--train-iters",
        "6",
        "--eval-iters",
        "0",
    ]
    for name, interval, where in (("on", "1", -1), ("off", "0", 1)):
        flags = [*arguments, "--run-dir", str(tmp_path / name), "--replica-check-interval"]
        results = dist.run(_corrupted_run, 2, [*flags, interval], where, "parameter", FC2)
        assert results == [(6, None), (6, None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("size", [1, 7, 8, 1001])
def test_every_single_bit_counts(dtype, size):
    tensor = torch.randn(size).to(dtype) if dtype != torch.bool else torch.rand(size) > 0.5
    reference = digest(tensor)
    assert torch.equal(reference, digest(tensor.clone()))
    data = tensor.view(torch.uint8)
    seen = {int(reference)}
    for byte in range(0, data.numel(), max(1, data.numel() // 50)):
        for bit in range(8):
            data[byte] ^= 1 << bit
            seen.add(int(digest(tensor)))
            data[byte] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(range(0, data.numel(), max(1, data.numel() // 50)))


def test_order_and_length_count_and_alignment_does_not():
    values = torch.arange(64, dtype=torch.float32)
    assert digest(values) != digest(values.flip(0))
    assert digest(torch.zeros(8)) != digest(torch.zeros(16))
    assert digest(values[1:]) == digest(values[1:].clone())
    assert digest(values.view(8, 8).t()) == digest(values.view(8, 8).t().contiguous())


def test_words_of_different_chunks_cannot_change_places(monkeypatch):
    """Large tensors are digested in chunks; the positions go on over them."""
    values = torch.randn(64, generator=torch.Generator().manual_seed(0)).double()
    whole = digest(values)
    monkeypatch.setattr(consistency, "_CHUNK", 16)
    assert digest(values) == whole
    swapped = values.clone()
    swapped[3], swapped[16 + 3] = values[16 + 3], values[3]
    assert digest(swapped) != whole
