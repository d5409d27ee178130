"""Files around the code agree with it: citation, containers, hosted checks, hooks."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import megasparse
from tests.thorough import CASES, FIRST_CASE, WHOLE, thorough

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


@pytest.mark.parametrize("file", sorted(FIRST_CASE | CASES | WHOLE))
def test_what_is_left_to_test_all_is_there(file):
    source = (ROOT / "tests" / file).read_text()
    names = [*FIRST_CASE.get(file, ()), *WHOLE.get(file, ())]
    assert [name for name in names if name != "*" and f"def {name}(" not in source] == []


def test_further_cases_are_left_to_test_all():
    def item(file, name):
        return SimpleNamespace(path=ROOT / "tests" / file, name=name)

    file, first = next((file, names[0]) for file, names in FIRST_CASE.items())
    matrix, named = next((file, names[0]) for file, names in CASES.items())
    whole, alone = next((file, names[0]) for file, names in WHOLE.items() if names[0] != "*")
    every = next(file for file, names in WHOLE.items() if names[0] == "*")
    stay = [
        item(file, f"{first}[b]"),
        item(file, "test_of_another_name[b]"),
        item(matrix, f"test_x[{named}]"),
        item(matrix, "test_without_cases"),
        item("elsewhere.py", f"{first}[c]"),
    ]
    left = [item(file, f"{first}[a]"), item(matrix, "test_x[another]"), item(whole, alone)]
    left.append(item(every, "test_x"))
    assert list(thorough([*stay, *left])) == left
    name = FIRST_CASE[kernels := next(file for file in FIRST_CASE if file.startswith("kernels/"))][
        0
    ]
    cases = [item(kernels, f"{name}[{case}]") for case in "ab"]
    assert list(thorough(cases)) == cases[1:] and list(thorough(cases, has_gpu=True)) == []
