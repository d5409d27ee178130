"""The benchmark of 2:4 activations: what its ratios are made of."""

from __future__ import annotations

import pytest

from tools.bench.activation24 import Row, report

ROW = Row(
    "bfloat16 | 8, 4, 16", 1.0, 2.0, 0.5, 1.5, 9.0, dense=4.0, sparse=2.0, wide=4.0, weights=5.0
)


def test_a_product_is_compared_with_what_makes_its_operand():
    assert ROW.product == pytest.approx((1 + 4) / (0.5 + 2))


def test_four_of_six_products_stay_as_they_are():
    # 2 z-like and 2 weight products, 18 ms; two products and their operands on each side.
    assert ROW.ffn == pytest.approx((18 + 2 * (2 + 4)) / (18 + 2 * (1.5 + 2)))


def test_the_table_has_a_line_a_row():
    line = report([ROW], "a GPU", ["--output", "x.md"]).splitlines()[-1]
    assert (
        line
        == "| bfloat16 | 8, 4, 16 | 1.000 | 0.500 | 9.000 | 4.000 | 2.000 | 2.00 | 2.00 | 1.20 |"
    )
