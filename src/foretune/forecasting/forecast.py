"""The forecast of one configuration's run: the end that it will reach, and the way there, before it is made."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any

from peft import PeftConfig

from foretune.forecasting.calibration import Calibration
from foretune.forecasting.curve import Curve, forecast_run, linearise_run
from foretune.forecasting.linearise import check_linearisable
from foretune.forecasting.rows import RowsCurve, RowsPoint, forecast_rows, list_rows, rows_curve
from foretune.forecasting.schedule import schedule_of
from foretune.forecasting.seal import HASH, content_hash
from foretune.forecasting.shown import Shown
from foretune.models.adapted import describe_placement
from foretune.models.classifier import Classifier
from foretune.models.identity import fingerprint
from foretune.problem import Plan, describe, prepare, settings_of_pass
from foretune.report.provenance import now, versions
from foretune.report.store import finite
from foretune.settings.commands import ForecastSettings
from foretune.tasks.load import Task

SCHEMA = 1
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class ForecastResult:
    """What is said of one run.

    Attributes:
        plan: The placed model and the rows: those that train, those of them that are known, those to predict.
        settings: The run, and what is known of the data.
        curve: Its course and its end.
        calibration: What the forecast was calibrated with.
        seconds: Of `load`, `forecast` and `total`; of `trials` where there are any, whenever they were made.
        rows: The forecast over the numbers of rows that the settings list; None without a list.
        trials: Trials that it was made with: what `Shown` says, and their `passes` and `seconds`.
        made: When it was made, in UTC.
    """

    plan: Plan
    settings: ForecastSettings
    curve: Curve
    calibration: Calibration
    seconds: Mapping[str, float]
    rows: RowsCurve | None = None
    trials: tuple[Mapping[str, Any], ...] = ()
    made: str = field(default_factory=now)

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return schedule_of(self.settings, self.plan.train_rows, seed=self.settings.seed).steps

    def to_dict(self) -> dict[str, Any]:
        """Lay the forecast out as in `result.json` (docs/result.md).

        Returns:
            JSON-ready values; points and end are None where the level is withheld.
        """
        plan, facts = self.plan, describe(self.plan)
        sites = plan.adapted.sites
        content = {
            "schema": SCHEMA,
            "made": self.made,
            "model": plan.classifier.source,
            "weights": fingerprint(plan.placed),
            "dataset": plan.task.source,
            "placement": {
                **describe_placement(plan.placed.active_peft_config, sites),
                "modules": [site.name for site in sites],
                "trainable_parameters": sum(site.n_parameters for site in sites),
                "head_parameters": facts["head"]["parameters"],
            },
            "samples": plan.settings.samples,
            "train_rows": plan.train_rows,
            "eval_rows": facts["n_eval"],
            plan.task.objective.noun: plan.task.objective.n_outputs,
            "steps": self.steps,
            **self.curve.to_dict(),
            "rows": None if self.rows is None else self.rows.to_dict(),
            "notes": notes(self.curve),
            "trials": [dict(trial) for trial in self.trials],
            "spend": sum(trial["passes"] for trial in self.trials) / (self.settings.epochs * plan.train_rows),
            "calibration": {"source": self.calibration.source, "outputs": list(self.calibration.outputs)},
            "details": facts,
            "seconds": dict(self.seconds),
            "versions": versions(),
            "settings": dataclasses.asdict(self.settings),
        }
        laid_out: dict[str, Any] = finite(content)
        return {**laid_out, HASH: content_hash(laid_out)}


def notes(curve: Curve) -> list[str]:
    """Say what to keep in mind when reading a forecast.

    Args:
        curve: The forecast.

    Returns:
        Sentences.
    """
    verdict, trial = curve.forecast.reach.verdict, curve.forecast.note
    found = [note for note in (trial, verdict) if note]
    if verdict and curve.end is None:
        found.append("Which of several adapters is better, foretune rank says by the simulated runs.")
    return found


def prepare_forecast(
    classifier: Classifier,
    task: Task,
    config: PeftConfig | None,
    settings: ForecastSettings,
    *,
    inplace: bool = False,
) -> Plan:
    """Place the adapters, draw the known rows and tokenise them: all that can go wrong before the work starts.

    Args:
        classifier: Model and tokenizer.
        task: Data.
        config: peft's configuration; None if the model is a peft model already.
        settings: Settings.
        inplace: Whether the adapters may go into the classifier's own model instead of a copy.

    Returns:
        The plan.
    """
    plan = prepare(classifier, task, config, settings_of_pass(task, settings, memory=settings.memory), inplace=inplace)
    check_linearisable(plan)
    return plan


def run_forecast(
    plan: Plan,
    settings: ForecastSettings,
    calibration: Calibration,
    *,
    shown: Sequence[Shown] = (),
    seconds_load: float = 0.0,
    on_step: OnStep | None = None,
) -> ForecastResult:
    """Carry out a plan: one pass over the samples, and the simulated runs.

    Args:
        plan: From `prepare_forecast`.
        settings: Settings that it was made with.
        calibration: Calibration of the forecast.
        shown: What trials of this adapter showed.
        seconds_load: Time that loading took, for the record.
        on_step: Called with the steps done and the steps in all.

    Returns:
        The result.
    """
    start = time.perf_counter()
    model = cache(lambda: linearise_run(plan))  # made where a run is simulated, once for all of them
    listed = list_rows(plan, settings, calibration, settings.rows or (), shown=shown)
    own, of_list = 0, sum(entry.steps for entry in listed)
    tell = on_step or (lambda *_: None)

    def own_step(done: int, total: int) -> None:
        nonlocal own
        own = total
        tell(done, own + of_list)

    curve = forecast_run(plan, settings, calibration, model=model, shown=shown, on_step=own_step)
    rows = None
    if settings.rows is not None:
        done = count(own + 1)
        points = forecast_rows(listed, calibration, model, on_step=lambda: tell(next(done), own + of_list))
        known = {point.rows: point for point in (*points, RowsPoint(plan.train_rows, curve.forecast))}
        rows = rows_curve([known[n_rows] for n_rows in settings.rows])
    spent = time.perf_counter() - start
    seconds = {"load": seconds_load, "forecast": spent, "total": seconds_load + spent}
    return ForecastResult(plan, settings, curve, calibration, seconds, rows)
