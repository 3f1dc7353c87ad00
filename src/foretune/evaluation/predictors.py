"""What a study compares: predictors, known before training, and outcomes of the fine-tune.

A predictor is one entry here: name, label, direction, cost and, where `foretune study outlook` or the run's own log
gives it, its computation. Stored columns, the content of a simulation's file, tables, regrets and costs follow from
the entries. A new metric of transferability is a function in `transferability.py` and an entry in `BASELINES`.
An entry of one kind of task, such as a metric that needs classes, says so in `kind`; what is said of the main metric
(`_of_main`) is an entry for each kind, under the name of its metric. Kinds are never compared with each other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from foretune.evaluation.early_stop import Forecast, RunLog, early_eval_loss, early_metric, early_train_loss
from foretune.evaluation.gradients import gradient_norm, page
from foretune.evaluation.metric_inputs import (
    Compute,
    head_alone_metric,
    initial_metric,
    kappa_tune,
    of_features,
    of_kernel,
    plop,
    quick_score,
)
from foretune.evaluation.transferability import gbc, h_score, log_me, nleep, parc, trans_rate
from foretune.forecasting.outcomes import LOSSES
from foretune.forecasting.reach import RUN
from foretune.tasks.metrics import METRICS, Kind, main_metric

Share = Callable[[float], float]  # of stored seconds, by the number of classes C


@dataclass(frozen=True)
class Cost:
    """What a predictor costs beside the fine-tune: stored seconds, or a share of the run itself.

    Attributes:
        clock: Names of the stored seconds that it needs, each with the share of them; empty where nothing was timed.
        bound: Whether the seconds hold other work too, so that the cost is at most theirs.
        of_run: Share of the run's own steps that it needs, instead of seconds.
    """

    clock: tuple[tuple[str, Share], ...] = ()
    bound: bool = False
    of_run: float | None = None

    def seconds(self, stored: Mapping[str, float | None], classes: float) -> float | None:
        """Add up what a predictor takes of one cell's seconds.

        Args:
            stored: Seconds by name; None where nothing was timed.
            classes: Classes C of the data set.

        Returns:
            Seconds; None where nothing that was timed tells.
        """
        parts = [(stored.get(name), share(classes)) for name, share in self.clock]
        if not parts or any(value is None for value, _ in parts):
            return None
        return sum(share * float(value or 0.0) for value, share in parts)


def _whole(_: float) -> float:
    return 1.0


# The pass goes forward over the n samples, and forward and, for each of k = C − 1 outputs, backward over them and the m
# rows to predict: 2n + m + k (n + m) passes of one way, if back is as long as forward; it is longer. Features of the
# samples are n of them, at most 1/(k + 2) = 1/(C + 1), those of a probe and what it predicts n + m, at most
# 1/(k + 1) = 1/C. `baselines` timed all metrics of others together, the quick score too: a bound for each of them.
FREE = Cost(of_run=0.0)
UNTIMED = Cost()
SCORE = Cost((("kernel", _whole), ("spectrum", _whole), ("kernel_regression", _whole)))
SIMULATION = Cost((("survey", _whole), ("simulate", _whole)))
PROBE = Cost((("survey", lambda classes: 1.0 / classes),), bound=True)
FEATURES = Cost((("survey", lambda classes: 1.0 / (classes + 1.0)), ("baselines", _whole)), bound=True)
PASS = Cost((("survey", _whole), ("baselines", _whole)), bound=True)
FORWARD = Cost((("baselines", _whole),), bound=True)  # weights, and a forward pass over a few texts at most


@dataclass(frozen=True)
class Predictor:
    """A number that is known before training, or after its first steps.

    Attributes:
        name: Its name in `cells.csv`.
        label: Its name in tables and figures.
        direction: +1 if a user of it picks the placement where it is largest, -1 if where it is smallest.
        cost: What it costs.
        logarithmic: Whether Pearson's coefficient and figures take its logarithm.
        forecast_of: Outcome whose calibrated forecast it is; None if it is another number.
        compute: Computes it for each placement from one pass over a data set; None where score, simulation or
            calibration give it.
        from_log: Reads it off the log of the run itself; None for all that is known before.
        kind: Kind of task that alone has it, `classification` for what needs classes; None for every kind.
    """

    name: str
    label: str
    direction: Literal[+1, -1]
    cost: Cost
    logarithmic: bool = False
    forecast_of: str | None = None
    compute: Compute | None = None
    from_log: Callable[[RunLog], float | None] | None = None
    kind: Kind | None = None


@dataclass(frozen=True)
class Outcome:
    """A number that training gives.

    Attributes:
        name: Its name in `cells.csv`.
        label: Its name in tables and figures.
    """

    name: str
    label: str


def _early(share: float, outcome: str, label: str, direction: Literal[+1, -1], forecast: Forecast) -> Predictor:
    name, percent = f"early_{round(100 * share)}_{outcome}", f"{share:.0%}"
    return Predictor(
        name,
        f"first {percent} of the steps: {label}",
        direction,
        Cost(of_run=share),
        from_log=lambda log: forecast(log, share),
    )


def _of_main(
    name: str, label: str, cost: Cost, *, compute: Compute | None = None, early: float | None = None
) -> tuple[Predictor, ...]:
    """Make an entry for the main metric of each kind of task; of every one of them more is better.

    Args:
        name: Name, with `{}` where that of the metric stands.
        label: Label, likewise.
        cost: What it costs.
        compute: Computes it from a pass.
        early: Share of the run's steps after which it is read off the log.

    Returns:
        One for each kind.
    """
    from_log = None if early is None else partial(early_metric, share=early)
    return tuple(
        Predictor(
            name.format(metric.name),
            label.format(metric.label),
            +1,
            cost,
            compute=compute,
            from_log=from_log,
            kind=kind,
        )
        for kind, (metric, *_) in METRICS.items()
    )


# Which way each one points is fixed here, before any outcome is seen. κ small is the paper's claim; the others by the
# theory of docs/mathematics.md, or by what the number says of itself.
KAPPA = Predictor("condition_number", "κ", -1, SCORE, logarithmic=True)
OF_SCORE = (
    KAPPA,
    Predictor("condition_number_mean", "κ, mean over draws of A", -1, SCORE, logarithmic=True),
    Predictor("condition_number_relative", "κ, scale-free", -1, SCORE, logarithmic=True),
    Predictor("lambda_max", "λ_max", +1, SCORE, logarithmic=True),
    Predictor("lambda_min", "λ_min", +1, SCORE, logarithmic=True),
    Predictor("trace", "trace", +1, SCORE, logarithmic=True),
    Predictor("effective_dimension", "effective dimension", +1, SCORE),
    Predictor("alignment", "alignment", +1, SCORE),
    Predictor("empirical_risk", "empirical risk at σ", -1, SCORE),
    Predictor("kernel_regression_train_loss", "kernel regression: train loss", -1, SCORE),
    Predictor("kernel_regression_eval_loss", "kernel regression: eval loss", -1, SCORE),
    *_of_main("kernel_regression_eval_{}", "kernel regression: {}", SCORE),
    Predictor("loo_mse", "leave-one-out error", -1, SCORE),
    *_of_main("loo_{}", "leave-one-out {}", SCORE),
    Predictor("head_eval_loss", "head's kernel: eval loss", -1, SCORE),
    *_of_main("head_eval_{}", "head's kernel: {}", SCORE),
    Predictor("adapter_parameters", "adapter parameters", +1, FREE, logarithmic=True),
)
# What the simulated run and its calibration say (foretune study outlook); cells without a simulation lack them.
OF_SIMULATION = (
    *(
        replace(entry, forecast_of=main_metric(entry.kind).name)
        for entry in _of_main("predicted_{}", "foretune: {}", SIMULATION)
        if entry.kind is not None
    ),
    Predictor("predicted_eval_loss", "foretune: eval loss", -1, SIMULATION, forecast_of="eval_loss"),
    Predictor("predicted_train_loss", "foretune: train loss", -1, SIMULATION, forecast_of="train_loss"),
    *_of_main("simulated_{}", "simulated run: {}", SIMULATION),
    Predictor("simulated_eval_loss", "simulated run: eval loss", -1, SIMULATION),
    Predictor("simulated_train_loss", "simulated run: train loss", -1, SIMULATION),
    *_of_main("lazy_{}", "simulated with A fixed: {}", UNTIMED),
    Predictor("lazy_eval_loss", "simulated with A fixed: eval loss", -1, UNTIMED),
    *_of_main("random_head_{}", "simulated at the random head: {}", UNTIMED),
    Predictor("regression_accuracy", "kernel regression from the probe: accuracy", +1, UNTIMED, kind="classification"),
    Predictor(
        "logistic_accuracy", "kernel logistic regression from the probe: accuracy", +1, UNTIMED, kind="classification"
    ),
    Predictor("sign_accuracy", "kernel of sign descent: accuracy", +1, UNTIMED, kind="classification"),
    Predictor("asymmetric_accuracy", "asymmetric kernel of sign descent: accuracy", +1, UNTIMED, kind="classification"),
    Predictor("quick_score", "quick score", +1, PASS, compute=quick_score),
)
# Metrics of others and simple rules. Those of a data set's features alone are the same for all its placements.
BASELINES = (
    Predictor("gradient_norm", "gradient norm", +1, PASS, logarithmic=True, compute=of_kernel(gradient_norm)),
    Predictor("page", "PAGE", +1, PASS, logarithmic=True, compute=of_kernel(page)),
    Predictor("plop", "PLoP", -1, FORWARD, compute=plop),
    Predictor("kappa_tune", "KappaTune", -1, FORWARD, logarithmic=True, compute=kappa_tune),
    *_of_main("probe_{}", "linear probe: {}", PROBE),
    Predictor("probe_loss", "linear probe: loss", -1, PROBE),
    Predictor("log_me", "LogME", +1, FEATURES, compute=of_features(log_me), kind="classification"),
    Predictor("h_score", "H-score", +1, FEATURES, compute=of_features(h_score), kind="classification"),
    Predictor("nleep", "NLEEP", +1, FEATURES, compute=of_features(nleep, seeded=True), kind="classification"),
    Predictor("trans_rate", "TransRate", +1, FEATURES, compute=of_features(trans_rate), kind="classification"),
    Predictor("gbc", "GBC", +1, FEATURES, compute=of_features(gbc), kind="classification"),
    Predictor("parc", "PARC", +1, FEATURES, compute=of_features(parc), kind="classification"),
    _early(0.05, "train_loss", "train loss", -1, early_train_loss),
    _early(0.2, "train_loss", "train loss", -1, early_train_loss),
    *_of_main("early_20_{}", "first 20% of the steps: {}", Cost(of_run=0.2), early=0.2),
    _early(0.2, "eval_loss", "eval loss", -1, early_eval_loss),
)
# What must know less: the same forecast with something taken away.
CONTROLS = (
    *_of_main("head_alone_{}", "control, head alone: {}", UNTIMED, compute=head_alone_metric),
    *_of_main("f0_{}", "control, before training: {}", UNTIMED, compute=initial_metric),
    *_of_main("permuted_{}", "control, permuted labels: {}", UNTIMED),
    *_of_main("random_backbone_{}", "control, random backbone: {}", UNTIMED),
)
PREDICTORS = (*OF_SCORE, *OF_SIMULATION, *BASELINES, *CONTROLS)


def calibrated(kind: Kind) -> tuple[str, ...]:
    """Name the numbers of a simulation that its calibration takes.

    Args:
        kind: Kind of task.

    Returns:
        Names, as in `case_values`.
    """
    metric = main_metric(kind).name
    ends = [*(f"simulated_{name}" for name in (*LOSSES, metric)), "best_eval_loss", f"best_{metric}"]
    return (*ends, "probe_loss", f"probe_{metric}", "movement", "doublings")


# What is compared with the area under the real curves.
SIMULATED_AREAS = ("simulated_train_area", "simulated_eval_area")


def predictors_of(kind: Kind) -> tuple[Predictor, ...]:
    """Take the predictors that cells of a kind have.

    Args:
        kind: Kind of task.

    Returns:
        Those of every kind, and of this one.
    """
    return tuple(entry for entry in PREDICTORS if entry.kind in (None, kind))


def quantities_of(kind: Kind) -> tuple[str, ...]:
    """Name all numbers known before training that a cell stores.

    Args:
        kind: Kind of task.

    Returns:
        Names.
    """
    names = (*(entry.name for entry in predictors_of(kind)), *calibrated(kind), *SIMULATED_AREAS, *RUN)
    return tuple(dict.fromkeys(names))


def outcomes_of(kind: Kind) -> tuple[Outcome, ...]:
    """Take what comes of a run: losses, the main metric, steps to a loss.

    Args:
        kind: Kind of task.

    Returns:
        Outcomes.
    """
    metric = main_metric(kind)
    return (
        Outcome("train_loss", "train loss"),
        Outcome("eval_loss", "eval loss"),
        Outcome(metric.name, metric.label),
        Outcome("steps_to_loss", "steps to loss"),
    )


# Names of the numbers known before training of every kind, in the order of the columns of `cells.csv`.
QUANTITIES = tuple(
    dict.fromkeys(
        [
            *(entry.name for entry in PREDICTORS),
            *(name for kind in METRICS for name in calibrated(kind)),
            *SIMULATED_AREAS,
            *RUN,
        ]
    )
)


def predictor_named(name: str) -> Predictor:
    """Look a predictor up.

    Args:
        name: Its name in `cells.csv`.

    Returns:
        The predictor.
    """
    (predictor,) = (entry for entry in PREDICTORS if entry.name == name)
    return predictor
