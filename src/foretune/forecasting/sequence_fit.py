"""Fit a calibration of language models on finished runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from scipy.optimize import nnls

from foretune.arrays import Array
from foretune.errors import ConfigError
from foretune.forecasting.calibration import LEAST_GROUPS
from foretune.forecasting.reach import Domain, Run, domain_of
from foretune.forecasting.sequence_calibration import (
    SequenceCalibration,
    SequenceCase,
    SequenceLine,
    slope,
    trial_value,
)

ROUNDS = 8  # of reweighting: the errors' spread hangs on the coefficients and they on it
HOLDS = np.linspace(1.0, 2.5, 31)
GROWTHS = np.linspace(0.0, 1.0, 26)
LEAST_SPREAD = 0.002  # nats: no closer is the end of a run known, from one processor to another


@dataclass(frozen=True)
class FinishedSequence:
    """A finished run of a language model.

    Attributes:
        case: What was known of it before.
        run: What kind of run it was.
        loss: Evaluation loss at its end, in nats a token.
        group: Data set.
    """

    case: SequenceCase
    run: Run
    loss: float
    group: str


def fit_sequences(finished: Sequence[FinishedSequence], source: str) -> SequenceCalibration:
    """Fit a calibration.

    `hold` and `growth` make Σ w (log v + e²/v) least over a grid, e the errors of the runs without a trial, v their
    variances and every data set of the same weight; the variance is fitted to the squared errors with its three terms
    ≥ 0. Runs with a trial take the same, `trust` 1 and variances of their own, whose constant is no less.

    Args:
        finished: Finished runs of 3 data sets or more.
        source: Name of the study, for the record.

    Returns:
        The calibration.

    Raises:
        ConfigError: If there are too few data sets.
    """
    groups = sorted({one.group for one in finished})
    if len(groups) < LEAST_GROUPS:
        raise ConfigError(f"a calibration needs runs of {LEAST_GROUPS} data sets or more, got {len(groups)}")
    plain = [one for one in finished if one.case.trial is None]
    if len({one.group for one in plain}) < LEAST_GROUPS:
        raise ConfigError(f"a calibration needs runs without trials of {LEAST_GROUPS} data sets or more")
    line = _fit_plain(plain)
    tried = [one for one in finished if one.case.trial is not None]
    with_trials = len({one.group for one in tried}) >= LEAST_GROUPS
    return SequenceCalibration(
        plain=line,
        tried=_fit_tried(tried, line) if with_trials else None,
        groups=tuple(groups),
        source=source,
        domain=_domain([one.run for one in plain]),
        trial_domain=_domain([_by_trial(one) for one in tried]) if with_trials else None,
    )


def _by_trial(one: FinishedSequence) -> Run:
    assert one.case.trial is not None
    return replace(one.run, known_rows=one.case.trial[0])


def _domain(runs: Sequence[Run]) -> Domain:
    return domain_of(runs, most_rows=max(run.rows_ratio for run in runs), most_classes=1.0)


def _weights(finished: Sequence[FinishedSequence]) -> Array:
    """Every data set alike."""
    groups = [one.group for one in finished]
    return np.array([1.0 / groups.count(group) for group in groups])


def _variance(squares: Array, features: Array, weights: Array, *, least: float = LEAST_SPREAD) -> tuple[Array, Array]:
    """Fit squared errors by features with coefficients ≥ 0, and say what it gives for each run."""
    variance = np.full(len(squares), max(float(weights @ squares / weights.sum()), least**2))
    found = np.zeros(features.shape[1])
    for _ in range(ROUNDS):
        root = np.sqrt(weights) / variance  # the spread of e² is that of its mean
        found, _ = nnls(features * root[:, None], squares * root)
        found[0] = max(found[0], least**2)
        variance = features @ found
    return found, variance


def _features(cases: Sequence[SequenceCase], doublings: Sequence[float], losses: Sequence[float]) -> Array:
    """What the variance of each error is made of."""
    free = [slope(case.base, case.base - loss) for case, loss in zip(cases, losses, strict=True)]
    terms = zip(cases, doublings, free, strict=True)
    return np.array([[1.0, case.apart**2, (step * of_odds) ** 2] for case, step, of_odds in terms])


def _bare(hold: float, growth: float, trust: float) -> SequenceLine:
    return SequenceLine(hold, growth, trust, spread=0.0, apart=0.0, beyond=0.0, groups=0, runs=0)


def _fit_plain(finished: Sequence[FinishedSequence]) -> SequenceLine:
    """`hold` and `growth` on grids, as the gain is a maximum; `growth` is 0 where no run has more rows than known."""
    cases, weights = [one.case for one in finished], _weights(finished)
    real, steps = np.array([one.loss for one in finished]), [case.doublings for case in cases]
    best: tuple[float, SequenceLine] | None = None
    for hold, growth in product(HOLDS, GROWTHS if any(steps) else (0.0,)):
        line = _bare(float(hold), float(growth), 0.0)
        told = [line.value(case) for case in cases]
        squares = (np.array(told) - real) ** 2
        parts, variance = _variance(squares, _features(cases, steps, told), weights)
        likelihood = float(weights @ (np.log(variance) + squares / variance))
        if best is None or likelihood < best[0]:
            best = (likelihood, _line((line.hold, line.growth, 0.0), parts, finished))
    assert best is not None
    return best[1]


def _fit_tried(finished: Sequence[FinishedSequence], plain: SequenceLine) -> SequenceLine:
    """The variance alone: a trial is believed, and grows with the rows as all runs do."""
    cases, weights = [one.case for one in finished], _weights(finished)
    whole = replace(plain, trust=1.0)
    told = [trial_value(whole, case, plain.value(case)) for case in cases]
    squares = (np.array([value for value, _, _ in told]) - np.array([one.loss for one in finished])) ** 2
    features = _features(cases, [steps for _, steps, _ in told], [level for _, _, level in told])
    parts, _ = _variance(squares, features, weights, least=plain.spread)
    return _line((plain.hold, plain.growth, 1.0), parts, finished)


def _line(coefficients: tuple[float, float, float], parts: Array, finished: Sequence[FinishedSequence]) -> SequenceLine:
    hold, growth, trust = coefficients
    spread, apart, beyond = (float(part) for part in np.sqrt(parts))
    return SequenceLine(hold, growth, trust, spread, apart, beyond, len({one.group for one in finished}), len(finished))
