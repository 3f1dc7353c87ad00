"""The forecast of one configuration's run: the end that it will reach, and the way there, before it is made."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig

from foretune.forecasting.calibration import Calibration
from foretune.forecasting.curve import Curve, forecast_run
from foretune.forecasting.linearise import check_linearisable
from foretune.forecasting.schedule import schedule_of
from foretune.forecasting.shown import Shown
from foretune.models.adapted import describe_placement
from foretune.models.classifier import Classifier
from foretune.problem import Plan, describe, prepare, settings_of_pass
from foretune.report.provenance import versions
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
        trials: Trials that it was made with: what `Shown` says, and their `passes` and `seconds`.
    """

    plan: Plan
    settings: ForecastSettings
    curve: Curve
    calibration: Calibration
    seconds: Mapping[str, float]
    trials: tuple[Mapping[str, Any], ...] = ()

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
            "model": plan.classifier.source,
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
            "notes": notes(self.curve),
            "trials": [dict(trial) for trial in self.trials],
            "calibration": {"source": self.calibration.source, "outputs": list(self.calibration.outputs)},
            "details": facts,
            "seconds": dict(self.seconds),
            "versions": versions(),
            "settings": dataclasses.asdict(self.settings),
        }
        laid_out: dict[str, Any] = finite(content)
        return laid_out


def notes(curve: Curve) -> list[str]:
    """Say what to keep in mind when reading a forecast.

    Args:
        curve: The forecast.

    Returns:
        Sentences.
    """
    verdict = curve.forecast.reach.verdict
    if not verdict:
        return []
    if curve.end is None:
        return [verdict, "Which of several adapters is better, foretune rank says by the simulated runs."]
    return [verdict]


def prepare_forecast(
    classifier: Classifier,
    task: Task,
    config: LoraConfig | None,
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
    plan = prepare(classifier, task, config, settings_of_pass(task, settings), inplace=inplace)
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
    """Carry out a plan: one pass over the samples, and the simulated run.

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
    curve = forecast_run(plan, settings, calibration, shown=shown, on_step=on_step)
    spent = time.perf_counter() - start
    seconds = {"load": seconds_load, "forecast": spent, "total": seconds_load + spent}
    return ForecastResult(plan, settings, curve, calibration, seconds)
