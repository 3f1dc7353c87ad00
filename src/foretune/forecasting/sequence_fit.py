"""Fit a calibration of language models on finished runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from foretune.arrays import Array
from foretune.errors import ConfigError
from foretune.forecasting.calibration import LEAST_GROUPS
from foretune.forecasting.reach import Domain, Run, domain_of
from foretune.forecasting.sequence_calibration import SequenceCalibration, SequenceCase, SequenceLine, trial_value

ROUNDS = 20  # of reweighting: the errors' spread hangs on the coefficients and they on it
HOLDS = np.linspace(1.0, 2.5, 31)
GROWTHS = np.linspace(0.0, 0.5, 26)
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

    The coefficients minimise Σ w e² over the runs without a trial, then over those with one, each weighted by 1 over
    the variance of its error and every data set alike; the variance is fitted to the squared errors with its three
    terms ≥ 0, and both in turn. Those with a trial begin at the forecast without it.

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


def _variance(squares: Array, features: Array, weights: Array) -> tuple[Array, Array]:
    """Fit squared errors by features with coefficients ≥ 0, and say what it gives for each run."""
    variance = np.full(len(squares), max(float(weights @ squares / weights.sum()), LEAST_SPREAD**2))
    found = np.zeros(features.shape[1])
    for _ in range(ROUNDS):
        root = np.sqrt(weights) / variance  # the spread of e² is that of its mean
        found, _ = nnls(features * root[:, None], squares * root)
        found[0] = max(found[0], LEAST_SPREAD**2)
        variance = features @ found
    return found, variance


def _fit_plain(finished: Sequence[FinishedSequence]) -> SequenceLine:
    """`hold` on a grid, as the gain is a maximum; `growth` by least squares."""
    cases, weights = [one.case for one in finished], _weights(finished)
    real = np.array([one.loss for one in finished])
    best: tuple[float, SequenceLine] | None = None
    for hold in HOLDS:
        line = SequenceLine(float(hold), growth=0.0, trust=0.0, spread=0.0, apart=0.0, beyond=0.0, groups=0, runs=0)
        at_known = np.array([case.base - line.gain(case) for case in cases])
        more = np.array([case.doublings * max(0.0, line.gain(case)) for case in cases])
        features = np.array([[1.0, case.apart**2, step**2] for case, step in zip(cases, more, strict=True)])
        growth, parts, variance = _alternate(real - at_known, -more, features, weights)
        errors = real - np.maximum(0.0, at_known - growth * more)
        likelihood = float(weights @ (np.log(variance) + errors**2 / variance))
        if best is None or likelihood < best[0]:
            best = (likelihood, _line((float(hold), growth, 0.0), parts, finished))
    assert best is not None
    return best[1]


def _alternate(rest: Array, x: Array, features: Array, weights: Array) -> tuple[float, Array, Array]:
    """Fit rest ≈ c x with 0 ≤ c ≤ 1 and the variance of what is left, in turn."""
    variance, coefficient, parts = np.ones(len(rest)), 0.0, np.zeros(features.shape[1])
    for _ in range(ROUNDS):
        w = weights / variance
        coefficient = float(np.clip(float((w * x) @ rest) / max(float((w * x) @ x), 1e-12), 0.0, 1.0))
        parts, variance = _variance((rest - coefficient * x) ** 2, features, weights)
    return coefficient, parts, variance


def _line(coefficients: tuple[float, float, float], parts: Array, finished: Sequence[FinishedSequence]) -> SequenceLine:
    hold, growth, trust = coefficients
    spread, apart, beyond = (float(part) for part in np.sqrt(parts))
    return SequenceLine(hold, growth, trust, spread, apart, beyond, len({one.group for one in finished}), len(finished))


def _fit_tried(finished: Sequence[FinishedSequence], plain: SequenceLine) -> SequenceLine:
    """`growth` on a grid, as it multiplies `trust`; `trust` by least squares."""
    weights, real = _weights(finished), np.array([one.loss for one in finished])
    best: tuple[float, SequenceLine] | None = None
    for growth in GROWTHS:
        whole = replace(plain, growth=float(growth), trust=1.0)
        before = np.array([plain.value(one.case) for one in finished])
        told = [trial_value(whole, one.case, value) for one, value in zip(finished, before, strict=True)]
        way = np.array([value for value, _, _ in told]) - before
        features = np.array(
            [[1.0, one.case.apart**2, (step * gain) ** 2] for one, (_, step, gain) in zip(finished, told, strict=True)]
        )
        trust, parts, variance = _alternate(real - before, way, features, weights)
        likelihood = float(weights @ (np.log(variance) + (before + trust * way - real) ** 2 / variance))
        line = _line((plain.hold, float(growth), trust), parts, finished)
        if best is None or likelihood < best[0]:
            best = (likelihood, line)
    assert best is not None
    return best[1]
