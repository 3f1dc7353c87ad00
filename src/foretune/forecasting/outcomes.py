"""What is forecast of a run, and the scale on which errors of it are alike."""

from math import exp, log

from foretune.settings.groups import TaskKind
from foretune.tasks.metrics import main_metric, metric_named

Outcome = str  # `train_loss`, `eval_loss` or the name of the main metric
LOSSES: tuple[Outcome, ...] = ("train_loss", "eval_loss")
# Squared errors are in the unit of their targets, whichever that is.
LOSS_LIMITS: dict[TaskKind, tuple[float, float]] = {
    "classification": (1e-3, 20.0),
    "multi-label": (1e-3, 20.0),
    "causal-lm": (1e-3, 20.0),
    "seq2seq": (1e-3, 20.0),
    "regression": (1e-12, 1e12),
}


def outcomes_of(kind: TaskKind) -> tuple[Outcome, ...]:
    """What is forecast of a run.

    Args:
        kind: Kind of task.

    Returns:
        Both losses, and the name of the main metric.
    """
    return (*LOSSES, main_metric(kind).name)


OUTCOMES = outcomes_of("classification")


def scale(outcome: Outcome, value: float, kind: TaskKind = "classification") -> float:
    """Bring a value to the scale that it is calibrated on.

    Args:
        outcome: Which outcome.
        value: Accuracy as a fraction or another metric, or loss.
        kind: Kind of task.

    Returns:
        A metric on its own scale (`Metric.to_scale`); logarithm of a loss kept within `LOSS_LIMITS`, of nats
        [0.001, 20].
    """
    if outcome not in LOSSES:
        return metric_named(outcome).to_scale(value)
    low, high = LOSS_LIMITS[kind]
    return log(min(max(value, low), high))


def unscale(outcome: Outcome, value: float) -> float:
    """Undo `scale`.

    Args:
        outcome: Which outcome.
        value: On the scale.

    Returns:
        Metric or loss.
    """
    return exp(value) if outcome in LOSSES else metric_named(outcome).from_scale(value)
