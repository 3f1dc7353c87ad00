"""One line of the ledger: a forecast, what it was of, and the outcome of the run."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isfinite
from typing import Literal, get_args

from foretune.report.texts import for_spreadsheet, from_spreadsheet, printable
from foretune.tasks.metrics import METRIC_NAMES, Metric, metric_named

State = Literal["ok", "held out", "altered", "late", "other run", "withheld"]
STATES: tuple[State, ...] = get_args(State)
# What counts: forecasts of this user's runs made before them, and those that a study made of its own with the data set
# left out. They are never counted together.
COUNTED: tuple[State, ...] = ("ok", "held out")
_ENDS = ("forecast", "low", "high", "real")
_LOSS = "eval_loss_"


@dataclass(frozen=True)
class Told:
    """One outcome as it was forecast and as it came.

    Attributes:
        forecast: Forecast; None where it was withheld.
        low: 5% quantile.
        high: 95% quantile.
        real: What the run gave; None where that is not finite.
    """

    forecast: float | None = None
    low: float | None = None
    high: float | None = None
    real: float | None = None


@dataclass(frozen=True)
class Entry:
    """A line of the ledger. Texts are kept as they can be printed.

    Attributes:
        made: When the forecast was made, ISO 8601 in UTC.
        began: When the run began; empty where that is not known.
        ended: When it ended; empty where that is not known.
        command: `tune` or `study`.
        model: Model.
        dataset: Data set.
        task: Kind of task.
        adapter: The adapter in words.
        rows: Training rows N of the run.
        known_rows: Rows n that were known to the forecast.
        spend: Share of the run's cost that the forecast took for trials; None where it says nothing of it.
        metric: Name of the task's main metric.
        main: The main metric, shares as fractions.
        eval_loss: Evaluation loss, in the unit of the task's loss.
        hash: Of the forecast (`forecasting.seal`).
        run: Names the run by its content: model, data, adapter and recipe.
        state: `ok` or `held out`, or why the line does not count.
        why: What differs, of a forecast of another run.
    """

    made: str
    began: str
    ended: str
    command: str
    model: str
    dataset: str
    task: str
    adapter: str
    rows: int | None
    known_rows: int | None
    spend: float | None
    metric: str
    main: Told
    eval_loss: Told
    hash: str
    run: str
    state: State
    why: str = ""

    def __post_init__(self) -> None:
        """Write out in every text what a terminal would obey, line breaks among it."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str):
                object.__setattr__(self, field.name, printable(value))

    @property
    def key(self) -> tuple[str, str]:
        """Forecast and run: no two lines of a ledger have the same."""
        return self.hash, self.run

    @property
    def measure(self) -> Metric:
        """The main metric."""
        return metric_named(self.metric)


_TEXTS = ("made", "began", "ended", "command", "model", "dataset", "task", "adapter")
COLUMNS = (
    *_TEXTS,
    "rows",
    "known_rows",
    "spend",
    "metric",
    *_ENDS,
    *(f"{_LOSS}{name}" for name in _ENDS),
    "hash",
    "run",
    "state",
    "why",
)


def cells_of(entry: Entry) -> dict[str, str]:
    """Lay an entry out.

    Args:
        entry: Entry.

    Returns:
        Cells by column, each of one line.
    """
    values: dict[str, object] = {name: getattr(entry, name) for name in COLUMNS if hasattr(entry, name)}
    values |= {name: getattr(entry.main, name) for name in _ENDS}
    values |= {f"{_LOSS}{name}": getattr(entry.eval_loss, name) for name in _ENDS}
    return {name: for_spreadsheet(_written(values[name])) for name in COLUMNS}


def entry_from(cells: Mapping[str, str]) -> Entry:
    """Undo `cells_of`.

    Args:
        cells: Cells by column.

    Returns:
        The entry.

    Raises:
        ValueError: If a cell holds what no line of a ledger does.
    """
    plain = {name: from_spreadsheet(cells[name]) for name in COLUMNS}
    state = next((state for state in STATES if state == plain["state"]), None)
    if state is None:
        raise ValueError(f"state is {plain['state']!r}")
    if plain["metric"] not in METRIC_NAMES:
        raise ValueError(f"metric is {plain['metric']!r}")
    main, loss = (Told(*(_number(plain[f"{prefix}{name}"]) for name in _ENDS)) for prefix in ("", _LOSS))
    if state in COUNTED and None in (main.forecast, main.low, main.high, loss.forecast, loss.low, loss.high):
        raise ValueError("a forecast lacks a number")
    return Entry(
        **{name: plain[name] for name in (*_TEXTS, "metric", "hash", "run", "why")},
        rows=_count(plain["rows"]),
        known_rows=_count(plain["known_rows"]),
        spend=_number(plain["spend"]),
        main=main,
        eval_loss=loss,
        state=state,
    )


def _written(value: object) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _number(cell: str) -> float | None:
    value = float(cell) if cell else None
    if value is not None and not isfinite(value):
        raise ValueError(f"{cell} is not finite")
    return value


def _count(cell: str) -> int | None:
    return int(cell) if cell else None
