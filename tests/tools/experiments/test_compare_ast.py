"""AST's whole comparison, tiny: every variant is made, in one table, and a restart repeats none."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path

import pytest

from megasparse.errors import CheckpointError, ConfigError, DataError, MegasparseError
from tests import dist
from tools.experiments import compare_ast as tool

SMALL = [
    "--num-layers", "2", "--hidden-size", "64", "--seq-length", "32", "--eval-iters", "1",
    "--eval-interval", "none", "--num-attention-heads", "2", "--log-interval", "1000",
]  # fmt: skip
ALL = [
    "dense", "dense_longer", "magnitude", "wanda", "sparsegpt", "sr_ste", "cast", "ast",
    "ast_slorb", "ast_slorb_int4",
]  # fmt: skip
DATA = (
    "data_text_document.bin",
    "data_text_document.idx",
    "data_text_document.json",
    "tokenizer.model",
)


class _Ended:
    """A process that has ended."""

    def __init__(self, code: int = 0) -> None:
        self.code = code

    def poll(self):
        return self.code


def _never(arguments, extra, log):
    raise AssertionError(f"begun: {arguments}")


def _work(folder, start_run=_never, dense_iters=120):
    scale = tool.ast_variants.Scale(tool.corpus_data.Text(400, 400_000, False, 1), 16, 8, 8, 32)
    dense, retrain = ["--train-iters", str(dense_iters)], ["--train-iters", "30"]
    return tool.Work(Path(folder), "tiny", scale, SMALL, dense, retrain, start_run)


def _session(work, start_dense=_never, start_make=_never, **options):
    quiet = {"say": lambda line: None, **options}
    return tool.Session(work, list(ALL), start_dense, start_make, **quiet)


def _compare(rank, world, folder):
    """All variants in this process, then one again; what was trained, and what was made."""
    from tests.runs import train

    trained, made = [], []

    def start_run(arguments, extra, log):
        trained.append(Path(arguments[arguments.index("--run-dir") + 1]).name)
        train(0, 1, list(arguments))
        return _Ended()

    def start_make(arguments, extra, log):
        made.append(arguments[1])
        tool.ast_variants.make(work, arguments[1])
        return _Ended()

    work = _work(folder, start_run)
    session = _session(work, start_run, start_make)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool.plots, "available", lambda: False)
        tool.compare(session)
    # Interrupted after its training: it is measured again, and not trained again.
    before = json.loads((work.output / "ast.json").read_text())
    (work.output / "ast.json").unlink()
    tool.compare(session)
    again = json.loads((work.output / "ast.json").read_text())
    return trained, made, before["loss"] == again["loss"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison's folder, and what `_compare` gave."""
    folder = tmp_path_factory.mktemp("compared")
    return folder, dist.run(_compare, 1, str(folder))[0]


def test_every_variant_is_compared_once(compared):
    folder, (trained, made, same) = compared
    assert same and trained == ["dense", "ast_slorb", "ast", "cast", "sr_ste", "dense_longer"]
    assert sorted(made[:-1]) == sorted(ALL) and made[-2:] == ["ast_slorb_int4", "ast"]
    rows = json.loads((folder / "results.json").read_text())
    loss = {row["variant"]: row["loss"] for row in rows}
    assert list(loss) == ALL
    # A model that has learnt so little loses little by pruning, so the order says nothing here; but
    # all are that model, and no two are the same.
    assert len(set(loss.values())) == 10
    assert all(abs(value - loss["dense"]) < 0.3 for value in loss.values())
    assert loss["dense"] < math.log(400) - 1.0
    assert abs(loss["ast_slorb_int4"] - loss["ast_slorb"]) < 0.05
    by_name = {row["variant"]: row for row in rows}
    assert by_name["dense"]["sparse_layers"] == 0
    assert all(
        by_name[name]["sparse_layers"] == 8 for name in ("wanda", "cast", "ast", "ast_slorb")
    )
    assert by_name["ast"]["low_rank_share"] == 0 < by_name["ast_slorb"]["low_rank_share"]
    assert by_name["ast_slorb_int4"]["linears_times_smaller_than_fp32"] > 3
    # Retraining has a seed of its own, and so another order of samples; measuring has not.
    assert len({row["samples_of_evaluation"] for row in rows}) == 1
    tokens = {row["variant"]: row["training"]["tokens"] for row in rows if row["training"]}
    assert tokens["dense"] == 120 * 16 * 32 and tokens["ast"] == 30 * 16 * 32 == tokens["sr_ste"]
    table = (folder / "results.md").read_text()
    assert all(table.count(f"| {name} |") == 2 for name in loss)
    assert "retrained with 25.0 % of the dense model's" in table and "Not made yet" not in table
    assert (folder / "results.png").stat().st_size > 5_000
    assert (folder / "pictures" / "index.html").is_file()


def _travel(folder, target, without=()):
    for name in ALL:
        if name not in without:
            shutil.copy(folder / f"{name}.json", target)


def test_what_is_missing_is_named_and_small_files_are_enough(compared, tmp_path, monkeypatch):
    monkeypatch.setattr(tool.plots, "available", lambda: False)
    _travel(compared[0], tmp_path, without=("dense", "wanda"))
    over = time.monotonic() - 1
    table = tool.compare(_session(_work(tmp_path), deadline=over))
    assert "Not made yet: dense, wanda." in table and "| magnitude | - |" in table
    shutil.copy(compared[0] / "dense.json", tmp_path)
    table = tool.compare(_session(_work(tmp_path), deadline=over))
    assert "Not made yet: wanda." in table and "| dense | 0.1M |" in table
    assert not (tmp_path / "tokenizer.model").exists()  # for nothing that begins no data are made
    # The dense model that the others are made of cannot be made again.
    for name in DATA:
        shutil.copy(compared[0] / name, tmp_path)
    with pytest.raises(CheckpointError, match="the dense model was complete, and is not here"):
        tool.compare(_session(_work(tmp_path)))


def test_rows_of_another_comparison_are_refused(compared, tmp_path):
    _travel(compared[0], tmp_path)
    with pytest.raises(ConfigError, match=r"dense.json: finished with train_iters 120, .* has 60"):
        tool.compare(_session(_work(tmp_path, dense_iters=60)))
    path = tmp_path / "wanda.json"
    text = path.read_text()
    path.write_text(text.replace('"calibration_samples": 16', '"calibration_samples": 32'))
    with pytest.raises(ConfigError, match="wanda.json: made with calibration_samples 32"):
        tool.compare(_session(_work(tmp_path)))
    path.write_text(text.replace('"data": "', '"data": "0'))
    with pytest.raises(ConfigError, match="finished on tokens of sha256"):
        tool.compare(_session(_work(tmp_path)))
    path.write_text("[]")
    with pytest.raises(DataError, match="wanda.json: not what compare_ast.py writes"):
        tool.compare(_session(_work(tmp_path)))


def test_a_variant_that_fails_leaves_the_others(compared, tmp_path, monkeypatch):
    """`sparsegpt` fails: `wanda` is made all the same, the table is written, the code is told."""
    monkeypatch.setattr(tool.plots, "available", lambda: False)
    folder = compared[0]
    _travel(folder, tmp_path, without=("sparsegpt", "wanda"))
    for name in DATA:
        shutil.copy(folder / name, tmp_path)
    (tmp_path / "dense").symlink_to(folder / "dense")
    begun = []

    def start_make(arguments, extra, log):
        begun.append(arguments[1])
        if arguments[1] == "sparsegpt":
            return _Ended(70)
        shutil.copy(folder / "wanda.json", tmp_path)
        return _Ended()

    with pytest.raises(MegasparseError, match="sparsegpt: ended with exit code 70") as e:
        tool.compare(_session(_work(tmp_path), start_make=start_make))
    assert e.value.exit_code == 70 and begun == ["sparsegpt", "wanda"]
    table = (tmp_path / "results.md").read_text()
    assert "Not made yet: sparsegpt." in table and "| wanda | - |" in table


def test_on_two_devices_with_the_flags_of_a_user(
    compared, tmp_path, capsys, monkeypatch, quick_python
):
    """Real processes: dense on two ranks, then two variants beside each other."""
    monkeypatch.setattr("sys.executable", str(quick_python))
    for name in DATA:
        shutil.copy(compared[0] / name, tmp_path)
    arguments = [
        "--output",
        str(tmp_path),
        "--jobs",
        "2",
        "--dense-iters",
        "20",
        "--only",
        "magnitude",
        "--discard-checkpoints",
        "--",
        *SMALL,
    ]
    code = tool.main(arguments)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "training dense: done in " in printed.out and "magnitude: done in " in printed.out
    assert "Run finished" in (tmp_path / "dense.log").read_text()
    assert "magnitude: measured in" in (tmp_path / "magnitude.log").read_text()
    rows = {r["variant"]: r for r in json.loads((tmp_path / "results.json").read_text())}
    assert list(rows) == ["dense", "magnitude"] and rows["magnitude"]["sparse_layers"] == 8
    assert rows["dense"]["training"]["steps"] == 20
    assert "--jobs 2 --dense-iters 20 --only magnitude" in (tmp_path / "results.md").read_text()
    assert not (tmp_path / "magnitude" / "checkpoints").exists()
    assert (tmp_path / "dense" / "checkpoints").exists()  # what is missing will need it


def test_the_plan_adds_up(tmp_path, capsys):
    plan, work = tool.ast_plan, _work(tmp_path / "none")
    found = {stage.name: stage for stage in plan.stages(work, 2, 1000.0)}
    assert set(found) == {"data", "training dense", *tool.VARIANTS}
    dense = found["training dense"]
    steps = 120 * 16 * 32 / (1000.0 * 2 * plan.DATA_PARALLEL)
    assert dense.end - dense.begin == pytest.approx(steps + plan.START + plan.SAVE)
    variants = [found[name] for name in tool.VARIANTS]
    assert min(stage.begin for stage in variants) == dense.end
    for device in (0, 1):
        mine = sorted((s for s in variants if s.device == device), key=lambda s: s.begin)
        assert all(a.end <= b.begin for a, b in zip(mine, mine[1:], strict=False))
    assert found["ast_slorb_int4"].begin == max(s.end for s in variants[:-1])
    flags = ["--output", str(tmp_path / "none"), "--jobs", "2", "--plan", "--scale", "gpu"]
    assert tool.main([*flags, "--tokens-per-second", "240000"]) == 0
    assert "210M tokens on 2" in capsys.readouterr().out and not (tmp_path / "none").exists()


def test_impossible_flags_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool.run_queue, "visible_gpus", lambda: ["4", "5"])
    for flags, message in (
        (["--jobs", "3"], "--jobs 3, expected at most 2, one a GPU"),
        (["--jobs", "2", "--", "--global-batch-size", "9"], "global_batch_size"),
    ):
        assert tool.main(["--output", str(tmp_path / "x"), *flags]) == 64
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_jobs_that_share_a_gpu_train_the_dense_model_on_it_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tool.run_queue, "visible_gpus", lambda: ["4"])
    monkeypatch.setattr(tool.run_queue, "start_process", lambda *_, **options: options)
    flags = ["--output", str(tmp_path), "--jobs", "3", "--share-gpus"]
    args, _ = tool.parse(flags)
    session = tool.session_of(args, _work(tmp_path), flags, 0.0)
    assert session.start_dense([], {}, None)["launcher"] == "" and session.queue(_never, 3).shares()


def test_the_data_alone(compared, tmp_path, capsys):
    for name in DATA:
        shutil.copy(compared[0] / name, tmp_path)
    assert tool.main(["--output", str(tmp_path), "--data-only"]) == 0
    assert f"data of sha256 {tool.corpus_data.data_digest(tmp_path)}" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(DATA)


def test_adamw_gets_a_higher_rate_than_ast(tmp_path):
    from megasparse.config import load_config

    work = tool.Work(tmp_path, "tiny", tool.SCALES["tiny"], retrain_flags=["--lr", "1e-5"])
    rates = {name: load_config(work.training(name).arguments).train.lr for name in tool.RETRAINED}
    adamw, ast = dict.fromkeys(("dense_longer", "sr_ste", "cast"), 4e-5), 1e-5
    assert rates == {**adamw, **{name: ast for name in tool.RETRAINED if name.startswith("ast")}}


def test_a_double_pruned_grad_input_is_all_that_its_variants_change(tmp_path):
    settings = tool.ast_variants.finished.settings_of
    work = tool.Work(tmp_path, "tiny", tool.SCALES["tiny"])
    for name in ("ast", "ast_slorb"):
        one = settings(work.training(name).arguments)
        other = settings(work.training(f"{name}_double_pruned").arguments)
        assert one["sparsity"].pop("sparse_grad_input") is None
        assert other["sparsity"].pop("sparse_grad_input") == "double-pruned" and one == other


def test_configurations_of_all_scales_are_valid(tmp_path):
    from megasparse.config import load_config, resolve

    for name, scale in tool.SCALES.items():
        work = tool.Work(tmp_path, name, scale)
        for variant in ("dense", *tool.RETRAINED):
            ranks = 2 if variant == "dense" else 1
            resolve(load_config(work.training(variant).arguments), ranks)
