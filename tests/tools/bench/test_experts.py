"""The benchmark of experts' GEMMs: what it says of made-up times, and without a GPU."""

from __future__ import annotations

from tools.bench.experts import Row, main, pays_from, report


def _row(tokens: int, dense: float, alone: float, together: float = 9.0) -> Row:
    return Row("FP8", "fc1 output", tokens, dense, dense + 1, alone, together, 3)


def test_it_pays_from_where_it_stays_faster() -> None:
    rows = [_row(128, 1.0, 0.9), _row(256, 1.0, 1.1), _row(1024, 2.0, 2.5, 1.0), _row(512, 2, 1)]
    assert pays_from(rows) == 512
    assert pays_from(rows[:2]) is None
    text = report(rows, (8, 2048, 4096), ["A GPU"])
    assert "| FP8 | fc1 output | 1024 | 2.000 | 3.000 | 2.500 | 1.000 | 2.00 |" in text
    assert "| FP8 | fc1 output | 512 |" in text.partition("pays from")[2]
    assert "none of these" in report(rows[:2], (8, 2048, 4096), [])


def test_without_a_gpu_it_says_so(capsys) -> None:
    assert main([]) == 1
    assert "no GPU is here" in capsys.readouterr().err
