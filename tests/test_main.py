"""The command `megasparse`: every command is there, in a checkout and in a wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from megasparse.__main__ import COMMANDS, main
from megasparse.config import load_config
from megasparse.config.packaged import SCRIPTS, commands_folder, find_config

ROOT = Path(__file__).parents[1]


def test_every_command_is_a_script_that_says_what_it_is():
    for script, what in COMMANDS.values():
        assert what
        if not script.startswith("-m "):
            assert (commands_folder() / script).read_text().startswith('"""')


def test_scripts_that_a_report_names_are_the_commands():
    assert all(COMMANDS[name][0] == script for name, script in SCRIPTS.items())


def test_usage_and_mistakes(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in COMMANDS)
    assert main(["pretrian"]) == 64 and "no command 'pretrian'" in capsys.readouterr().err


def test_completion_is_a_script_of_the_shell(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    ask = "COMP_WORDS=(megasparse pretrain --num-la); COMP_CWORD=2; _megasparse\n"
    ask += 'echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", script + ask], capture_output=True, text=True)
    assert done.stdout.split() == ["--num-layers"], done.stderr


def test_configurations_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = ROOT / "configs" / "recipes" / "fst.yaml"
    for name in ("configs/recipes/fst.yaml", "recipes/fst.yaml", "recipes/fst"):
        assert find_config(Path(name)) == expected
    assert load_config(["--config", "recipes/fst"]).sparsity.sparsity_recipe == "fst"
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "fst.yaml").write_text("train: {lr: 1}\n")
    assert find_config(Path("recipes/fst.yaml")) == Path("recipes/fst.yaml")  # one's own first
    assert find_config(Path("../configs/quickstart")) == Path("../configs/quickstart")


def test_a_wheel_has_commands_configurations_and_types(tmp_path):
    build = "from setuptools import build_meta as b; import sys; print(b.build_wheel(sys.argv[1]))"
    copy = tmp_path / "source"
    ignore = [f"--exclude={name}" for name in (".git", ".venv", "tests", "build", "runs")]
    pack = subprocess.run(["tar", "-C", ROOT, *ignore, "-cf", "-", "."], stdout=subprocess.PIPE)
    copy.mkdir()
    subprocess.run(["tar", "-C", copy, "-xf", "-"], input=pack.stdout, check=True)
    command = [sys.executable, "-c", build, tmp_path]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "megasparse = megasparse.__main__:main" in archive.read(entry).decode()
    scripts = [script for script, _ in COMMANDS.values() if not script.startswith("-m ")]
    scripts += [
        "configs/quickstart.yaml",
        "configs/recipes/fst.yaml",
        "tools/bench/parts/short_runs.py",
    ]
    scripts += ["tools/results/gemm-h200.json", "launch/slurm/pretrain.sbatch"]
    assert {f"megasparse/commands/{script}" for script in scripts} <= names
    assert "megasparse/py.typed" in names and not any("__pycache__" in name for name in names)
    assert not any(name.startswith(("tools/", "launch/", "tests/")) for name in names)
