"""Calibration of a language model's forecasts: from what simulation and trials say to what runs gave.

All in nats a token. Of a run on N rows, n of them known, the run on min(N, n) of them is simulated. Plugged into the
model, its A and B give the loss l before training, s₃ after a third of the steps and s at the end; the linearised model
ends at q. With D = max(l − s, hold · max(0, l − s₃)), a = min(|q − s|, max(0, l − s, l − s₃)) and
δ = max(0, log2(N / n)) the forecast without trials is

    p = l − G(D, δ),    logit(G(D, δ) / l) = logit(D / l) + growth · δ        (G = D where D ≤ 0),

    error² ~ spread² + apart² a² + beyond² δ² g²,    g = G (1 − G / l):

what a run gains at first the simulated one tells well, also where it is carried off the ground that it was linearised
on; the real one then goes on to find gradients that the model did not have before training, where the simulated one
stalls or rises. Twice as many rows raise the odds of the share of the loss that is gained, so that it never falls below
0. A trial on m rows that ended at t is the level; with δ = max(0, log2(N / m))

    y = p + trust · min(1, 2 √(m / N)) · (l − G(l − t, δ) − p),    error² ~ the same with δ and G of the trial.

Coefficients are fitted on finished runs of other data sets (`foretune.forecasting.sequence_fit`), but trust, which is 1
where there is a trial.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from math import ceil, exp, inf, isfinite, log2, sqrt
from typing import Any

from scipy.special import stdtrit

from foretune.errors import ConfigError
from foretune.forecasting.calibration import Interval, RunForecast
from foretune.forecasting.calibration_file import strictly
from foretune.forecasting.reach import ROUNDING, Domain, Reach, Run, reach
from foretune.forecasting.shown import Shown

SCHEMA = 1
LANGUAGE_CALIBRATION = "language_calibration.json"  # beside this file
LARGEST_EXPONENT = 700.0
MOST = 0.99  # of a loss that can be gained


@dataclass(frozen=True)
class SequenceCase:
    """What is known of a run before it is made, losses in nats a token on the rows to predict.

    Attributes:
        base: Loss l before training.
        third: Loss s₃ after a third of the steps of the simulated run on min(N, n) rows, plugged into the model.
        end: Loss s at its end.
        linear: Loss q of the linearised model at the end.
        known_rows: Known rows n.
        train_rows: Rows N of the run.
        trial: Rows m of the largest trial and the loss t that it ended at; None without one.
    """

    base: float
    third: float
    end: float
    linear: float
    known_rows: int
    train_rows: int
    trial: tuple[int, float] | None = None

    @property
    def apart(self) -> float:
        """How far the linearised model is from the one that it is of: a = min(|q − s|, max(0, l − s, l − s₃))."""
        far, most = abs(self.linear - self.end), max(0.0, self.base - self.end, self.base - self.third)
        return far if far < most else most  # where the linearised model diverges too

    @property
    def doublings(self) -> float:
        """δ = max(0, log2(N / n))."""
        return max(0.0, log2(self.train_rows / self.known_rows))


@dataclass(frozen=True)
class SequenceLine:
    """Coefficients of the forecast, and how wide its intervals are.

    Attributes:
        hold: What a run gains at least, in units of what it has gained after a third of its steps.
        growth: By what the log-odds of the share of the loss that is gained rise with a doubling of the rows.
        trust: Share of the way from the forecast without trials to the trial; 0 without trials.
        spread: Standard deviation of the error, in nats.
        apart: By how much it grows with `SequenceCase.apart`, in quadrature.
        beyond: Spread of the log-odds with a doubling of the rows, in quadrature.
        groups: Data sets that it was fitted on.
        runs: Runs.
    """

    hold: float
    growth: float
    trust: float
    spread: float
    apart: float
    beyond: float
    groups: int
    runs: int

    @property
    def degrees(self) -> float:
        """Degrees of freedom of its intervals: data sets less one, 2 or more."""
        return max(2.0, self.groups - 1.0)

    def gain(self, case: SequenceCase) -> float:
        """What the run on the rows that are known gains.

        Args:
            case: Run.

        Returns:
            D = max(l − s, hold · max(0, l − s₃)), in nats a token; below 0 where it ends above.
        """
        return max(case.base - case.end, self.hold * max(0.0, case.base - case.third))

    def value(self, case: SequenceCase) -> float:
        """Forecast without trials.

        Args:
            case: Run.

        Returns:
            p, in nats a token, never below 0.
        """
        return case.base - grown(case.base, self.gain(case), self.growth * case.doublings)

    def deviation(self, case: SequenceCase, doublings: float, loss: float) -> float:
        """Standard deviation of the error.

        Args:
            case: Run.
            doublings: δ, from the rows that were seen to those of the run.
            loss: Loss l − G that is forecast from what was seen.

        Returns:
            √(spread² + apart² a² + beyond² δ² g²).
        """
        free = slope(case.base, case.base - loss)
        return sqrt(self.spread**2 + (self.apart * case.apart) ** 2 + (self.beyond * doublings * free) ** 2)


def grown(base: float, gain: float, odds: float) -> float:
    """Raise a gain by log-odds.

    Args:
        base: Loss l before training.
        gain: D.
        odds: What the log-odds of D / l rise by.

    Returns:
        G; D as it is where it is no gain. No more than 99 % of l counts as gained.
    """
    if gain <= 0.0:
        return gain
    share = min(gain / base, MOST)
    return base / (1.0 + (1.0 - share) / share * exp(-odds))


def slope(base: float, gain: float) -> float:
    """Say by how much a gain rises with its log-odds.

    Args:
        base: Loss l before training.
        gain: G.

    Returns:
        g = G (1 − G / l), in nats; 0 where it is no gain.
    """
    return max(0.0, gain * (1.0 - gain / base))


@dataclass(frozen=True)
class SequenceCalibration:
    """Calibration of language models.

    Attributes:
        plain: Of runs without trials.
        tried: Of runs with one; None where the fit had none.
        groups: Data sets that it was fitted on.
        source: Study that it comes from.
        domain: What its runs have shown.
        trial_domain: What those with trials have shown, `known_rows` the rows of the trials.
    """

    plain: SequenceLine
    tried: SequenceLine | None
    groups: tuple[str, ...]
    source: str
    domain: Domain
    trial_domain: Domain | None = None

    def to_dict(self) -> dict[str, Any]:
        """Lay out as JSON.

        Returns:
            JSON-ready values.
        """
        return {"schema": SCHEMA, **asdict(self)}


def trial_value(line: SequenceLine, case: SequenceCase, plain: float) -> tuple[float, float, float]:
    """Forecast with a trial.

    Args:
        line: Of runs with trials.
        case: Run with its trial.
        plain: Forecast p without it.

    Returns:
        y in nats a token, δ from the trial's rows to those of the run, and the loss that the trial alone says.

    Raises:
        ConfigError: If the run has no trial.
    """
    if case.trial is None:
        raise ConfigError("this run has no trial: forecast it without")
    rows, ended = case.trial
    doublings = max(0.0, log2(case.train_rows / rows))
    weight = line.trust * min(1.0, 2.0 * sqrt(min(1.0, rows / case.train_rows)))
    level = case.base - grown(case.base, case.base - ended, line.growth * doublings)
    return plain + weight * (level - plain), doublings, level


def apply_sequence_calibration(calibration: SequenceCalibration, case: SequenceCase, run: Run) -> RunForecast:
    """Forecast the end of a run.

    Its interval is value ± 2^d · t · deviation with the 95 % quantile t of Student's distribution with data sets less
    one degrees of freedom and d from `reach`; there is none for d > 1. The run on the rows that were seen, simulated or
    as a trial, counts as farther away by the halvings from the fewest steps of the fit: it is mostly warm-up, and more
    rows then bring more. A trial farther from what was checked than the run itself changes nothing, which `note` says.

    Args:
        calibration: Calibration.
        case: What is known of the run.
        run: What kind of run it is.

    Returns:
        The forecast of `eval_loss` and `perplexity`; where it is withheld there is the order alone, by the same values.
    """
    least = calibration.domain.steps[0]
    reached, line, note = _reach(calibration.domain, run, least=least), calibration.plain, ""
    value = line.value(case)
    doublings, seen = case.doublings, value
    if case.trial is not None and calibration.tried is not None and calibration.trial_domain is not None:
        of_trial = _reach(calibration.trial_domain, replace(run, known_rows=case.trial[0]), least=least, trial=True)
        if of_trial.doublings > reached.doublings:
            note = f"The trial on {case.trial[0]:,} rows changes no forecast: {'; '.join(of_trial.reasons)}."
        else:
            reached, line = of_trial, calibration.tried
            value, doublings, seen = trial_value(line, case, value)
    if not all(map(isfinite, (case.base, case.third, case.end))):
        diverges = Reach(inf, ("the simulated run diverges",))
        return RunForecast(None, (inf, inf), diverges, run.kind, calibrated=False, note=note)
    if reached.withheld:
        return RunForecast(None, (perplexity_of(value), value), reached, run.kind, calibrated=False, note=note)
    half = reached.widening * float(stdtrit(line.degrees, 0.95)) * line.deviation(case, doublings, seen)
    low, high = max(0.0, value - half), value + half
    levels = {
        "eval_loss": Interval(value, low, high),
        "perplexity": Interval(perplexity_of(value), perplexity_of(low), perplexity_of(high)),
    }
    return RunForecast(levels, (levels["perplexity"].value, value), reached, run.kind, note=note)


def _reach(domain: Domain, run: Run, *, least: float, trial: bool = False) -> Reach:
    # of a model that was not seen that alone is said: the rest is no reason then
    if run.model not in domain.models:
        return Reach(inf, ("the calibration has seen no run of this model",))
    found = reach(domain, run, trial=trial)
    steps = run.epochs * ceil(run.known_rows / run.batch_size)
    lacking = log2(least / steps)
    if lacking <= ROUNDING:
        return found
    rows = "rows of the trial" if trial else "known rows"
    reason = f"{steps:,} steps on the {run.known_rows:,} {rows}, checked from {least:,.0f}"
    return Reach(found.doublings + lacking, (*found.reasons, reason))


def perplexity_of(loss: float) -> float:
    """Compute e^loss.

    Args:
        loss: Nats a token.

    Returns:
        Perplexity; infinite where that overflows.
    """
    return exp(loss) if loss < LARGEST_EXPONENT else inf


def largest_trial(shown: Sequence[Shown]) -> tuple[int, float] | None:
    """Take the trial that counts.

    Args:
        shown: Trials of one adapter and recipe.

    Returns:
        Rows and mean loss of those on the most rows; None without any, or where one of these diverged.
    """
    rows = max((one.rows for one in shown), default=0)
    losses = [one.outcomes["eval_loss"] for one in shown if one.rows == rows]
    if not losses or any(one.diverged for one in shown if one.rows == rows) or not all(map(isfinite, losses)):
        return None
    return rows, sum(losses) / len(losses)


def shipped_language_calibration() -> SequenceCalibration:
    """Read the calibration of language models that comes with foretune.

    Returns:
        The calibration.
    """
    text = (files("foretune.forecasting") / LANGUAGE_CALIBRATION).read_text(encoding="utf-8")
    return language_calibration_from(json.loads(text))


def language_calibration_from(content: Any) -> SequenceCalibration:
    """Read a calibration of language models.

    Args:
        content: As `SequenceCalibration.to_dict` gives it.

    Returns:
        The calibration.

    Raises:
        ConfigError: If it is none, or one of another version.
    """
    if not isinstance(content, Mapping) or content.get("schema") != SCHEMA:
        raise ConfigError(f"this is no calibration of language models of schema {SCHEMA}: fit it again")
    fields = {name: value for name, value in content.items() if name != "schema"}
    found = strictly(SequenceCalibration, fields, "calibration of language models")
    found.domain.check()
    return found
