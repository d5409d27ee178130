"""Files around the code agree with it: citation, containers, hosted checks, hooks."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import megasparse
from tests.thorough import THOROUGH, is_thorough

ROOT = Path(__file__).parents[1]
SETUP = (ROOT / "setup.py").read_text()


def _pin(package: str) -> str:
    """The version that setup.py pins."""
    return re.findall(rf'"{re.escape(package)}==([\d.]+)"', SETUP)[0]


def test_one_version_everywhere():
    assert f'version="{megasparse.__version__}"' in SETUP
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == megasparse.__version__
    assert len(citation["references"]) == 3


def test_the_container_has_the_pinned_versions():
    text = (ROOT / "containers" / "Dockerfile").read_text()
    assert f"transformer-engine[pytorch]=={_pin('transformer-engine[pytorch]')}" in text
    low, high = re.findall(r'"torch>=([\d.]+),<([\d.]+)"', SETUP)[0]
    torch = re.findall(r"torch==([\d.]+)", text)[0]
    numbers = [tuple(map(int, version.split("."))) for version in (low, torch, high)]
    assert numbers[0] <= numbers[1] < numbers[2]
    recipe = (ROOT / "containers" / "megasparse.def").read_text()
    assert recipe.index("Bootstrap: docker") < recipe.index("%runscript") and "megasparse" in recipe


def test_the_container_has_no_fault_that_a_linter_knows():
    linter = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("no linter of Dockerfiles: hadolint, of the extra [dev], is not installed")
    dockerfile = ROOT / "containers" / "Dockerfile"
    result = subprocess.run([linter, "--no-color", dockerfile], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_hosted_checks_call_targets_that_are_there():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = "\n".join(step.get("run", "") for step in steps)
    targets = re.findall(r"^make ([\w-]+)$", commands, re.M)
    makefile = (ROOT / "Makefile").read_text()
    assert set(targets) == {"check", "test-all"}
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
    assert "megasparse pretrain --config quickstart" in commands


def test_hooks_have_the_linters_version():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks["repos"][0]["rev"] == f"v{_pin('ruff')}"
    names = {hook["id"] for repo in hooks["repos"] for hook in repo["hooks"]}
    assert {"ruff", "ruff-format", "mypy", "architecture"} <= names


@pytest.mark.parametrize("file", sorted(THOROUGH))
def test_what_is_left_to_test_all_is_there(file):
    """And something of the file stays in `make test`, or another file tests the same."""
    source = (ROOT / "tests" / file).read_text()
    for name in THOROUGH[file]:
        assert f"def {name.partition('[')[0]}" in source, name
    assert not is_thorough(ROOT / "tests" / file, "test_of_another_name")
    assert not is_thorough(ROOT / "elsewhere.py", THOROUGH[file][0])
