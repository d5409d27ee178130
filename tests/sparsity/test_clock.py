"""Where a run is, and the seeds that follow from it."""

from __future__ import annotations

import pytest

from megasparse.kernels import derive_seed
from megasparse.sparsity.clock import Clock, draw_key


def test_a_run_begins_at_nothing():
    clock = Clock(3, 100)
    assert (clock.step, clock.samples, clock.batch, clock.micro_batch, clock.slot) == (0,) * 5
    clock.batch = 8
    clock.advance()
    clock.batch = 4
    clock.advance()
    assert (clock.step, clock.samples) == (2, 12)


def test_seeds_are_of_run_step_micro_batch_and_layer():
    clock = Clock(3, 100, step=5, micro_batch=7)
    assert clock.mvue_seed(9) == derive_seed(3, 5, 7, 9)
    assert clock.step_seed(9) == derive_seed(3, 5, 9)


def test_a_recomputation_is_at_its_micro_batch_for_a_while():
    clock = Clock(3, 100, micro_batch=2, slot=1)
    with pytest.raises(KeyError), clock.at(7, 3):
        assert (clock.micro_batch, clock.slot) == (7, 3)
        raise KeyError
    assert (clock.micro_batch, clock.slot) == (2, 1)


def test_a_layers_key_is_of_64_bits_and_its_own():
    keys = {draw_key(f"decoder.layers.{n}.mlp.linear_fc1") for n in range(50)}
    assert len(keys) == 50 and 2**56 < max(keys) < 2**64
