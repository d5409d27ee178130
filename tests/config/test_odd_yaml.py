"""YAML of any structure and size is one short line within seconds."""

from __future__ import annotations

import json
import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megasparse.config import load_config
from megasparse.config.fields import FIELDS
from megasparse.errors import ConfigError

BOMB = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9) if i else 'x'}]" for i in range(9))
MERGES = "\n".join(
    [
        "m0: &m0 {a: 1, b: 2, c: 3}",
        *(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 12)),
    ]
)
ODD = {
    "a list as key": "? [1, 2]\n: 3\n",
    "a mapping as key": "? {a: b}\n: 3\n",
    "nested lists": "model: " + "[" * 5000 + "]" * 5000,
    "nested mappings": "model: " + "{a: " * 5000 + "1" + "}" * 5000,
    "a long integer": "model:\n  num_layers: " + "9" * 5000,
    "a large integer": "model:\n  num_layers: " + "9" * 4000,
    "a large float": "train:\n  lr: 1.0e+400",
    "a large count": "model:\n  num_layers: 100000000",
    "a large size": "model:\n  hidden_size: 99999999999999999999",
    "a large time": "parallel:\n  distributed_timeout_minutes: 1.0e+300",
    "an alias bomb as value": f"model:\n  num_layers: &b [x]\n{BOMB}\ntrain: *l8",
    "an alias bomb as setting": f"{BOMB}\nmodel:\n  num_layers: *l8",
    "a bomb of merges": f"{MERGES}\nmodel: *m11",
    "an anchor in itself": "model: &a [*a]",
    "a mapping in itself": "model: &a {num_layers: *a}",
    "a date that is none": "model:\n  num_layers: 2001-99-99",
    "a bad tag": "model:\n  num_layers: !!int ''",
    "a bad bool": "model:\n  swiglu: !!bool perhaps",
    "a bad time": "train:\n  lr: !!timestamp x",
    "a bad binary": "train:\n  lr: !!binary '=='",
    "a NUL": 'checkpoint:\n  run_dir: "a\\0b"',
    "empty": "checkpoint:\n  run_dir: ''",
    "blank": "checkpoint:\n  run_dir: '  '",
    "an empty item": "data:\n  data_path: ['']",
    "a long name": "checkpoint:\n  run_dir: " + "x" * 5000,
    "a long key": "model:\n  " + "x" * 100000 + ": 1",
    "a list of bases": "base: [a, b]",
    "a base that is a device": "base: /dev/zero",
    "a base that is itself": "base: odd.yaml",
    "a base of half a character": 'base: "\\ud800\\udc00"',
    "half a character": 'checkpoint:\n  run_dir: "\\ud800"',
    "too large": "#" * (1 << 21),
    "a time of YAML 1.1": "train:\n  train_iters: 1:30:00",
    "a time with a fraction": "checkpoint:\n  exit_duration_in_mins: 1:30.5",
    "two documents": "model: {}\n---\nmodel: {}",
}


def _problem(path, text: str | bytes) -> str | None:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    try:
        load_config(["--config", str(path)])
    except ConfigError as error:
        return max(error.problems or [str(error)], key=len)
    return None


@pytest.mark.parametrize("name", ODD)
def test_odd_structures_are_refused_in_one_short_line(tmp_path, name):
    begin = time.process_time()
    problem = _problem(tmp_path / "odd.yaml", ODD[name])
    assert problem is not None and ("odd.yaml" in problem or "/dev/zero" in problem)
    assert len(problem) < 2000 and "\n" not in problem
    assert time.process_time() - begin < 20  # without a limit: for ever


@pytest.mark.parametrize("place", ["pipe", "device", "folder", "nowhere"])
def test_odd_files_are_refused(tmp_path, place):
    path = {"device": "/dev/zero"}.get(place, str(tmp_path / "odd.yaml"))
    if place == "pipe":
        os.mkfifo(path)
    if place == "folder":
        os.mkdir(path)
    with pytest.raises(ConfigError, match=f"--config {path}: cannot be read"):
        load_config(["--config", path])


def test_many_problems_stay_readable(tmp_path):
    text = "model:\n" + "".join(f"  num_layer{i}: 1\n" for i in range(3000))
    with pytest.raises(ConfigError) as refused:
        load_config(["--config", str(_written(tmp_path, text))])
    assert len(refused.value.problems) <= 50


@pytest.mark.parametrize("value", ["", " ", "a\0b", "x" * 5000, "\ud800"])
@pytest.mark.parametrize("name", [f.name for f in FIELDS.values() if "path" in f.metadata])
def test_no_path_is_empty_or_no_name(name, value):
    with pytest.raises(ConfigError, match="found"):
        load_config([FIELDS[name].flag, value])


_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from(["0x", "1e400", "2001-99-99", "!!int x", "*a", "&a", "<<", "? x", "%", "@"]),
)  # fmt: skip
_trees = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)
_groups = st.sampled_from(["model", "train", "data", "parallel", "checkpoint", "sparsity", "base"])
_names = st.sampled_from(sorted(FIELDS)) | st.text(max_size=9)


@given(st.dictionaries(_groups, st.dictionaries(_names, _trees) | _trees), st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_whatever_a_file_holds_it_is_settings_or_one_line(tmp_path_factory, tree, data):
    text = bytearray(json.dumps(tree).encode())
    for _ in range(data.draw(st.integers(0, 3))):  # and with damaged bytes
        if text:
            text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    problem = _problem(path, bytes(text))
    assert problem is None or len(problem) < 2000


def test_a_number_is_what_it_is_on_the_command_line(tmp_path):
    """In YAML 1.1 it would be 64."""
    path = _written(tmp_path, "train:\n  train_iters: 0100\n  lr: 1_0.5e-3\n")
    found = load_config(["--config", str(path)]).train
    assert found.train_iters == load_config(["--train-iters", "0100"]).train.train_iters == 100
    assert found.lr == 10.5e-3


def _written(folder, text: str):
    path = folder / "odd.yaml"
    path.write_text(text)
    return path
