"""Runs of a study on fewer rows as the trials of its runs on more: same model, data, adapter, recipe and seed."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import isfinite

from foretune.evaluation.records import Record
from foretune.forecasting.outcomes import outcomes_of
from foretune.forecasting.shown import Shown
from foretune.forecasting.with_trials import NESTED
from foretune.study.stored import RECIPE


def trials_of(records: Sequence[Record]) -> dict[str, tuple[tuple[Shown, ...], ...]]:
    """Find the trials of each cell.

    Args:
        records: Cells of one kind of task.

    Returns:
        By the cell's key, for each smaller size the run of that size, with the largest of at most a quarter of its
        rows: as one spend buys nested sizes. Cells whose recipe is not known (tables of earlier versions) have none.
    """
    alike: dict[tuple[object, ...], list[Record]] = defaultdict(list)
    for record in records:
        recipe = [record.facts.get(name) for name in RECIPE]
        if None not in recipe[:2]:
            adapter = (record.placement, record.r, record.seed)
            alike[(*record.kin, *adapter, record.facts["eval_rows"], *recipe)].append(record)
    found: dict[str, tuple[tuple[Shown, ...], ...]] = {}
    for same in alike.values():
        shown = [one for record in same if (one := _shown(record)) is not None]
        for record in same:
            smaller = [one for one in shown if one.rows < _rows(record)]
            found[record.key] = tuple((one, *_nested(one, smaller)) for one in smaller)
    return found


def _nested(one: Shown, smaller: Sequence[Shown]) -> list[Shown]:
    """The largest of at most a quarter of the rows, if there is one: no more than that is looked at."""
    nested = [other for other in smaller if other.rows * NESTED <= one.rows]
    return [max(nested, key=lambda other: other.rows)] if nested else []


def _rows(record: Record) -> int:
    return int(record.facts["train_rows"] or 0)


def _shown(record: Record) -> Shown | None:
    """What a finished cell shows as a trial; None if it did not diverge and yet lacks an outcome."""
    outcomes: Mapping[str, float | None] = {name: record.outcomes[name] for name in outcomes_of(record.kind)}
    diverged = bool(record.facts["diverged"])
    if not diverged and any(value is None or not isfinite(value) for value in outcomes.values()):
        return None
    metric = float(list(outcomes.values())[-1] or 0.0)
    known = {name: float("nan") if value is None else float(value) for name, value in outcomes.items()}
    epochs, rows = int(record.facts["epochs"] or 0), int(record.facts["eval_rows"] or 0)
    return Shown(_rows(record), record.seed, rows, known, metric, epochs, diverged)
