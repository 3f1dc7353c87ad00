"""Where the time of a command goes: imports, by package, and its stages, in seconds of the processor.

    python benchmarks/startup.py [--repeats 3] [--results benchmarks/results/startup.md] [ARGUMENTS OF foretune]

by default `demo`. The command runs in processes of its own, with the machinery of imports and the functions of the
stages wrapped: what is imported within a stage counts as an import, and a stage within another as itself alone. Other
processes on the machine enter seconds of the processor little. Each number is a median over the repeats.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

# Which functions a stage is, by module.
STAGES: dict[str, dict[str, tuple[str, ...]]] = {
    "read the data": {"foretune.tasks.load": ("task_of",)},
    "load model and tokenizer": {"foretune.models.classifier": ("load_model",)},
    "tokenise": {"foretune.models.classifier": ("encode",)},
    "find the layout of the model": {"foretune.models.alignment": ("find_layout",)},
    "passes": {"foretune.ntk.capture": ("observe_totals", "run_logits"), "foretune.ntk.jacobian": ("batch_features",)},
    "kernel and spectrum": {"foretune.ntk.kernel": ("tangent_kernel",), "foretune.scoring.assess": ("assess",)},
    "simulate": {"foretune.forecasting.simulate": ("simulate", "train_runs")},
    "fine-tune": {"foretune.training.fit": ("fit",)},
    "draw": {
        "foretune.scoring.figure": ("spectrum_figure",),
        "foretune.report.curve_figure": ("curve_figure", "loss_figure"),
        "foretune.forecasting.rows_files": ("rows_figure",),
    },
}
REST = "the rest"


class Account:
    """Seconds of the processor by what went on, each without what went on within it."""

    def __init__(self) -> None:
        self.seconds, self.imports = Counter[str](), Counter[str]()
        self._open: list[tuple[Counter[str], str]] = [(self.seconds, REST)]
        self._since = time.process_time()
        self._book(time.process_time())

    def _book(self, now: float) -> None:
        counter, name = self._open[-1]
        counter[name] += now - self._since
        self._since = now

    @contextmanager
    def within(self, counter: Counter[str], name: str) -> Iterator[None]:
        """Book the time of a context to a name."""
        self._book(time.process_time())
        self._open.append((counter, name))
        try:
            yield
        finally:
            self._book(time.process_time())
            self._open.pop()

    def watch(self) -> None:
        """Wrap the machinery of imports, and each stage as its module has been imported."""
        bootstrap = sys.modules["_frozen_importlib"]
        find_and_load = bootstrap._find_and_load  # type: ignore[attr-defined]

        def counted(name: str, import_: Callable[..., Any]) -> ModuleType:
            with self.within(self.imports, name.partition(".")[0]):
                module: ModuleType = find_and_load(name, import_)
            self._wrap(module, name)
            return module

        bootstrap._find_and_load = counted  # type: ignore[attr-defined]

    def _wrap(self, module: ModuleType, name: str) -> None:
        for stage, places in STAGES.items():
            for function in places.get(name, ()):
                own = getattr(module, function, None)  # a module may import itself in a circle, half of it there
                if own is not None and not hasattr(own, "__wrapped__"):
                    setattr(module, function, self._counted(own, stage))

    def _counted(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            with self.within(self.seconds, stage):
                return function(*args, **options)

        return call


def account(arguments: list[str], path: Path) -> None:
    """Run a command in this process and write its account."""
    book = Account()
    book.watch()
    from foretune.cli import run

    code = run(arguments)
    with book.within(Counter[str](), ""):
        pass
    total = time.process_time()
    path.write_text(json.dumps({"code": code, "total": total, "stages": book.seconds, "imports": book.imports}))


def measured(arguments: list[str], repeats: int) -> list[dict[str, Any]]:
    """Accounts of a command in fresh processes; the first, which fills the caches of the disk, is left out."""
    found = []
    for _ in range(repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "account.json"
            run = [*arguments, "--output", str(Path(folder) / "run")]
            command = [sys.executable, __file__, "--account", str(output), *run]
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode or json.loads(output.read_text())["code"]:
                sys.exit(done.stderr[-2000:])
            found.append(json.loads(output.read_text()) | {"wall": time.perf_counter() - start})
    return found[1:]


def table(arguments: list[str], accounts: list[dict[str, Any]], packages: int = 8) -> str:
    """The medians as a table in Markdown."""

    def median(part: str, name: str) -> float:
        return statistics.median(one[part].get(name, 0.0) for one in accounts)

    total = statistics.median(one["total"] for one in accounts)
    wall = statistics.median(one["wall"] for one in accounts)
    imports = statistics.median(sum(one["imports"].values()) for one in accounts)
    shares = {stage: median("stages", stage) for stage in [*STAGES, REST]}
    lines = [(f"imports, of {len(accounts[0]['imports'])} packages", imports)]
    by_package = {name: median("imports", name) for one in accounts for name in one["imports"]}
    largest = sorted(by_package, key=lambda name: -by_package[name])[:packages]
    lines += [(f"… {name}", by_package[name]) for name in largest]
    lines += sorted(((stage, seconds) for stage, seconds in shares.items() if seconds), key=lambda line: -line[1])
    under = f"{total:.2f} s of the processor, {wall:.2f} s by the clock, median of {len(accounts)} runs"
    under += f"; load average {os.getloadavg()[0]:.1f}, {os.environ.get('OMP_NUM_THREADS', os.cpu_count())} threads"
    rows = "\n".join(f"| {name} | {seconds:.2f} | {seconds / total:.0%} |" for name, seconds in lines)
    title = f"`foretune {' '.join(arguments)}`: {under}, {time.strftime('%Y-%m-%d')}"
    return f"{title}\n\n| | s | |\n| --- | --- | --- |\n{rows}\n"


def main() -> None:
    """Print the table, and add it to the file of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--account", type=Path, help=argparse.SUPPRESS)
    options, arguments = parser.parse_known_args()
    if options.account:
        account(arguments, options.account)
        return
    arguments = arguments or ["demo"]
    found = table(arguments, measured(arguments, options.repeats))
    print(found)
    if options.results:
        with options.results.open("a") as file:
            file.write(found + "\n")


if __name__ == "__main__":
    main()
