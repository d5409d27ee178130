"""What others can change is told in one line, and no secret gets into what a run saves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megasparse.config import ResolvedConfig, load_config, resolve
from megasparse.errors import ConfigError
from megasparse.preflight import exposure
from megasparse.preflight.exposure import check_no_secrets, exposed_inputs
from megasparse.preflight.settings import prepare
from tests.runs import TINY, make_dataset


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A place of one's own for caches, and a script."""
    monkeypatch.setattr(exposure.sys, "argv", [str(tmp_path / "pretrain.py")])
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    return tmp_path


def _config(*flags: str) -> ResolvedConfig:
    return resolve(load_config([*TINY, "--mock-data", *flags]), 1)


@pytest.mark.parametrize("name", ["data.bin", "data.idx", "config.yaml", "run", "pretrain.py"])
def test_an_input_that_all_can_write_is_named_with_its_mode(home, name):
    data = make_dataset(home / "data", documents=20)
    (home / "config.yaml").write_text("train: {lr: 0.001}\n")
    (home / "pretrain.py").touch()
    (home / "run").mkdir()
    argv = [*TINY, "--data-path", data, "--config", str(home / "config.yaml")]
    argv += ["--run-dir", str(home / "run")]
    assert prepare(argv, 1).warnings == ()
    path = home / name
    path.chmod(path.stat().st_mode | 0o002)
    (told,) = prepare(argv, 1).warnings
    assert f"{path} (mode {path.stat().st_mode & 0o777:o})" in told and "\n" not in told
    path.chmod(path.stat().st_mode & ~0o002 | 0o020)  # a group shares its data
    assert prepare(argv, 1).warnings == ()


def test_a_folder_in_which_all_can_exchange_files_is_named(home):
    shared = home / "shared"
    shared.mkdir()
    (shared / "deepspeed.json").write_text("{}")
    config, data = _config("--deepspeed_config", str(shared / "deepspeed.json")), _NoData()
    shared.chmod(0o777)
    assert f"(mode 777 of {shared})" in (exposed_inputs(config, data) or "")
    shared.chmod(0o1777)  # as /tmp: only owners may exchange their files
    assert exposed_inputs(config, data) is None


def test_kernels_that_another_user_may_have_put_there_are_named(home, monkeypatch):
    """The default of launch/env.sh is a name in /tmp that everybody knows."""
    (home / "triton").mkdir()
    assert exposed_inputs(_config(), _NoData()) is None
    monkeypatch.setattr(exposure.os, "getuid", lambda: os.geteuid() + 1)
    if (home / "triton").stat().st_uid == 0:
        os.chown(home / "triton", 12345, -1)
    assert f"{home / 'triton'} (of user " in (exposed_inputs(_config(), _NoData()) or "")


@pytest.mark.parametrize(
    "uri", ["http://me:SECRET@host/x", "https://SECRET@host", "postgresql://me:SECRET@db/mlflow"]
)
def test_a_password_in_a_setting_is_refused_and_not_shown(home, uri):
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        check_no_secrets(_config("--mlflow-tracking-uri", uri))
    assert "SECRET" not in str(refused.value)


@pytest.mark.parametrize("uri", ["http://host:5000", "file:///x", "databricks", "sqlite:///a.db"])
def test_other_addresses_pass(home, uri):
    check_no_secrets(_config("--mlflow-tracking-uri", uri))


class _NoData:
    """Of a run on mock data."""

    sources: dict = {}
