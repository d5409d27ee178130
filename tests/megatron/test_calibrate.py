"""What calibration keeps of a linear's inputs, against all inputs at once."""

from __future__ import annotations

import pytest
import torch

from megasparse.megatron.calibrate import LinearInputs


@pytest.mark.parametrize("gram", [False, True])
def test_sums_and_means_are_those_of_all_tokens(gram):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, length, 6, generator=generator) for length in (3, 5)]
    inputs = LinearInputs(6, torch.device("cpu"), gram)
    assert not inputs.mean_abs.any()  # of none
    for batch in batches:
        inputs.add(batch.to(torch.float64))
    tokens = torch.cat([batch.reshape(-1, 6) for batch in batches]).double()
    assert inputs.tokens == 16
    torch.testing.assert_close(inputs.mean_abs.double(), tokens.abs().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(inputs.square.double(), tokens.square().sum(0), rtol=1e-6, atol=0)
    if not gram:
        assert inputs.gram is None
        return
    torch.testing.assert_close(inputs.gram.double(), tokens.t() @ tokens, rtol=1e-5, atol=1e-5)
