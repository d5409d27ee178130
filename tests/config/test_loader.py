"""Loading: precedence, strictness, and messages that name the nearest valid thing."""

from __future__ import annotations

from pathlib import Path

import pytest

from megasparse.config import build_parser, dump_yaml, from_dict, load_config, to_dict
from megasparse.config.loader import FIELDS
from megasparse.errors import ConfigError


def test_flags_override_yaml_overrides_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {num_layers: 7, hidden_size: 128}\ntrain: {lr: 1e-3}\n")
    config = load_config(["--config", str(path), "--hidden-size", "64", "--swiglu"])
    assert (config.model.num_layers, config.model.hidden_size) == (7, 64)
    assert config.train.lr == 1e-3
    assert config.model.swiglu and not load_config([]).model.swiglu


def test_base_file_is_applied_first(tmp_path):
    (tmp_path / "base.yaml").write_text("model: {num_layers: 7, hidden_size: 128}\n")
    child = tmp_path / "child.yaml"
    child.write_text("base: base.yaml\nmodel: {num_layers: 9}\n")
    config = load_config(["--config", str(child)])
    assert (config.model.num_layers, config.model.hidden_size) == (9, 128)
    child.write_text("base: child.yaml\n")
    with pytest.raises(ConfigError, match="includes itself"):
        load_config(["--config", str(child)])


def test_later_files_win_and_name_the_run(tmp_path):
    texts = {
        "small": "model: {num_layers: 7, hidden_size: 128}\ntrain: {lr: 1e-3}\n",
        "fst": "sparsity: {sparsity_recipe: fst}\ntrain: {lr: 2e-3}\n",
    }
    argv = []
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
        argv += ["--config", str(tmp_path / f"{name}.yaml")]
    config = load_config(argv)
    assert (config.model.num_layers, config.train.lr) == (7, 2e-3)
    assert config.sparsity.sparsity_recipe == "fst"
    assert config.checkpoint.run_dir == "runs/small_fst"
    assert load_config([*argv, "--run-dir", "runs/mine"]).checkpoint.run_dir == "runs/mine"
    reversed_order = load_config([*argv[2:], *argv[:2]])
    assert reversed_order.train.lr == 1e-3
    (tmp_path / "fst.yaml").write_text("checkpoint: {run_dir: runs/its_own}\n")
    assert load_config(argv).checkpoint.run_dir == "runs/its_own"
    assert load_config([]).checkpoint.run_dir == "runs/default"


def test_dump_reads_back_equal(tmp_path):
    config = load_config(["--data-path", "0.7", "a", "0.3", "b", "--lr", "3e-5", "--no-bf16"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    assert load_config(["--config", str(path)]) == config
    assert from_dict(to_dict(config), "test") == config


def test_every_field_is_a_flag_with_help_and_names_are_unique():
    flags = {option for action in build_parser()._actions for option in action.option_strings}
    assert {info.flag for info in FIELDS.values()} <= flags
    assert all(info.metadata["help"] for info in FIELDS.values())
    total = sum(len(section) for section in to_dict(load_config([])).values())
    assert total == len(FIELDS)


def test_launcher_rank_flag_and_alias_are_accepted():
    config = load_config(["--local_rank=1", "--num-key-value-heads", "2"])
    assert config.model.num_query_groups == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-layer", "3"], "unknown flag --num-layer, did you mean --num-layers?"),
        (["--num-layers", "three"], "--num-layers: found 'three', expected a whole number"),
        (["--num-layers", "0"], "expected a whole number at least 1"),
        (["--lr", "nan"], "--lr: found 'nan'"),
        (["--lr", "-1"], "--lr: found '-1', expected a number above 0"),
        (["--hidden-dropout", "1.0"], "below 1"),
        (["--normalization", "rms"], "expected one of LayerNorm, RMSNorm"),
        (["3"], "unexpected argument '3'"),
        (["--num-layers"], "--num-layers: found no value, expected a whole number"),
        (["--config", "/nonexistent.yaml"], "cannot be read"),
    ],
)
def test_bad_flags(argv, message):
    with pytest.raises(ConfigError) as caught:
        load_config(argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {num_layer: 3}", "unknown key model.num_layer, did you mean num_layers?"),
        ("model: {lr: 3}", "unknown key model.lr, did you mean train.lr?"),
        ("modell: {num_layers: 3}", "unknown group 'modell', did you mean model?"),
        ("num_layers: 3", "it belongs into the group 'model'"),
        ("model: {num_layers: 3.5}", "found 3.5, expected a whole number"),
        ("model: {swiglu: maybe}", "found 'maybe', expected true or false"),
        ("model: {num_layers: true}", "found True, expected a whole number"),
        ("model: {num_layers: null}", "found no value"),
        ("model: 3", "group 'model' holds 3"),
        ("- 3", "found list, expected groups"),
        ("model: {num_layers: 3, num_layers: 4}", "'num_layers' is given twice"),
        ("model: {num_layers: [}", "not valid YAML"),
        ("model: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text + "\n")
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", str(path)])
    assert message in str(caught.value)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_data_source_of_a_later_layer_replaces_an_earlier_one(tmp_path):
    path, later = tmp_path / "run.yaml", tmp_path / "later.yaml"
    path.write_text("data: {train_data_path: [a], valid_data_path: [b]}\n")
    later.write_text("data: {data_path: [c]}\n")
    argv = ["--config", str(path)]
    data = load_config([*argv, "--mock-data"]).data
    assert data.mock_data and not data.train_data_path and not data.valid_data_path
    data = load_config([*argv, "--config", str(later)]).data
    assert [Path(p).name for p in data.data_path] == ["c"] and not data.train_data_path
    data = load_config([*argv, "--valid-data-path", "v"]).data  # a part of the same source
    assert [Path(p).name for p in data.train_data_path + data.valid_data_path] == ["a", "v"]
    path.write_text("data: {mock_data: true}\n")
    data = load_config([*argv, "--data-path", "d", "--seed", "1"]).data
    assert not data.mock_data and [Path(p).name for p in data.data_path] == ["d"]
    assert load_config([*argv, "--no-mock-data"]).data == load_config([]).data
    both = load_config(["--mock-data", "--data-path", "d"]).data  # refused by `resolve`
    assert both.mock_data and both.data_path


def test_a_split_may_be_a_list(tmp_path):
    path = tmp_path / "run.yaml"
    for text, split in (("[95, 5, 0]", "95,5,0"), ("[0.9, 0.1]", "0.9,0.1"), ("8", "8")):
        path.write_text(f"data: {{split: {text}}}\n")
        assert load_config(["--config", str(path)]).data.split == split
    for text in ("[1, [2]]", "[true, 1]", "[1, null]", "{a: 1}"):
        path.write_text(f"data: {{split: {text}}}\n")
        with pytest.raises(ConfigError, match="data.split: found"):
            load_config(["--config", str(path)])


def test_paths_mean_the_same_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = load_config(
        ["--data-path", "0.5", "a", "0.5", "~/b", "--tokenizer-model", "t.model"]
        + ["--run-dir", "~/run", "--load-hf", "../x", "--save", "s"]
    )
    assert config.data.data_path == ["0.5", f"{tmp_path}/a", "0.5", f"{tmp_path}/home/b"]
    assert config.data.tokenizer_model == f"{tmp_path}/t.model"
    assert config.checkpoint.run_dir == f"{tmp_path}/home/run" and config.checkpoint.save == "s"
    assert config.checkpoint.load_hf == str(tmp_path.parent / "x")
