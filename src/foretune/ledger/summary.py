"""How past forecasts did: error, bias, how often the intervals held, and what was left out of that and why."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from foretune.ledger.entries import COUNTED, Entry, State, Told

LEVEL = 0.95  # of the interval of a share
AGAIN = "made again"


@dataclass(frozen=True)
class Accuracy:
    """How good the forecasts of one outcome were.

    Attributes:
        known: Runs that gave a finite number; error, bias and width are means over these.
        error: Mean of |forecast − real|, of a metric in its unit (shares as fractions), of a loss divided by the real.
        bias: Mean of forecast − real, likewise.
        width: Mean of the width of the 90% intervals, likewise.
        inside: Runs whose outcome lies within its 90% interval; one that is not finite does not.
        covered: `inside` as a share of all runs.
        low: Lower end of the 95% interval of that share (Wilson).
        high: Upper end.
    """

    known: int
    error: float | None
    bias: float | None
    width: float | None
    inside: int
    covered: float
    low: float
    high: float


@dataclass(frozen=True)
class Group:
    """Forecasts that are counted together.

    Attributes:
        state: `ok` or `held out`.
        model: Model; None for all.
        dataset: Data set; None for all.
        metric: Name of the main metric.
        runs: Runs.
        main: Forecasts of the main metric.
        eval_loss: Forecasts of the evaluation loss.
    """

    state: State
    model: str | None
    dataset: str | None
    metric: str
    runs: int
    main: Accuracy
    eval_loss: Accuracy


@dataclass(frozen=True)
class LedgerSummary:
    """How past forecasts did.

    Attributes:
        groups: By state, model, data set and metric.
        totals: All models and data sets together, by state and metric.
        left_out: Lines that do not count, by their state; `made again` for other forecasts of a run that counts once.
    """

    groups: tuple[Group, ...]
    totals: tuple[Group, ...]
    left_out: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Lay out as JSON.

        Returns:
            JSON-ready values.
        """
        return {
            "groups": [asdict(group) for group in self.groups],
            "all": [asdict(group) for group in self.totals],
            "left_out": dict(self.left_out),
        }


def summarise_ledger(entries: Sequence[Entry]) -> LedgerSummary:
    """Sum up a ledger.

    Lines `ok` and `held out` count, apart from each other; each run once. Of a run that was forecast and made several
    times the first line counts, since its outcome was known from then on; of a study's cell the last, by the
    calibration that has seen most.

    Args:
        entries: From `read_ledger`.

    Returns:
        The summary.
    """
    counted: dict[tuple[State, str], Entry] = {}
    left_out: Counter[str] = Counter(entry.state for entry in entries if entry.state not in COUNTED)
    for entry in entries:
        if entry.state not in COUNTED:
            continue
        name = (entry.state, entry.run)
        left_out[AGAIN] += name in counted
        if name not in counted or entry.state == "held out":
            counted[name] = entry
    lines = list(counted.values())
    groups = _grouped(lines, lambda entry: (entry.model, entry.dataset))
    return LedgerSummary(groups, _grouped(lines, lambda _: (None, None)), +left_out)


def _grouped(entries: Sequence[Entry], names: Callable[[Entry], tuple[str | None, str | None]]) -> tuple[Group, ...]:
    parts: dict[tuple[State, str | None, str | None, str], list[Entry]] = {}
    for entry in entries:
        parts.setdefault((entry.state, *names(entry), entry.metric), []).append(entry)
    ordered = sorted(parts, key=lambda part: (COUNTED.index(part[0]), part[1] or "", part[2] or "", part[3]))
    return tuple(
        Group(
            *part,
            runs=len(parts[part]),
            main=_accuracy([entry.main for entry in parts[part]], relative=False),
            eval_loss=_accuracy([entry.eval_loss for entry in parts[part]], relative=True),
        )
        for part in ordered
    )


def _accuracy(told: Sequence[Told], *, relative: bool) -> Accuracy:
    from scipy.stats import binomtest

    usable = [one for one in told if one.real is not None and (one.real > 0 or not relative)]
    rows = np.array([(one.forecast, one.low, one.high, one.real) for one in usable], dtype=np.float64).reshape(-1, 4)
    value, low, high, real = rows.T
    unit = real if relative else np.ones_like(real)
    errors, widths = (value - real) / unit, (high - low) / unit
    inside = int(sum(_holds(one) for one in told))
    share = binomtest(inside, len(told)).proportion_ci(LEVEL, method="wilson")
    return Accuracy(
        known=len(usable),
        error=_mean(np.abs(errors)),
        bias=_mean(errors),
        width=_mean(widths),
        inside=inside,
        covered=inside / len(told),
        low=float(share.low),
        high=float(share.high),
    )


def _holds(told: Told) -> bool:
    low, high, real = told.low, told.high, told.real
    return low is not None and high is not None and real is not None and low <= real <= high


def _mean(values: np.ndarray[Any, np.dtype[np.float64]]) -> float | None:
    return float(values.mean()) if len(values) else None
