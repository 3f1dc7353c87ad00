"""Rows whose run nothing simulates: tried early, and ordered by how their trials compare with those of other rows."""

from collections.abc import Sequence
from dataclasses import replace
from math import fsum, isfinite, log
from typing import Protocol, TypeVar

from foretune.forecasting.calibration import RunForecast
from foretune.forecasting.outcomes import Outcome, scale, unscale
from foretune.ranking.finalists import Quick
from foretune.ranking.rows import Row
from foretune.settings.groups import Recipe


class AnyRow(Protocol):
    """A row of a ranking, of a classifier's or a language model's."""

    @property
    def quick(self) -> Quick:
        """Candidate."""

    @property
    def recipe(self) -> Recipe:
        """How its run trains."""

    @property
    def simulated(self) -> object | None:
        """Its simulated run, None where there is none."""


SomeRow = TypeVar("SomeRow", bound=AnyRow)


def to_try(rows: Sequence[SomeRow]) -> tuple[SomeRow, ...]:
    """Bring rows into the order that trials are made in.

    Args:
        rows: Rows of a ranking, the best first.

    Returns:
        The best; of each method without simulated runs the placement with the best quick score, under the recipe of the
        best; then all others as they come.
    """
    best = rows[0]
    early, methods = [best], {best.quick.method} if best.simulated is None else set[str]()
    for row in rows[1:]:  # those without a simulated run stand last, the best quick score of a method first
        known = row.simulated is not None or row.quick.method in methods or row.recipe != best.recipe
        if not known:
            methods.add(row.quick.method)
            early.append(row)
    taken = {id(row) for row in early}
    return (*early, *(row for row in rows if id(row) not in taken))


def compared_early(rows: Sequence[AnyRow]) -> tuple[int, ...]:
    """Say which rows have a small trial each before any has a large one.

    Args:
        rows: Rows, from `to_try`.

    Returns:
        Positions: of the first row with a simulated run, which the others are compared with, and of the first of each
        method without simulated runs; none where all are simulated.
    """
    unknown: dict[str, int] = {}
    for position, row in enumerate(rows):
        if row.simulated is None:
            unknown.setdefault(row.quick.method, position)
    known = next((position for position, row in enumerate(rows) if row.simulated is not None), None)
    first = () if known is None else (known,)
    return tuple(sorted({*first, *unknown.values()})) if unknown else ()


def by_comparison(rows: Sequence[Row], run_rows: int) -> tuple[Row, ...]:
    """Give rows without a simulated run the order that their trials tell.

    On the scale of `foretune.forecasting.outcomes`, with y the outcome of the largest trial of such a row, on n' of the
    N rows of the run, and p_i and y_i the forecast and the outcome of the k rows that have a simulated run, did not
    collapse, and have a trial on n ≤ n' rows, the largest such n,

        p = y + log(N / n') / log(N / n) · (1/k) Σ_i (p_i − y_i).

    That is what other rows still gain from n rows on; where n < n', as if it were gained evenly with the logarithm of
    the rows. Where no other row was tried on as many or fewer, p = y: the outcome of a smaller run, rather too low.

    Args:
        rows: Rows with their trials.
        run_rows: Training rows N of the run.

    Returns:
        The same rows; those that have a simulated run or no trial as they are.
    """
    return tuple(row if row.simulated is not None or not row.trials else _compared(row, rows, run_rows) for row in rows)


def _compared(row: Row, rows: Sequence[Row], run_rows: int) -> Row:
    said, trial = row.said, row.trials[-1]
    known = [
        (other.said, of_other)
        for other in rows
        if other.simulated is not None and other.collapsed is None
        for of_other in other.trials
        if of_other["rows"] <= trial["rows"]
    ]
    n = max((of_other["rows"] for _, of_other in known), default=trial["rows"])
    share = 1.0 if n == trial["rows"] else log(run_rows / trial["rows"]) / log(run_rows / n)

    def place(outcome: Outcome, at: int) -> float:
        value = scale(outcome, trial["outcomes"][outcome], said.kind)
        gaps = [
            scale(outcome, of_run.order[at], said.kind) - scale(outcome, of_other["outcomes"][outcome], said.kind)
            for of_run, of_other in known
            if of_other["rows"] == n
        ]
        finite = [gap for gap in gaps if isfinite(gap)]
        moved = value + (share * fsum(finite) / len(finite) if finite else 0.0)
        return unscale(outcome, moved) if isfinite(moved) else moved

    order = place(said.metric.name, 0), place("eval_loss", 1)
    return replace(row, said=replace(said, order=order))


def without_level(said: RunForecast, row: Row) -> RunForecast:
    """Withhold the levels of a row that is not LoRA: no calibration has seen such runs.

    Args:
        said: Forecast by the calibration of LoRA's runs, trials among what it goes by.
        row: Its row.

    Returns:
        The forecast as it is of LoRA; else its order, with the reach that the row had.
    """
    return said if row.quick.config is None else replace(said, levels=None, reach=row.said.reach)
