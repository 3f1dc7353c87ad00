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
        Cells with an adapter whose rate and baseline are known. One has collapsed if it diverged, if it ended two
        points or more below what costs nothing, or if it ended less than two points above that where the same adapter
        on the same rows ended two points or more above it at a smaller rate: the rate is then to blame.
    """
    return list(rates_by_key(records).values())


def rates_by_key(records: Sequence[Record]) -> dict[str, RateCase]:
    """Take what the risk of a collapse is fitted on, cell by cell.

    Args:
        records: Cells of one kind of task, those that diverged among them.

    Returns:
        As `rate_cases`, by the cell's key.
    """
    return {
        one.record.key: RateCase(one.rate, one.value <= one.baseline - MARGIN or one.to_blame, one.record.family)
        for one in _rated(records)
    }


def blamed_on_rate(records: Sequence[Record]) -> set[str]:
    """Find the runs that collapsed because of their rate, which no level is learnt from.

    Args:
        records: Cells of one kind of task.

    Returns:
        Keys of those that diverged, or ended less than two points above what costs nothing where the same adapter on
        the same rows ended two points or more above them at a smaller rate.
    """
    return {one.record.key for one in _rated(records) if one.to_blame or one.record.facts["diverged"]}


@dataclass(frozen=True)
class _Rated:
    """A cell whose rate and baseline are known, its metric and the best one at a smaller rate."""

    record: Record
    rate: float
    baseline: float
    value: float
    slower: float

    @property
    def to_blame(self) -> bool:
        """Whether the rate is to blame for a run that learnt nothing."""
        return self.value < self.baseline + MARGIN and self.slower >= self.value + MARGIN


def _rated(records: Sequence[Record]) -> list[_Rated]:
    slower: dict[tuple[object, ...], list[tuple[float, float]]] = defaultdict(list)
    told = [(record, rate_of(record), baseline_of(record)) for record in records]
    known = [(record, rate, baseline) for record, rate, baseline in told if rate is not None and baseline is not None]
    for record, rate, _ in known:
        slower[_same(record)].append((rate, _value(record)))
    return [
        _Rated(
            record,
            rate,
            baseline,
            _value(record),
            max((other for at, other in slower[_same(record)] if at < rate), default=-inf),
        )
        for record, rate, baseline in known
    ]


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
    facts = record.facts
    return (*record.kin, record.placement, record.r, record.seed, facts["train_rows"], facts.get("epochs"))


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
