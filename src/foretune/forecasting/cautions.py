"""What may go wrong with a run, each with its probability: it collapses, hardly moves, ends worse than no adapter.

The last two are read off the forecast as in `foretune.forecasting.verdicts`, with β the better of the head alone and
one prediction for all, and y the main metric:

    P(hardly moves) = P(|y − β| < 0.02),        P(worse) = P(y ≤ β − 0.02),

the first off `foretune.forecasting.risk`.
"""

from dataclasses import asdict, dataclass
from typing import Literal

from foretune.forecasting.calibration import RunForecast
from foretune.forecasting.risk import MARGIN, Risk
from foretune.forecasting.verdicts import probability_above
from foretune.tasks.metrics import EVAL_LOSS

Trouble = Literal["collapse", "no effect", "worse"]
TOLD = 0.2  # a probability from here on is told
FAR = 4.0  # times faster or slower than what went well


@dataclass(frozen=True)
class Moving:
    """How fast and how long a run moves its adapter.

    Attributes:
        update_rate: Mean learning rate times s·r; None without an adapter.
        steps: Steps of the run.
    """

    update_rate: float | None
    steps: float


@dataclass(frozen=True)
class Caution:
    """One thing that may go wrong.

    Attributes:
        trouble: Which.
        probability: That it does.
        sentence: The same in words; empty where it is not likely enough to be told.
    """

    trouble: Trouble
    probability: float
    sentence: str

    def to_dict(self) -> dict[str, object]:
        """Lay out as in `result.json`.

        Returns:
            JSON-ready values.
        """
        return asdict(self)


def cautions(
    forecast: RunForecast, degrees: float, *, baseline: float | None, risk: Risk | None, run: Moving
) -> tuple[Caution, ...]:
    """Say what may go wrong with a run.

    Args:
        forecast: Its forecast.
        degrees: Degrees of freedom of its intervals.
        baseline: β; None where it is not known.
        risk: Of a collapse; None where no finished run tells.
        run: How fast and how long it moves its adapter.

    Returns:
        One for each trouble that something is known of; of a forecast that is withheld the collapse alone.
    """
    found = []
    if risk is not None and run.update_rate is not None:
        found.append(collapse_caution(risk, run.update_rate, run.steps))
    if forecast.levels is not None and baseline is not None:
        metric = forecast.metric
        interval = forecast.levels[metric.name]
        above, least = (probability_above(interval, metric, baseline + by, degrees) for by in (MARGIN, -MARGIN))
        by = f"{MARGIN * 100:g} points" if metric.percent else f"{MARGIN:g}"
        written = metric.written(baseline)
        found += [
            _told("no effect", least - above, f"end within {by} of what costs nothing ({written})"),
            _told("worse", 1.0 - least, f"end {by} or more below what costs nothing ({written})"),
        ]
    return tuple(found)


def _told(trouble: Trouble, chance: float, ends: str) -> Caution:
    return Caution(trouble, chance, f"{chance * 100:.0f} of 100 runs like this {ends}." if chance >= TOLD else "")


def collapse_caution(risk: Risk, rate: float, steps: float) -> Caution:
    """Say how likely a run is to collapse.

    Args:
        risk: Of a collapse.
        rate: Mean learning rate times s·r.
        steps: Steps of the run.

    Returns:
        With a sentence where it is likely enough, or the rate is far from those of finished runs.
    """
    chance = risk.probability(rate, steps)
    most = "nine of ten finished runs of all lengths did not"
    fine = f"mean learning rate × α is {rate:.2g}; up to {risk.fine:.2g} {most}"
    sentence = ""
    if chance >= TOLD:
        sentence = f"{chance * 100:.0f} of 100 runs of {steps:,.0f} steps at a rate like this collapse: {fine}."
    elif rate > FAR * risk.fine:
        sentence = f"The rate is far above what went well: {fine}."
    elif rate * FAR < risk.slowest:
        sentence = f"The rate is far below that of all finished runs: mean learning rate × α is {rate:.2g}, theirs " + (
            f"{risk.slowest:.2g} and more."
        )
    return Caution("collapse", chance, sentence)


def cautions_of_loss(forecast: RunForecast, degrees: float, *, base: float, margin: float) -> tuple[Caution, ...]:
    """Say what may go wrong with a run of a language model, against the model without training.

    With L the evaluation loss at its end, Student's t around its forecast, l that before training and μ the margin:
    P(hardly moves) = P(|L − l| < μ), P(worse) = P(L ≥ l + μ).

    Args:
        forecast: Its forecast.
        degrees: Degrees of freedom of its intervals.
        base: l, in nats a token.
        margin: μ, in nats a token.

    Returns:
        One for each trouble; none of a forecast that is withheld.
    """
    if forecast.levels is None:
        return ()
    level = forecast.levels[EVAL_LOSS.name]
    least, above = (probability_above(level, EVAL_LOSS, base + by, degrees) for by in (-margin, margin))
    without = f"the {base:.3f} nats a token that it has without training"
    return (
        _told("no effect", least - above, f"end within {margin:g} of {without}"),
        _told("worse", above, f"end {margin:g} or more above {without}"),
    )
