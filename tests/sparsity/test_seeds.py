"""Seeds on the device are those that the host would take, in every slot."""

from __future__ import annotations

import pytest
import torch

from megasparse.sparsity.clock import Clock
from megasparse.sparsity.seeds import DeviceSeeds


def test_one_slot_if_no_more_are_asked_for(device):
    seeds = DeviceSeeds(Clock(seed=1, train_iters=10), [5, 7], device)
    seeds.begin_step([4])
    seeds.begin_micro_batch(0)
    expected = Clock(seed=1, train_iters=10, micro_batch=4)
    assert [int(seeds.of(i)) for i in range(2)] == [expected.mvue_seed(n) for n in (5, 7)]
    with pytest.raises(IndexError):
        seeds.of(0, slot=1)


def test_the_first_slot_unless_another_is_named(device):
    """Of more than one, by their storage."""
    seeds = DeviceSeeds(Clock(seed=1, train_iters=10), [5, 7], device, slots=2)
    for layer in range(2):
        assert seeds.of(layer).data_ptr() == seeds.of(layer, 0).data_ptr()
        assert seeds.of(layer).data_ptr() != seeds.of(layer, 1).data_ptr()
    seeds.begin_step([4, 6])
    seeds.begin_micro_batch(1)
    expected = Clock(seed=1, train_iters=10, micro_batch=6)
    assert [int(seeds.of(0, slot)) for slot in range(2)] == [expected.mvue_seed(5), 0]


def test_seeds_are_the_clocks(device):
    clock = Clock(seed=1234, train_iters=10, step=3)
    layers = [5, 2**64 - 1, 7]
    seeds = DeviceSeeds(clock, layers, device, slots=2)
    place = seeds.of(1, slot=1)
    for clock.step in (3, 4):
        seeds.begin_step([1, 3, 5])
        for number, clock.micro_batch in enumerate((1, 3, 5)):
            seeds.begin_micro_batch(number, slot=number % 2)
            found = [seeds.of(i, slot=number % 2) for i in range(len(layers))]
            assert all(one.dtype == torch.int64 and one.shape == (1,) for one in found)
            assert [int(one) for one in found] == [clock.mvue_seed(n) for n in layers]
            if number % 2:
                assert int(place) == clock.mvue_seed(layers[1])  # where a graph reads it
