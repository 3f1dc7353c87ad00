"""Imports flow one way, and heavy libraries stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import foretune

SOURCE = Path(foretune.__file__).parent
# Lowest first; a module imports only from layers below its own.
LAYERS = [
    ["errors", "sites"],
    ["config", "outputs"],
    ["columns"],
    ["data", "features", "spectra"],
    ["tangent", "bounds", "regression", "demo", "sampling"],
    ["kernel", "head", "placement", "models", "forecasts"],
    ["plan"],
    ["measure"],
    ["scores"],
    ["store", "figure", "report"],
    ["save"],
    ["cli"],
    ["__main__", "__init__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
NUMERIC = ["outputs", "spectra", "bounds", "regression", "forecasts", "sites"]
TANGENT = ["features", "tangent", "kernel", "head"]


def imports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name


def test_every_module_has_a_layer():
    assert {path.stem for path in SOURCE.glob("*.py")} <= set(LEVEL)


def test_imports_go_down():
    for path in SOURCE.glob("*.py"):
        for name in imports(path):
            if name.startswith("foretune."):
                below = name.split(".")[1]
                assert LEVEL[below] < LEVEL[path.stem], f"{path.stem} imports {below}"


def test_numeric_modules_know_no_framework():
    for names, refused in (
        (NUMERIC, {"torch", "transformers", "peft", "datasets"}),
        (TANGENT, {"transformers", "peft"}),
    ):
        for name in names:
            used = {module.split(".")[0] for module in imports(SOURCE / f"{name}.py")}
            assert not used & refused, name


def test_no_module_is_a_heap():
    for path in SOURCE.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path.name
        assert path.stem not in ("utils", "common", "helpers", "misc", "core", "base")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from foretune.cli import run; run(['--help']); run(['score', '--help']);"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'scipy', 'sklearn', 'matplotlib'};"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
