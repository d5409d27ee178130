"""Where configurations and scripts lie: beside the package in a checkout, inside it when installed.

`setup.py` puts `configs/`, `launch/` and `tools/` into `megasparse/commands/` of a wheel.
"""

from __future__ import annotations

from pathlib import Path

# The scripts that other parts name to people, by their command.
SCRIPTS = {
    "generate": "launch/generate.py",
    "plot": "tools/plot_runs.py",
    "export": "tools/export_sparse.py",
    "convert": "tools/convert_checkpoint.py",
}
_PACKAGE = Path(__file__).resolve().parents[1]


def commands_folder() -> Path:
    """The folder that holds `configs/`, `launch/` and `tools/`."""
    inside = _PACKAGE / "commands"
    return inside if inside.is_dir() else _PACKAGE.parent


def find_config(path: Path) -> Path:
    """A configuration by its path, or by its name among those that come with megasparse.

    `configs/recipes/fst.yaml`, `recipes/fst.yaml` and `recipes/fst` are the same one.
    """
    if path.exists() or path.is_absolute():
        return path
    name = path if path.suffix else path.with_suffix(".yaml")
    if name.parts[:1] == ("configs",):
        name = Path(*name.parts[1:])
    ours = commands_folder() / "configs" / name
    return ours if ours.is_file() and ".." not in name.parts else path
