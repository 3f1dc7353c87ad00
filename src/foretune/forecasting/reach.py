"""How far a forecast reaches: what its calibration has seen, and what becomes of an interval outside of that.

An interval is a promise, and it was checked on certain runs alone. For each number of a run that lies outside what was
seen, the distance is the number of doublings (or halvings) to the nearest that was. With d their sum,

    half-width = (half-width inside) · 2^d    for d ≤ 1,    no interval and no level for d > 1:

what was checked on one size is twice as uncertain at twice that size, and beyond that nothing is promised. A head with
a hidden layer and another model have no such distance: unless the calibration has seen them, the level is withheld.
The order of candidates does not hang on this, and stays.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import exp2, inf, log2
from typing import get_args

from foretune.errors import ConfigError
from foretune.settings.groups import TaskKind

FARTHEST = 1.0  # doublings in all
ROUNDING = 0.05  # doublings that do not count: a last batch that is not full makes a step more


@dataclass(frozen=True)
class Run:
    """What a forecast is for, as far as it may lie outside what a calibration has seen.

    Attributes:
        model: Fingerprint of the pretrained weights (`foretune.models.identity`).
        hidden_head: Whether the classifier's head has a hidden layer.
        classes: Classes C, or outputs of another kind of task.
        known_rows: Labelled training rows n that are known.
        train_rows: Training rows N of the run.
        eval_rows: Labelled rows that the simulated run is evaluated on.
        longest: Tokens of the longest known text, as it is truncated.
        epochs: Passes over the training rows.
        steps: Optimiser steps.
        batch_size: Texts in a step.
        learning_rate: Mean learning rate over the steps: that of the head.
        update_rate: Mean learning rate times s·r, at which s·BA moves under AdamW: α times the rate, whatever the rank.
            None without an adapter.
        kind: Kind of task.
    """

    model: str
    hidden_head: bool
    classes: int
    known_rows: int
    train_rows: int
    eval_rows: int
    longest: int
    epochs: int
    steps: int
    batch_size: int
    learning_rate: float
    update_rate: float | None
    kind: TaskKind = "classification"

    @property
    def rows_ratio(self) -> float:
        """N / n."""
        return self.train_rows / self.known_rows


NUMBERS = tuple(field.name for field in fields(Run) if field.name != "kind")
RUN = tuple(f"run_{name}" for name in NUMBERS)  # their names among the numbers of a study's cell
KINDS: tuple[TaskKind, ...] = get_args(TaskKind)
NOUNS: dict[TaskKind, str] = {
    "classification": "classes",
    "regression": "outputs",
    "multi-label": "labels",
    "causal-lm": "losses",
    "seq2seq": "losses",
}
Span = tuple[float, float]


def run_values(run: Run) -> dict[str, float | None]:
    """Lay a run out as numbers, the fingerprint's 52 bits among them.

    Args:
        run: Run.

    Returns:
        Numbers by the names of `RUN`; `run_kind`, the position of the kind in `KINDS`, where it is no classification.
    """
    values = vars(run) | {"model": int(run.model, 16), "hidden_head": int(run.hidden_head)}
    kind = values.pop("kind")
    numbers = {f"run_{name}": value for name, value in values.items()}
    return numbers if kind == KINDS[0] else {**numbers, "run_kind": KINDS.index(kind)}


def run_from(values: Mapping[str, float | None]) -> Run | None:
    """Undo `run_values`.

    Args:
        values: Numbers by name, others among them.

    Returns:
        The run; None where a number lacks.
    """
    known = {name: values.get(f"run_{name}") for name in NUMBERS}
    if any(value is None for value in known.values()):
        return None
    number = {name: float(value or 0.0) for name, value in known.items()}
    return Run(
        model=f"{int(number['model']):013x}",
        hidden_head=bool(number["hidden_head"]),
        classes=int(number["classes"]),
        known_rows=int(number["known_rows"]),
        train_rows=int(number["train_rows"]),
        eval_rows=int(number["eval_rows"]),
        longest=int(number["longest"]),
        epochs=int(number["epochs"]),
        steps=int(number["steps"]),
        batch_size=int(number["batch_size"]),
        learning_rate=number["learning_rate"],
        update_rate=number["update_rate"],
        kind=KINDS[int(values.get("run_kind") or 0)],
    )


@dataclass(frozen=True)
class Domain:
    """What a calibration has seen, from the least to the most.

    Attributes:
        models: Fingerprints of the models.
        hidden_head: Whether heads with a hidden layer were among them.
        classes: Classes, as far as the left-out intervals held.
        known_rows: Known rows.
        rows_ratio: Training rows over known rows, as far as the left-out intervals held.
        eval_rows: Rows that the simulated runs were evaluated on, on average.
        longest: Tokens of the longest text.
        epochs: Epochs.
        steps: Steps.
        batch_size: Texts in a step.
        learning_rate: Mean learning rate.
        update_rate: Mean learning rate times s·r.
        kind: Kind of task; all runs are of one.
    """

    models: tuple[str, ...]
    hidden_head: bool
    classes: Span
    known_rows: Span
    rows_ratio: Span
    eval_rows: float
    longest: Span
    epochs: Span
    steps: Span
    batch_size: Span
    learning_rate: Span
    update_rate: Span
    kind: TaskKind = "classification"

    def check(self) -> None:
        """Refuse spans that are none.

        Raises:
            ConfigError: Naming the first.
        """
        for name, value in vars(self).items():
            if isinstance(value, tuple) and name != "models" and not 0.0 < value[0] <= value[1] < inf:
                raise ConfigError(f"domain of a calibration with {name} = {list(value)}: fit it again")
        if not 0.0 < self.eval_rows < inf:
            raise ConfigError(f"domain of a calibration with eval_rows = {self.eval_rows}: fit it again")


@dataclass(frozen=True)
class Reach:
    """Whether a forecast lies within what its calibration has seen, and what follows if not.

    Attributes:
        doublings: Distance d; infinite where nothing of the kind was seen.
        reasons: What lies outside, a sentence each; empty inside.
    """

    doublings: float
    reasons: tuple[str, ...]

    @property
    def withheld(self) -> bool:
        """Whether no level is given."""
        return self.doublings > FARTHEST

    @property
    def widening(self) -> float:
        """Factor 2^d of the interval's half-width on the calibration's scale."""
        return exp2(self.doublings)

    @property
    def verdict(self) -> str:
        """What becomes of the forecast, in one sentence; empty inside."""
        if not self.reasons:
            return ""
        if self.withheld:
            return "No level is forecast, read the order only: " + "; ".join(self.reasons) + "."
        return (
            f"Intervals are {self.widening:.2g} times as wide as inside what was checked, and no training loss is "
            f"forecast: {'; '.join(self.reasons)}."
        )

    def to_dict(self) -> dict[str, object]:
        """Lay out as in `result.json`.

        Returns:
            JSON-ready values.
        """
        return {
            "inside": not self.reasons,
            "withheld": self.withheld,
            "widening": None if self.withheld else self.widening,
            "reasons": list(self.reasons),
        }


INSIDE = Reach(0.0, ())


def domain_of(runs: Sequence[Run], *, most_rows: float, most_classes: float) -> Domain:
    """Say what a set of runs has shown.

    Args:
        runs: Runs that a calibration is fitted on.
        most_rows: Largest N/n up to which its left-out intervals held.
        most_classes: Most classes up to which they held.

    Returns:
        The domain.

    Raises:
        ConfigError: If no run has an adapter, or the runs are of several kinds of task.
    """
    kinds = sorted({run.kind for run in runs})
    if len(kinds) > 1:
        raise ConfigError(f"a calibration is for one kind of task, not for {' and '.join(kinds)}: fit one for each")
    if not any(run.update_rate is not None for run in runs):
        raise ConfigError("a calibration needs runs with an adapter to say what it has seen")

    def span(values: Iterable[float]) -> Span:
        numbers = [float(value) for value in values]
        return min(numbers), max(numbers)

    def kept(values: Sequence[float], most: float) -> Span:
        return min(values), max(min(values), min(max(values), most))

    return Domain(
        models=tuple(sorted({run.model for run in runs})),
        hidden_head=any(run.hidden_head for run in runs),
        classes=kept([float(run.classes) for run in runs], most_classes),
        known_rows=span(run.known_rows for run in runs),
        rows_ratio=kept([run.rows_ratio for run in runs], most_rows),
        eval_rows=sum(run.eval_rows for run in runs) / len(runs),
        longest=span(run.longest for run in runs),
        epochs=span(run.epochs for run in runs),
        steps=span(run.steps for run in runs),
        batch_size=span(run.batch_size for run in runs),
        learning_rate=span(run.learning_rate for run in runs),
        update_rate=span(run.update_rate for run in runs if run.update_rate is not None),
        kind=runs[0].kind,
    )


def _beyond(value: float, covered: Span, *, below: bool = True) -> float:
    """Doublings from what was seen to a value; below it they count only if asked for."""
    low, high = covered
    if value <= 0.0:  # a run of one step, all of it warm-up, has no rate
        return inf if below else 0.0
    if value > high:
        return log2(value / high)
    return log2(low / value) if below and value < low else 0.0


def reach(domain: Domain, run: Run, *, trial: bool = False) -> Reach:
    """Compare a run with what a calibration has seen.

    More known rows than seen, shorter texts and fewer training rows for each known one do not count: there is less to
    extrapolate. The two learning rates count once, the farther of them; so do steps and epochs.

    Args:
        domain: From the calibration.
        run: What the forecast is for.
        trial: Whether the known rows are those of a trial.

    Returns:
        The distance, and a sentence for each number outside.
    """
    reasons = []
    row, rows = ("row of the trial", "rows of the trial") if trial else ("known one", "known rows")
    if run.kind != domain.kind:
        reasons.append(f"the calibration has seen {domain.kind} only, and this is {run.kind}")
    if run.model not in domain.models:
        reasons.append("the calibration has seen no run of this model")
    if run.hidden_head and not domain.hidden_head:
        reasons.append(
            "the classifier's head has a hidden layer, which no run of the calibration had (in a check with one, "
            "forecasts of adapters that learn much were 20 points too low)"
        )
    total = inf if reasons else 0.0
    of_head = _beyond(run.learning_rate, domain.learning_rate)
    of_adapter = 0.0 if run.update_rate is None else _beyond(run.update_rate, domain.update_rate)
    rate = f"a mean learning rate of {run.learning_rate:.2g}, checked {_range(domain.learning_rate)}"
    if of_adapter > of_head:
        rate = f"a mean learning rate times α of {run.update_rate:.2g}, checked {_range(domain.update_rate)}"
    of_steps, of_epochs = _beyond(run.steps, domain.steps), _beyond(run.epochs, domain.epochs)
    length = f"{run.steps:,} steps, checked {_range(domain.steps)}"
    if of_epochs > of_steps:
        length = f"{run.epochs:,} epochs, checked {_range(domain.epochs)}"
    for distance, what in (
        (
            _beyond(run.rows_ratio, domain.rows_ratio, below=False),
            f"{run.train_rows:,} training rows are {run.rows_ratio:.3g} for each {row}, checked up to "
            f"{domain.rows_ratio[1]:.3g}",
        ),
        (
            max(0.0, log2(domain.known_rows[0] / run.known_rows)),
            f"{run.known_rows:,} {rows}, checked from {domain.known_rows[0]:,.0f}",
        ),
        (max(of_steps, of_epochs), length),
        (max(of_head, of_adapter), rate),
        (
            _beyond(run.batch_size, domain.batch_size),
            f"{run.batch_size} texts in a step, checked {_range(domain.batch_size)}",
        ),
        (
            _beyond(run.longest, domain.longest, below=False),
            f"texts of up to {run.longest} tokens, checked up to {domain.longest[1]:.0f}",
        ),
        (_beyond(run.classes, domain.classes), f"{run.classes} {NOUNS[run.kind]}, checked {_range(domain.classes)}"),
    ):
        if distance > ROUNDING:
            total += distance
            reasons.append(what)
    return Reach(total, tuple(reasons))


def _range(covered: Span) -> str:
    low, high = covered
    return f"{low:,.3g}" if low == high else f"{low:,.4g} to {high:,.4g}"
