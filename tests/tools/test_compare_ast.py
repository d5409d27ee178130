"""AST's whole comparison, tiny: every variant is made, in one table, and a restart repeats none."""

from __future__ import annotations

import json
import math

from tests import dist
from tests.tools.test_compress_tools import _tool

SMALL = [
    "--num-layers", "2", "--hidden-size", "64", "--seq-length", "32", "--eval-iters", "1",
    "--eval-interval", "none", "--num-attention-heads", "2", "--log-interval", "1000",
]  # fmt: skip


def _compare(rank, world, folder):
    """All variants, with trainings in this process; the rows, and how many trainings there were."""
    from pathlib import Path

    from tests.runs import train

    tool = _tool("compare_ast")
    scale = tool.Scale(tool.comparison.Text(400, 400_000, False, 1), 16, 8, 8, 32)
    launched = []

    def launch(arguments):
        launched.append(arguments)
        train(0, 1, arguments)

    def work():
        return tool.Comparison(
            Path(folder), "tiny", scale, [*SMALL, "--train-iters", "120"],
            [*SMALL, "--train-iters", "30"], launch, [],
        )  # fmt: skip

    rows = tool.compare(work())
    # Interrupted after its trainings: tables are made again, nothing is trained again.
    (Path(folder) / "ast.json").unlink()
    again = tool.compare(work())
    return rows, again, len(launched)


def test_every_variant_is_compared_once(tmp_path):
    rows, again, launched = dist.run(_compare, 1, str(tmp_path))[0]
    assert rows == again and launched == 5
    loss = {row["variant"]: row["loss"] for row in rows}
    assert list(loss) == [
        "dense", "dense_longer", "magnitude", "wanda", "sparsegpt", "sr_ste", "ast", "ast_slorb",
        "ast_slorb_int4",
    ]  # fmt: skip
    # A model that has learnt so little loses little by pruning, so the order says nothing here; but
    # all are that model, and no two are the same.
    assert len(set(loss.values())) == 9
    assert all(abs(value - loss["dense"]) < 0.3 for value in loss.values())
    assert loss["dense"] < math.log(400) - 1.0
    assert abs(loss["ast_slorb_int4"] - loss["ast_slorb"]) < 0.05
    by_name = {row["variant"]: row for row in rows}
    assert by_name["dense"]["sparse_layers"] == 0
    assert all(by_name[name]["sparse_layers"] == 8 for name in ("wanda", "ast", "ast_slorb"))
    assert by_name["ast"]["low_rank_share"] == 0 < by_name["ast_slorb"]["low_rank_share"]
    assert by_name["ast_slorb_int4"]["linears_times_smaller_than_fp32"] > 3
    table = (tmp_path / "results.md").read_text()
    assert all(f"| {name} |" in table for name in loss)
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    assert (tmp_path / "results.png").stat().st_size > 5_000
