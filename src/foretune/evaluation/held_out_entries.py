"""The held-out forecasts of a study as lines of the ledger."""

from collections.abc import Mapping

from foretune.evaluation.held_out import HeldOutForecasts
from foretune.evaluation.records import Record
from foretune.forecasting.calibration import Interval
from foretune.ledger.entries import Entry, Told
from foretune.ledger.judgement import digest
from foretune.study.stored import DIGITS
from foretune.tasks.metrics import main_metric

Levels = Mapping[str, Interval]


def held_out_entries(held_out: HeldOutForecasts, made: str) -> tuple[Entry, ...]:
    """Lay out the forecasts of a study beside what its runs gave.

    The runs were there before these forecasts; what makes them ones is that the calibration has seen no run of the
    data set. So their hash does not cover the time, and the same forecast of the same cell has the same.

    Args:
        held_out: Forecasts of a study.
        made: When they were made, ISO 8601 in UTC.

    Returns:
        A line for each cell with a forecast; `withheld` where there is no level.
    """
    return tuple(
        _entry(record, held_out.forecasts[record.key], made)
        for record in held_out.records
        if record.key in held_out.forecasts
    )


def _entry(record: Record, levels: Levels, made: str) -> Entry:
    metric, rows = main_metric(record.kind).name, record.facts["train_rows"]
    known = record.quantities.get("run_known_rows")
    said = {
        "cell": record.key,
        "calibration": f"all but {record.family}",
        "levels": {name: [_rounded(value) for value in vars(level).values()] for name, level in levels.items()},
    }
    return Entry(
        made=made,
        began="",
        ended="",
        command="study",
        model=record.model,
        dataset=record.dataset,
        task=record.kind,
        adapter=f"{record.placement}, r = {record.r}, seed {record.seed}",
        rows=None if rows is None else int(rows),
        known_rows=None if known is None else int(known),
        spend=None,
        metric=metric,
        main=_told(levels.get(metric), record.outcomes[metric]),
        eval_loss=_told(levels.get("eval_loss"), None if record.facts["diverged"] else record.outcomes["eval_loss"]),
        hash=digest(said),
        run=record.key,
        state="held out" if metric in levels and "eval_loss" in levels else "withheld",
    )


def _told(level: Interval | None, real: float | None) -> Told:
    outcome = None if real is None else float(real)
    if level is None:
        return Told(real=outcome)
    return Told(float(level.value), float(level.low), float(level.high), outcome)


def _rounded(value: float) -> str:
    """The last digits hang on the number of threads."""
    return f"{value:.{DIGITS}g}"
