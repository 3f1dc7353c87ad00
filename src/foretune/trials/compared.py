"""Rows whose run nothing simulates: tried early, and ordered by how their trials compare with those of other rows."""

from collections.abc import Sequence
from dataclasses import replace
from math import fsum, isfinite

from foretune.forecasting.calibration import RunForecast
from foretune.forecasting.outcomes import Outcome, scale, unscale
from foretune.ranking.rows import Row


def to_try(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Bring rows into the order that trials are made in.

    Args:
        rows: Rows of a ranking, the best first.

    Returns:
        The best; of each method without simulated runs the placement with the best quick score, under the recipe of the
        best; then all others as they come.
    """
    best, methods = rows[0], set[str]()
    early = [best]
    for row in rows[1:]:  # those without a simulated run stand last, the best quick score of a method first
        known = row.simulated is not None or row.quick.method in methods or row.recipe != best.recipe
        if not known:
            methods.add(row.quick.method)
            early.append(row)
    taken = {id(row) for row in early}
    return (*early, *(row for row in rows if id(row) not in taken))


def by_comparison(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Give rows without a simulated run the order that their trials tell.

    On the scale of `foretune.forecasting.outcomes`, with y the outcome of the largest trial of such a row, and p_i and
    y_i the forecast and the outcome of the k rows with a simulated run and a trial on as many rows,

        p = y + (1/k) Σ_i (p_i − y_i).

    Where no other row was tried on as many, p = y: the outcome of a smaller run, rather too low.

    Args:
        rows: Rows with their trials.

    Returns:
        The same rows; those that have a simulated run or no trial as they are.
    """
    return tuple(row if row.simulated is not None or not row.trials else _compared(row, rows) for row in rows)


def _compared(row: Row, rows: Sequence[Row]) -> Row:
    said, trial = row.said, row.trials[-1]
    others = [
        (other.said, of_same["outcomes"])
        for other in rows
        if other.simulated is not None and other.collapsed is None
        for of_same in other.trials
        if of_same["rows"] == trial["rows"]
    ]

    def place(outcome: Outcome, at: int) -> float:
        value = scale(outcome, trial["outcomes"][outcome], said.kind)
        gaps = [
            scale(outcome, of_other.order[at], said.kind) - scale(outcome, shown[outcome], said.kind)
            for of_other, shown in others
        ]
        known = [gap for gap in gaps if isfinite(gap)]
        moved = value + (fsum(known) / len(known) if known else 0.0)
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
