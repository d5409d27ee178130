"""Scales fold into the operation before a linear, in an order that leaves none behind."""

from __future__ import annotations

from megasparse.compress.folding import ORDER, norm_before, rows_before
from megasparse.config import load_config, resolve
from tests.runs import LLAMA, TINY


def test_a_linear_is_scaled_before_the_one_whose_rows_take_its_scales():
    """Rows that change after a linear was quantized would not be those that it was made for."""
    flags = [*TINY, *LLAMA, "--num-query-groups", "4", "--mock-data"]
    model = resolve(load_config(flags), 1).model
    folds = {name: found[0] for name in ORDER if (found := rows_before(name, model))}
    assert folds == {
        "mlp.linear_fc2": "mlp.linear_fc1",
        "self_attention.linear_proj": "self_attention.linear_qkv",
    }
    for name, into in folds.items():
        assert ORDER.index(name) < ORDER.index(into)
    # Every linear has one place, and no two share it.
    assert len(ORDER) == 4 and {norm_before(name, model) for name in folds.values()} == {
        "input_layernorm",
        "pre_mlp_layernorm",
    }
    assert not any(norm_before(name, model) for name in folds)
    # Norms behind attention and FFN give no linear its input.
    model.norm_placement = "post"
    assert not any(norm_before(name, model) for name in ORDER)
