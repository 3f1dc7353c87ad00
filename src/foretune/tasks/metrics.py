"""Measures of outputs against targets: their names, and the scales on which errors of them are alike."""

from dataclasses import dataclass
from math import atanh, exp, isfinite, log, tanh
from typing import Literal

from foretune.errors import ConfigError
from foretune.settings.groups import LabelKind, TaskKind

Kind = LabelKind
Scale = Literal["logit", "fisher", "log", "identity"]


@dataclass(frozen=True)
class Metric:
    """A measure of outputs against targets.

    Attributes:
        name: Its name in files: `accuracy`, `spearman`, …
        label: Its name in tables.
        scale: On which scale errors of it are alike: `logit` for shares, `fisher` (atanh) for correlations,
            `log` for what is above 0 without bound.
        percent: Whether tables print it as a percentage.
        better: +1 if more is better, −1 if less is.
    """

    name: str
    label: str
    scale: Scale
    percent: bool
    better: int = 1

    def to_scale(self, value: float) -> float:
        """Bring a value to the scale on which errors are alike.

        Args:
            value: Value of the metric.

        Returns:
            Logit of a share kept within [0.01, 0.99], atanh of a correlation kept within ±0.99, logarithm, or the
            value.
        """
        if self.scale == "log":
            return log(value)
        if self.scale == "logit":
            kept = min(max(value, 0.01), 0.99)
            return log(kept / (1.0 - kept))
        return atanh(min(max(value, -0.99), 0.99)) if self.scale == "fisher" else value

    def from_scale(self, value: float) -> float:
        """Undo `to_scale`.

        Args:
            value: Value on the scale.

        Returns:
            Value of the metric.
        """
        if self.scale == "log":
            return exp(value)
        if self.scale == "logit":
            return 1.0 / (1.0 + exp(-value))
        return tanh(value) if self.scale == "fisher" else value

    def row_variance(self, value: float) -> float:
        """Variance that one evaluation row leaves on the scale; m rows leave a share 1/m of it.

        Args:
            value: Value of the metric.

        Returns:
            1/(p(1 − p)) for a share p kept within [0.01, 0.99]; 1.06 for a correlation of ranks (Fieller, Hartley and
            Pearson 1957, Biometrika 44), which is 1 for one of numbers; 1 for what has no scale of its own.
        """
        if self.scale == "logit":
            kept = min(max(value, 0.01), 0.99)
            return 1.0 / (kept * (1.0 - kept))
        return 1.06 if self.scale == "fisher" else 1.0

    def written(self, value: float | None) -> str:
        """Write a value for a table or a title.

        Args:
            value: Value; None, or not finite, where it is not defined.

        Returns:
            A percentage, or a number of three digits behind the point; a dash where there is none.
        """
        if value is None or not isfinite(value):
            return "–"
        return f"{value:.1%}" if self.percent else f"{value:.3f}"


ACCURACY = Metric("accuracy", "accuracy", "logit", percent=True)
MATTHEWS = Metric("matthews", "Matthews correlation", "fisher", percent=False)
MACRO_F1 = Metric("macro_f1", "macro F1", "logit", percent=True)
SPEARMAN = Metric("spearman", "Spearman correlation", "fisher", percent=False)
PEARSON = Metric("pearson", "Pearson correlation", "fisher", percent=False)
R2 = Metric("r2", "R²", "identity", percent=False)
MICRO_F1 = Metric("micro_f1", "micro F1", "logit", percent=True)
EXACT = Metric("exact_match", "all labels right", "logit", percent=True)
PERPLEXITY = Metric("perplexity", "perplexity", "log", percent=False, better=-1)
EVAL_LOSS = Metric("eval_loss", "evaluation loss", "log", percent=False, better=-1)  # of a language model, in nats
TOKEN_ACCURACY = Metric("token_accuracy", "token accuracy", "logit", percent=True)
# Of each kind of task, the main one first: a run is judged and candidates are ordered by that.
METRICS: dict[Kind, tuple[Metric, ...]] = {
    "classification": (ACCURACY, MATTHEWS, MACRO_F1),
    "regression": (SPEARMAN, PEARSON, R2),
    "multi-label": (MICRO_F1, MACRO_F1, EXACT),
}
LANGUAGE_METRICS = (PERPLEXITY, TOKEN_ACCURACY)
_NAMED = {metric.name: metric for metrics in (*METRICS.values(), LANGUAGE_METRICS) for metric in metrics}
METRIC_NAMES = frozenset(_NAMED)


def metric_named(name: str) -> Metric:
    """Look a metric up.

    Args:
        name: Its name in files.

    Returns:
        The metric.

    Raises:
        ConfigError: If there is none of the name.
    """
    if name not in _NAMED:
        raise ConfigError(f"unknown metric {name!r}: there are {', '.join(_NAMED)}")
    return _NAMED[name]


def main_metric(kind: TaskKind) -> Metric:
    """The metric that runs of a kind are judged by.

    Args:
        kind: Kind of task.

    Returns:
        The first of its metrics.
    """
    return metrics_of(kind)[0]


def metrics_of(kind: TaskKind) -> tuple[Metric, ...]:
    """Measures of a run of any kind, language models among them.

    Args:
        kind: Kind of task.

    Returns:
        Metrics, the main one first.
    """
    of_labels = next((metrics for known, metrics in METRICS.items() if known == kind), None)
    return LANGUAGE_METRICS if of_labels is None else of_labels
