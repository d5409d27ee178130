"""The laws of the design, tested: imports go down, one door a dependency, no cycles, sizes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megasparse"
FILES = sorted(PACKAGE.rglob("*.py"))

# What a module may import of its own package: areas of lower levels, and its own area.
LEVELS = {
    "errors": 0, "log": 0, "progress": 0, "tensor_files": 0, "timer": 0,
    "config": 1, "kernels": 1,
    "fp8": 2, "data": 2, "distributed": 2, "metrics": 2,
    "sparsity": 4, "compress": 4,
    "megatron": 5, "optim": 5, "convert": 5, "estimate": 5,
    "checkpoint": 6,
    "preflight": 7, "inference": 7,
    "train": 8,
}  # fmt: skip

# Only these files (or folders) may import the dependency.
DOORS = {
    "megatron": ["megasparse/megatron"],
    "deepspeed": ["megasparse/train/engine/deepspeed.py"],
    "transformer_engine": ["megasparse/fp8/delayed.py"],
    "transformer_engine_torch": ["megasparse/fp8/delayed.py"],
    "triton": ["megasparse/kernels/*/triton.py"],
    "sentencepiece": ["megasparse/data/tokenizer.py", "megasparse/data/spm_json.py"],
    "tokenizers": ["megasparse/data/tokenizer.py", "megasparse/data/spm_json.py"],
    "tqdm": ["megasparse/progress.py"],
    "yaml": ["megasparse/config/loader.py"],
    "safetensors": ["megasparse/tensor_files.py"],
    "tensorboard": ["megasparse/metrics/writers.py"],
    "wandb": ["megasparse/metrics/writers.py"],
}

MAX_MODULE_LINES = 350
MAX_FUNCTION_LINES = 80
MAX_KERNEL_LINES = 120  # a Triton kernel is one function


def _imports(tree: ast.AST) -> list[tuple[str, ast.stmt]]:
    found: list[tuple[str, ast.stmt]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.append((node.module or "", node))
            found += [(f"{node.module}.{alias.name}", node) for alias in node.names]
    return found


def _area(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_module_keeps_the_laws(path: Path):
    source = path.read_text()
    tree = ast.parse(source)
    relative = path.relative_to(ROOT)
    area = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    limit = MAX_MODULE_LINES
    assert len(source.splitlines()) <= limit, f"{relative} has grown past {limit} lines"
    assert ast.get_docstring(tree), f"{relative} opens without its idea"

    inside_functions = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    for module, node in _imports(tree):
        top = module.split(".")[0]
        if top == "megasparse":
            assert id(node) not in inside_functions, f"{relative} imports {module} in a function"
            other = _area(module)
            if area != "__init__" and other not in ("", area, "__version__"):
                assert LEVELS[other] < LEVELS[area], f"{relative} ({area}) imports {module}"
        if module.startswith("torch.utils.tensorboard"):
            top = "tensorboard"
        if top in DOORS:
            assert any(
                relative.match(door) or str(relative).startswith(door + "/") for door in DOORS[top]
            ), f"{relative} imports {top}; its door is {DOORS[top]}"

    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (function.end_lineno or 0) - function.lineno + 1
            most = MAX_KERNEL_LINES if path.name == "triton.py" else MAX_FUNCTION_LINES
            assert length <= most, f"{relative}: {function.name} has {length} lines"


def test_no_import_cycles():
    graph: dict[str, set[str]] = {}
    modules = {_name(path): path for path in FILES}
    for name, path in modules.items():
        wanted = {module for module, _ in _imports(ast.parse(path.read_text()))}
        graph[name] = {module for module in wanted if module in modules and module != name}
        # `from package import name` in a module of that package is an edge to the package only if
        # the package's __init__ defines more than re-exports; importing a sibling is the edge.
        graph[name] -= {name.rsplit(".", 1)[0]}
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> None:
        assert node not in trail, " -> ".join([*trail[trail.index(node) :], node])
        if node not in done:
            for other in sorted(graph[node]):
                visit(other, [*trail, node])
            done.add(node)

    for name in graph:
        visit(name, [])


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_kernel_has_a_reference():
    public = (PACKAGE / "kernels" / "__init__.py").read_text()
    folders = [path.parent for path in sorted((PACKAGE / "kernels").glob("*/triton.py"))]
    operations = [folder for folder in folders if f"kernels.{folder.name} import" in public]
    assert len(operations) >= 7
    for folder in operations:
        assert (folder / "reference.py").exists(), folder


def test_nothing_prints_or_pickles_in_the_package():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("print", "eval", "exec"), f"{path}: {node.func.id}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "dill", "marshal", "shelve"} & set(names), path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_everything_public_is_documented(path: Path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name}"


def test_top_level_shows_only_what_belongs_there():
    allowed = {
        "README.md", "CHANGELOG.md", "Makefile", "setup.py", "LICENSE", "pyproject.toml",
        "megasparse", "launch", "configs", "docs", "tools", "tests",
        # made by work, ignored by git
        "megasparse.egg-info", "runs", "build", "dist",
    }  # fmt: skip
    visible = {entry.name for entry in ROOT.iterdir() if not entry.name.startswith(".")}
    assert visible <= allowed, visible - allowed
