"""Imports flow one way, and heavy libraries stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import foretune

SOURCE = Path(foretune.__file__).parent
# Lowest first; a module imports only from layers below its own.
LAYERS = [
    ["errors", "sites", "texts"],
    ["faults", "ranges"],
    ["config", "folders", "outputs", "provenance", "tuning.curves", "ranking.candidates", "tables.table"],
    ["checkpoint", "columns", "drawing", "labels", "tables.plain", "store"],
    ["baselines.placements", "baselines.weights"],
    [
        "loading",
        "ranking.search",
        "ranking.screen",
        "forecasting.recipe",
        "forecasting.training",
        "forecasting.head_layer",
    ],
    ["forecasting.reach", "forecasting.identity", "tables.arrow", "tables.records", "tables.separated"],
    ["tables.folder"],
    ["alignment", "data", "features", "spectra", "head_parts", "premises"],
    ["ranking.adapter_file", "ranking.settings"],
    ["ranking.finalists"],
    ["tangent", "bounds", "regression", "demo", "sampling", "forecasting.optimizer"],
    [
        "kernel",
        "head",
        "placement",
        "models",
        "tuning.checkpoints",
        "forecasts",
        "tokens",
        "baselines.transferability",
        "baselines.early",
    ],
    ["layout", "forecasting.linear_model"],
    ["plan", "baselines.regressions", "forecasting.simulation"],
    ["measure", "tuning.course", "forecasting.survey"],
    ["scores", "tuning.fit", "forecasting.outlook", "ranking.blocks", "ranking.left_out"],
    ["tuning.outcome", "terminal", "forecasting.calibration"],
    ["forecasting.curve", "forecasting.calibration_fit"],
    ["figure", "report", "tuning.figure", "tuning.report", "ranking.ranks"],
    ["save", "tuning.folder", "ranking.figure"],
    [
        "study.grid",
        "study.quantities",
        "study.statistics",
        "study.tables",
        "study.early",
        "study.rivals",
        "study.damage",
    ],
    ["study.keys", "ranking.report"],
    ["study.work"],
    ["study.engines", "study.board", "study.records", "study.outlooks"],
    ["study.runs", "study.choices", "study.plots", "study.foresight"],
    ["study.summary"],
    ["study.forecast_tables"],
    ["paper.published"],
    ["paper.experiment"],
    ["paper.tables", "paper.claims"],
    ["paper.figure"],
    ["paper.items"],
    ["tuning.command", "study.command", "paper.command", "ranking.command"],
    ["cli"],
    [
        "__main__",
        "__init__",
        "tuning.__init__",
        "study.__init__",
        "paper.__init__",
        "ranking.__init__",
        "forecasting.__init__",
        "baselines.__init__",
        "tables.__init__",
    ],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
NUMERIC = ["outputs", "spectra", "bounds", "regression", "forecasts", "sites", "tuning.curves", "study.statistics"]
NUMERIC += ["ranking.candidates", "ranking.search", "ranking.screen", "forecasting.recipe", "forecasting.reach"]
NUMERIC += ["baselines.regressions", "baselines.transferability", "baselines.placements", "baselines.early"]
TANGENT = ["features", "tangent", "kernel", "head"]


def imports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name


MODULES = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}


def test_every_module_has_a_layer():
    assert set(MODULES) == set(LEVEL)


def test_imports_go_down():
    for module, path in MODULES.items():
        for name in imports(path):
            if name.startswith("foretune."):
                below = name.removeprefix("foretune.")
                assert LEVEL[below] < LEVEL[module], f"{module} imports {below}"


def test_numeric_modules_know_no_framework():
    for names, refused in (
        (NUMERIC, {"torch", "transformers", "peft", "datasets"}),
        (TANGENT, {"transformers", "peft"}),
    ):
        for name in names:
            used = {module.split(".")[0] for module in imports(MODULES[name])}
            assert not used & refused, name


def test_no_module_is_a_heap():
    for path in MODULES.values():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path.name
        assert path.stem not in ("utils", "common", "helpers", "misc", "core", "base")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from foretune.cli import run;"
        "commands = [[], ['score'], ['tune'], ['rank'], ['study'], ['study', 'report'], ['paper']];"
        "[run([*command, '--help']) for command in commands];"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'scipy',"
        "'sklearn', 'matplotlib', 'pydantic', 'ray'};"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
