"""Runs that collapsed, and the risk of it, each data set by the others."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from foretune.evaluation.records import Record
from foretune.forecasting.calibration import LEAST_GROUPS
from foretune.forecasting.risk import MARGIN, RateCase, Risk, fit_risk
from foretune.tasks.metrics import main_metric


def baseline_of(record: Record) -> float | None:
    """Main metric of what costs nothing: the better of the simulated head alone and one prediction for all.

    Args:
        record: Cell.

    Returns:
        The metric; None where neither is known.
    """
    metric = main_metric(record.kind).name
    known = [record.facts.get("majority_accuracy"), record.quantities.get(f"head_alone_{metric}")]
    return max((float(value) for value in known if value is not None), default=None)


def rate_cases(records: Sequence[Record]) -> list[RateCase]:
    """Take what the risk of a collapse is fitted on.

    Args:
        records: Cells of one kind of task, those that diverged among them.

    Returns:
        Cells with an adapter whose rate and baseline are known. One has collapsed if it diverged, or if it ended less
        than two points above what costs nothing where a gentler run of the same adapter and seed on the same data, no
        faster and no longer, ended two points or more above that: rate and length are then to blame.
    """
    return list(rates_by_key(records).values())


def rates_by_key(records: Sequence[Record]) -> dict[str, RateCase]:
    """Take what the risk of a collapse is fitted on, cell by cell.

    Args:
        records: Cells of one kind of task, those that diverged among them.

    Returns:
        As `rate_cases`, by the cell's key.
    """
    known = _rated(records)
    learnt: dict[tuple[object, ...], list[tuple[float, float]]] = defaultdict(list)
    for one in known:
        if one.value >= one.baseline + MARGIN:
            learnt[_same(one.record)].append((one.rate, one.steps))
    found = {}
    for one in known:
        gentler = any(rate <= one.rate and steps <= one.steps for rate, steps in learnt[_same(one.record)])
        failed = one.value < one.baseline + MARGIN and gentler
        collapsed = failed or bool(one.record.facts["diverged"])
        found[one.record.key] = RateCase(one.rate, one.steps, collapsed, one.record.family)
    return found


def collapsed_keys(records: Sequence[Record]) -> set[str]:
    """Find the runs that collapsed, which no level is learnt from.

    Args:
        records: Cells of one kind of task.

    Returns:
        Their keys.
    """
    return {key for key, case in rates_by_key(records).items() if case.collapsed}


@dataclass(frozen=True)
class _Rated:
    """A cell whose rate and baseline are known, and its metric."""

    record: Record
    rate: float
    steps: float
    baseline: float
    value: float


def _rated(records: Sequence[Record]) -> list[_Rated]:
    told = [(record, rate_of(record), baseline_of(record)) for record in records]
    return [
        _Rated(record, rate, steps_of(record), baseline, _value(record))
        for record, rate, baseline in told
        if rate is not None and baseline is not None
    ]


def steps_of(record: Record) -> float:
    """Steps of a cell.

    Args:
        record: Cell.

    Returns:
        The steps.
    """
    return float(record.facts["steps"] or 1.0)


def rate_of(record: Record) -> float | None:
    """Mean learning rate times s·r of a cell.

    Args:
        record: Cell.

    Returns:
        The rate; None where it is not known, or nothing was adapted.
    """
    value = record.facts.get("update_rate") or record.quantities.get("run_update_rate")
    return None if value is None else float(value)


def _value(record: Record) -> float:
    """Main metric; nothing is worse than a run that diverged."""
    value = record.outcomes[main_metric(record.kind).name]
    return -inf if record.facts["diverged"] or value is None else float(value)


def _same(record: Record) -> tuple[object, ...]:
    return (*record.kin, record.placement, record.r, record.seed)


def risks_of(records: Sequence[Record]) -> dict[str, Risk | None]:
    """Fit the risk of a collapse for each data set on the others.

    Args:
        records: Cells of one kind of task.

    Returns:
        By family; None where the others are of fewer than 3 data sets, or nothing can be fitted.
    """
    cases = rate_cases(records)
    found = {}
    for family in sorted({record.family for record in records}):
        rest = [case for case in cases if case.group != family]
        found[family] = fit_risk(rest) if len({case.group for case in rest}) >= LEAST_GROUPS else None
    return found
