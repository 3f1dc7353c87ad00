"""Fit the calibration of language models and judge it: `python studies/smollm2/table.py RESULTS [CALIBRATION]`.

RESULTS is what collect.py wrote. Prints Markdown; every data set by a fit on the others. With CALIBRATION the fit on
all is written there.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import ceil, nan
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest, spearmanr

from foretune.forecasting.reach import Run
from foretune.forecasting.schedule import Schedule
from foretune.forecasting.sequence_calibration import SequenceCase, apply_sequence_calibration
from foretune.forecasting.sequence_fit import FinishedSequence, fit_sequences
from foretune.report.store import write_json
from foretune.settings.groups import FEWEST_ROWS

MODEL = "4be92a9aa8e36"  # fingerprint of SmolLM2-135M-Instruct, read from its GGUF file
RANKS = {"all-r4": 4, "all-r32": 32}
ANSWERS = ("trec-kind", "sst2-mood")
STRATA: tuple[tuple[str, bool, int, tuple[float, ...] | None, int | None], ...] = (
    ("texts, N = n, 1e-4 and 3e-4", False, 64, (1e-4, 3e-4), None),
    ("texts, N = n, 1e-3", False, 64, (1e-3,), None),
    ("texts, N = n, 3e-3", False, 64, (3e-3,), None),
    ("texts, N = 4 n", False, 256, None, None),
    ("texts, N = 4 n, a trial on 25 %", False, 256, None, 64),
    ("answers, N = n", True, 64, None, None),
    ("answers, N = 4 n", True, 256, None, None),
    ("answers, N = 4 n, a trial on 25 %", True, 256, None, 64),
)


def key(one: dict[str, Any], rows: int | None = None) -> tuple[str, int, str, float]:
    """Name a cell."""
    return one["set"], one["rows"] if rows is None else rows, one["adapter"], one["rate"]


def read(results: Path, name: str) -> dict[tuple[str, int, str, float], dict[str, Any]]:
    """Forecasts or runs by cell."""
    lines = (results / name).read_text().splitlines()
    return {key(one): one for one in map(json.loads, lines)}


def run_of(cell: tuple[str, int, str, float], known: int) -> Run:
    """What kind of run a cell is."""
    name, rows, adapter, rate = cell
    mean = float(Schedule(rows, 3, 8, rate).rates().mean())
    return Run(
        model=MODEL,
        hidden_head=False,
        classes=1,
        known_rows=min(known, rows),
        train_rows=rows,
        eval_rows=32,
        longest=64 if name in ANSWERS else 32,
        epochs=3,
        steps=3 * ceil(rows / 8),
        batch_size=8,
        learning_rate=mean,
        update_rate=mean * 2 * RANKS.get(adapter, 8),
        kind="causal-lm",
    )


def finished(forecasts: dict[Any, Any], runs: dict[Any, Any]) -> list[tuple[FinishedSequence, tuple[Any, ...]]]:
    """Every run that was forecast, without and with each trial of it, beside its cell."""
    found = []
    for cell, one in runs.items():
        name, rows, adapter, rate = cell
        said = next((forecasts[at] for at in ((name, 64, adapter, rate),) if at in forecasts), None)
        if said is None or rows < 64:
            continue
        losses, loss = said["eval_loss"], one["epochs"][-1]["eval_loss"]
        case = SequenceCase(losses[0], losses[1], losses[-1], said["linear"], 64, rows)
        run = run_of(cell, 64)
        found.append((FinishedSequence(case, run, loss, name), cell))
        for small in (12, 64):
            trial = runs.get((name, small, adapter, rate))
            if small < rows and trial is not None:
                tried = replace(case, trial=(small, trial["epochs"][-1]["eval_loss"]))
                found.append((FinishedSequence(tried, run, loss, name), cell))
    return found


def counts(one: FinishedSequence) -> bool:
    """Whether the fit takes it: foretune makes no trials as small as those on 12 rows, which have six steps."""
    return one.case.trial is None or one.case.trial[0] >= FEWEST_ROWS


def share(held: Sequence[bool]) -> str:
    """A share with its 95 % interval."""
    ends = binomtest(sum(held), len(held)).proportion_ci(method="wilson")
    return f"{100 * np.mean(held):.0f}% [{100 * ends.low:.0f}, {100 * ends.high:.0f}]"


def levels(entries: Sequence[tuple[FinishedSequence, Any]]) -> list[str]:
    """Errors and intervals by what was known, each data set by a fit on the others."""
    told = []
    for group in sorted({one.group for one, _ in entries}):
        fit = fit_sequences([one for one, _ in entries if one.group != group and counts(one)], "others")
        for one, cell in entries:
            if one.group != group:
                continue
            said = apply_sequence_calibration(fit, one.case, one.run).levels
            level = None if said is None else said["eval_loss"]
            told.append((one, cell, level))
    header = ("known before", "runs", "sets", "error, nats", "relative", "bias", "as simulated", "in interval", "width")
    lines = [row_of(*header, "of the change"), row_of("---", *(["---:"] * len(header)))]
    for words, answers, rows, rates, trial in STRATA:
        some = [
            (one, level)
            for one, cell, level in told
            if (cell[0] in ANSWERS) == answers
            and cell[1] == rows
            and (rates is None or cell[3] in rates)
            and (one.case.trial[0] if one.case.trial else None) == trial
            and level is not None
        ]
        if some:
            lines.append(row_of(words, *judged(some)))
    return lines


def judged(some: Sequence[tuple[FinishedSequence, Any]]) -> list[str]:
    """Errors and intervals of forecasts with a level."""
    errors = np.array([level.value - one.loss for one, level in some])
    real = np.array([one.loss for one, _ in some])
    raw = np.array([one.case.end - one.loss for one, _ in some])
    change = np.array([abs(one.case.base - one.loss) for one, _ in some])
    return [
        str(len(some)),
        str(len({one.group for one, _ in some})),
        f"{np.abs(errors).mean():.3f}",
        f"{100 * np.abs(errors / real).mean():.1f}%",
        f"{errors.mean():+.3f}",
        f"{np.abs(raw).mean():.3f}",
        share([level.low <= one.loss <= level.high for one, level in some]),
        f"{np.mean([level.high - level.low for _, level in some]):.2f}",
        f"{100 * np.abs(errors).mean() / change.mean():.0f}%",
    ]


def row_of(*cells: str) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def orders(
    forecasts: dict[Any, Any], runs: dict[Any, Any], entries: Sequence[tuple[FinishedSequence, Any]]
) -> list[str]:
    """Order within a data set: of all cells on 64 rows, and of the adapters at one rate."""
    header = (
        "forecast",
        "as simulated",
        "linearised",
        "size",
        "gradient norm",
        "PLoP",
        "first epoch",
        "lost, nats",
        "by size",
    )
    lines = [
        row_of("set, rate", "cells", *header, "by first epoch"),
        row_of("---", "---:", *(["---:"] * len(header)), "---:"),
    ]
    for name in dict.fromkeys(cell[0] for cell in forecasts):
        line = fit_sequences([one for one, _ in entries if one.group != name and counts(one)], "others").plain
        level = {cell: line.value(one.case) for one, cell in entries if one.case.trial is None}
        for rate in (3e-4, 1e-3, None):
            cells = [at for at in forecasts if at[0] == name and at[1] == 64 and rate in (None, at[3]) and at in runs]
            if len(cells) < 5:
                continue
            real = np.array([runs[at]["epochs"][-1]["eval_loss"] for at in cells])
            by = {
                "forecast": [level[at] for at in cells],
                "simulated": [forecasts[at]["eval_loss"][-1] for at in cells],
                "linearised": [forecasts[at]["linear"] for at in cells],
                "size": [-forecasts[at]["parameters"] for at in cells],
                "gradient": [-forecasts[at]["gradient_norm"] for at in cells],
                "plop": [forecasts[at]["plop"] for at in cells],
                "first": [runs[at]["epochs"][1]["eval_loss"] for at in cells],
            }
            rho = [spearmanr(value, real).statistic if len(set(value)) > 1 else nan for value in by.values()]
            chosen = [np.array(by[name]) for name in ("forecast", "size", "first")]
            lost = [real[np.flatnonzero(value == value.min())].mean() - real.min() for value in chosen]
            which = name if rate is None else f"{name}, {rate:g}"
            cells_of = [f"{value:+.2f}" for value in rho] + [f"{value:.3f}" for value in lost]
            lines.append(row_of(which, str(len(cells)), *cells_of))
    return lines


def practice(runs: dict[Any, Any]) -> list[str]:
    """What the runs say of the practice of the day, as differences of losses on 64 rows."""

    def loss(name: str, adapter: str, rate: float, rows: int = 64) -> float:
        one = runs.get((name, rows, adapter, rate))
        return nan if one is None else one["epochs"][-1]["eval_loss"]

    names = list(dict.fromkeys(cell[0] for cell in runs))
    header = ("attention − all, 3e-4", "feed-forward − all, 3e-4", "low − high, 3e-4", "r 4 − r 32, 3e-4")
    header += ("3e-4 − 1e-3, all",)
    lines = [row_of("set", *header), row_of("---", *(["---:"] * len(header)))]
    for name in names:
        values = [
            loss(name, "attention", 3e-4) - loss(name, "all", 3e-4),
            loss(name, "feed-forward", 3e-4) - loss(name, "all", 3e-4),
            loss(name, "low", 3e-4) - loss(name, "high", 3e-4),
            loss(name, "all-r4", 3e-4) - loss(name, "all-r32", 3e-4),
            loss(name, "all", 3e-4) - loss(name, "all", 1e-3),
        ]
        lines.append(row_of(name, *("–" if value != value else f"{value:+.3f}" for value in values)))
    return lines


def every(forecasts: dict[Any, Any], runs: dict[Any, Any]) -> Iterable[str]:
    """Every run."""
    yield "| set | rows | adapter | rate | before | simulated | at a third | linearised | run | error | first epoch |"
    yield "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for cell, one in runs.items():
        said, ends = forecasts.get((cell[0], 64, *cell[2:])), [epoch["eval_loss"] for epoch in one["epochs"]]
        if said is None:
            continue
        losses = said["eval_loss"]
        error = f"{losses[-1] - ends[-1]:+.3f}" if cell[1] == 64 else ""
        yield (
            f"| {cell[0]} | {cell[1]} | {cell[2]} | {cell[3]:g} | {ends[0]:.3f} | {losses[-1]:.3f} | {losses[1]:.3f} | "
            f"{said['linear']:.3f} | {ends[-1]:.3f} | {error} | {ends[1]:.3f} |"
        )


def main(results: Path, to: Path | None) -> None:
    """Print the tables."""
    forecasts, runs = read(results, "forecasts.jsonl"), read(results, "runs.jsonl")
    entries = finished(forecasts, runs)
    calibration = fit_sequences([one for one, _ in entries if counts(one)], "smollm2")
    print(calibration.plain, calibration.tried, calibration.domain, calibration.trial_domain, sep="\n\n")
    if to is not None:
        write_json(to, calibration.to_dict())
    for table in (levels(entries), orders(forecasts, runs, entries), practice(runs), every(forecasts, runs)):
        print("", *table, sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
