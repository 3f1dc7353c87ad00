"""The forecast of a language model's run, before it is made.

The run is simulated and plugged into the model (`foretune.forecasting.sequence_simulation`); a calibration makes a
level with an interval of it, of the kind of runs that it has seen (`foretune.forecasting.sequence_calibration`). Of
others what comes is the simulated run as it is, without an interval.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from foretune.forecasting.cautions import cautions_of_loss
from foretune.forecasting.curve import Curve, bend
from foretune.forecasting.rows import RowsCurve
from foretune.forecasting.schedule import schedule_of
from foretune.forecasting.seal import HASH, content_hash
from foretune.forecasting.sequence_calibration import SequenceCalibration
from foretune.forecasting.sequence_levels import forecast_sequence_rows, levels_of, speed_of, stretched
from foretune.forecasting.sequence_simulation import (
    DRAWS,
    Measured,
    SequenceRun,
    linearise_sequences,
    simulate_sequences,
)
from foretune.forecasting.shown import Shown
from foretune.models.adapted import describe_placement
from foretune.models.identity import fingerprint
from foretune.report.curves import CurvePoint
from foretune.report.provenance import now, versions
from foretune.report.store import finite
from foretune.sequence_plan import OnBatch, SequencePlan, describe_sequences
from foretune.settings.commands import ForecastSettings

SCHEMA = 1
EFFECT = 0.02  # nats a token: less is no effect


@dataclass(frozen=True)
class SequenceForecast:
    """What is said of one run of a language model.

    Attributes:
        plan: The placed model and the rows.
        settings: The run, and what is known of the data.
        curve: Its course and its end with intervals; where no level is given, as simulated.
        run: The simulated run, on no more rows than are known.
        base: The model without training.
        kept: Share of the gradients' energy that the sketches keep, of the modules on the whole and of the least.
        directions: Directions of inputs and gradients that they keep.
        seconds: Of `load`, `forecast` and `total`; of `trials` where there are any, whenever they were made.
        rows: The forecast over the listed numbers of training rows; None where none are listed.
        calibration: Study that the calibration comes from.
        made: When it was made, in UTC.
        trials: What trials of this adapter showed, with their `passes` and `seconds`.
    """

    plan: SequencePlan
    settings: ForecastSettings
    curve: Curve
    run: SequenceRun
    base: Measured
    kept: tuple[float, float]
    directions: int
    seconds: Mapping[str, float]
    rows: RowsCurve | None = None
    calibration: str | None = None
    made: str = field(default_factory=now)
    trials: tuple[Mapping[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Lay the forecast out as in `result.json` (docs/result.md): the same keys as of a classifier.

        Returns:
            JSON-ready values; `points` and `end` are None where no level is given.
        """
        plan, facts = self.plan, describe_sequences(self.plan)
        sites = plan.adapted.sites
        content = {
            "schema": SCHEMA,
            "made": self.made,
            "model": plan.language.source,
            "weights": fingerprint(plan.placed),
            "dataset": plan.task.source,
            "placement": {
                **describe_placement(plan.placed.active_peft_config, sites),
                "modules": [site.name for site in sites],
                "trainable_parameters": sum(site.n_parameters for site in sites),
                "head_parameters": 0,
            },
            "samples": facts["n"],
            "train_rows": plan.train_rows,
            "eval_rows": facts["n_eval"],
            "steps": schedule_of(self.settings, plan.train_rows, seed=self.settings.seed).steps,
            **self.curve.to_dict(),
            "rows": None if self.rows is None else self.rows.to_dict(),
            "notes": self.notes(),
            "trials": [dict(trial) for trial in self.trials],
            "spend": sum(trial["passes"] for trial in self.trials) / (self.settings.epochs * plan.train_rows),
            "simulated_end": self.run.end_to_dict(),
            "base": self.base.to_dict(),
            "sketches": {
                "directions": self.directions,
                "draws": DRAWS,
                "kept": self.kept[0],
                "kept_least": self.kept[1],
            },
            "calibration": self.calibration,
            "details": facts,
            "seconds": dict(self.seconds),
            "versions": versions(),
            "settings": dataclasses.asdict(self.settings),
        }
        laid_out: dict[str, Any] = finite(content)
        return {**laid_out, HASH: content_hash(laid_out)}

    def notes(self) -> list[str]:
        """Say what to keep in mind when reading the forecast.

        Returns:
            Sentences.
        """
        forecast, found = self.curve.forecast, []
        if forecast.levels is None:
            found.append(f"{forecast.reach.verdict} This is the simulated run as it is, without an interval.")
        elif forecast.reach.verdict:
            found.append(forecast.reach.verdict)
        if forecast.note:
            found.append(forecast.note)
        if self.run.apart:
            so = ". Take its order among adapters, not its level." if forecast.levels is None else "; it is less sure."
            found.append(
                f"The linearised model ends at {self.run.linear_loss:.3f} where the model with the same A and B has "
                f"{self.run.run.end.eval_loss:.3f}: the run leaves the ground that it was linearised on{so}"
            )
        known, rows = self.run.run.samples, self.plan.train_rows
        if rows > known:
            more = (
                "what more rows bring is not in it"
                if forecast.levels is None
                else "the rest is what more rows brought others"
            )
            found.append(f"The run on the {known:,} known rows is simulated, of {rows:,}; {more}.")
        return found


def forecast_sequences(
    plan: SequencePlan,
    settings: ForecastSettings,
    *,
    calibration: SequenceCalibration | None = None,
    shown: Sequence[Shown] = (),
    seconds_load: float = 0.0,
    on_batch: OnBatch | None = None,
) -> SequenceForecast:
    """Forecast the course of the run that trains an adapter.

    Args:
        plan: From `foretune.sequence_plan.prepare_sequences`.
        settings: How the run trains, and what it is known from.
        calibration: Calibration; None takes the one that comes with foretune.
        shown: What trials of this adapter showed.
        seconds_load: Time that loading took, for the record.
        on_batch: Called with the number of sequences after each batch that goes through the model, `n_passed` in all.

    Returns:
        The forecast.
    """
    start = time.perf_counter()
    levels = levels_of(plan, calibration)
    linearised = linearise_sequences(plan, settings.of_sequences, on_batch=on_batch)
    adapter = linearised.start(range(len(linearised.sites)))

    @cache
    def simulate(rows: int) -> SequenceRun:
        schedule = schedule_of(settings, rows, seed=settings.seed)
        (simulated,) = simulate_sequences(plan, linearised, [adapter], schedule, on_batch=on_batch)
        return simulated

    found, speed = simulate(levels.seen(plan.train_rows)), speed_of(adapter)
    run = levels.run(settings, plan.train_rows, speed)
    forecast = levels.forecast(found, run, shown)
    told = cautions_of_loss(forecast, levels.calibration.plain.degrees, base=linearised.base.loss, margin=EFFECT)
    curve = replace(_stretch(bend(found.run, forecast), run.steps), cautions=told)
    rows = None
    if settings.rows is not None:
        rows = forecast_sequence_rows(levels, settings, settings.rows, simulate, speed=speed, shown=shown)
    sketches = linearised.train.sketches
    spent = time.perf_counter() - start
    return SequenceForecast(
        plan,
        settings,
        curve,
        found,
        linearised.base,
        sketches.shares,
        max(basis.h.shape[1] for basis in sketches.bases),
        {"load": seconds_load, "forecast": spent, "total": seconds_load + spent},
        rows,
        levels.calibration.source,
    )


def _stretch(curve: Curve, steps: int) -> Curve:
    """Lay the course of a run on fewer rows over the steps of the one that is forecast."""

    def over(points: Sequence[CurvePoint]) -> tuple[CurvePoint, ...]:
        return tuple(replace(point, step=stretched(point.step, points[-1].step, steps)) for point in points)

    return replace(curve, points=over(curve.points), simulated=over(curve.simulated))
