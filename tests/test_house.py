"""The house: rooms in one order, no circle in a room, heavy libraries where they belong."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import foretune

SOURCE = Path(foretune.__file__).parent
# Lowest first; a room imports only from rooms on floors below its own, and rooms of one floor do not know each other.
FLOORS = [
    ["arrays", "errors"],
    ["faults", "settings"],
    ["processes", "report"],
    ["engines", "readers"],
    ["tasks"],
    ["language"],
    ["models"],
    ["ntk"],
    ["problem", "sequence_plan"],
    ["stream"],
    ["forecasting"],
    ["ledger", "scoring", "ranking", "training"],
    ["trials"],
    ["study"],
    ["evaluation"],
    ["paper"],
    ["commands"],
    ["cli"],
    ["__main__", "__init__"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
NO_TORCH = {"torch", "transformers", "peft", "datasets"}
NO_TRANSFORMERS = {"transformers", "peft", "datasets"}
# What each room, or a module of it, does without.
WITHOUT = {
    "errors": NO_TORCH,
    "engines": NO_TRANSFORMERS,
    "settings": NO_TORCH,
    "report": NO_TORCH,
    "language.rows": NO_TORCH,
    "language.messages": NO_TORCH,
    "language.formats": NO_TORCH,
    "language.load": NO_TORCH - {"datasets"},
    "language.spans": NO_TORCH,
    "language.encode": NO_TRANSFORMERS,
    "ntk": NO_TRANSFORMERS,
    "ntk.spectrum": NO_TORCH,
    "ntk.bounds": NO_TORCH,
    "ntk.regression": NO_TORCH,
    "ntk.prediction": NO_TORCH,
    "tasks.outputs": NO_TORCH,
    "models.sites": NO_TORCH,
    "forecasting.schedule": NO_TORCH,
    "forecasting.reach": NO_TORCH,
    "forecasting.calibration": NO_TORCH,
    "forecasting.calibration_file": NO_TORCH,
    "forecasting.cautions": NO_TORCH,
    "forecasting.risk": NO_TORCH,
    "forecasting.terms": NO_TORCH,
    "forecasting.with_trials": NO_TORCH,
    "forecasting.seal": NO_TORCH,
    "ledger": NO_TORCH,
    "forecasting.verdicts": NO_TORCH,
    "ranking.candidates": NO_TORCH,
    "trials.spend": NO_TORCH,
    "trials.plan": NO_TORCH,
    "ranking.search": NO_TORCH,
    "ranking.quick_score": NO_TORCH,
    "evaluation.statistics": NO_TORCH,
    "evaluation.transferability": NO_TORCH,
    "evaluation.lazy": NO_TORCH,
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


MODULES = {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}


def room(module):
    return module.split(".")[0]


def inside(module):
    """What a module imports of foretune."""
    return {name.removeprefix("foretune.") for name in imports(MODULES[module]) if name.startswith("foretune.")}


def test_every_room_has_a_floor():
    assert {room(module) for module in MODULES} == set(FLOOR)


def test_imports_go_down():
    for module in MODULES:
        for name in inside(module):
            assert name in MODULES, f"{module} imports {name}"
            if room(name) != room(module):
                assert FLOOR[room(name)] < FLOOR[room(module)], f"{module} imports {name}"


def test_no_room_has_a_circle():
    graph = {module: {name for name in inside(module) if room(name) == room(module)} for module in MODULES}
    TopologicalSorter(graph).prepare()


def test_rooms_do_without_what_they_do_not_need():
    for place, refused in WITHOUT.items():
        modules = [module for module in MODULES if module == place or module.startswith(f"{place}.")]
        assert modules, place
        for module in modules:
            assert not {name.split(".")[0] for name in imports(MODULES[module])} & refused, module


def test_no_module_is_a_heap():
    for path in MODULES.values():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path.name
        assert path.stem not in ("utils", "common", "helpers", "misc", "core", "base")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from foretune.cli import run;"
        "commands = [[], ['score'], ['forecast'], ['tune'], ['rank'], ['study'], ['study', 'report'], ['paper']];"
        "commands += [['ledger']];"
        "[run([*command, '--help']) for command in commands];"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'scipy',"
        "'sklearn', 'matplotlib', 'pydantic', 'ray'};"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
