"""The forecast of a language model's run, before it is made.

No calibration knows language models yet: what comes is the simulated run (`foretune.forecasting.sequence_simulation`),
with no interval.
"""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

from foretune.forecasting.calibration import RunForecast
from foretune.forecasting.curve import Curve, bend
from foretune.forecasting.reach import Reach
from foretune.forecasting.schedule import schedule_of
from foretune.forecasting.seal import HASH, content_hash
from foretune.forecasting.sequence_simulation import (
    DRAWS,
    KIND,
    Measured,
    SequenceRun,
    linearise_sequences,
    simulate_sequences,
)
from foretune.models.adapted import describe_placement
from foretune.models.identity import fingerprint
from foretune.report.provenance import now, versions
from foretune.report.store import finite
from foretune.sequence_plan import OnBatch, SequencePlan, describe_sequences
from foretune.settings.commands import ForecastSettings
from foretune.settings.sizes import parse_bytes

SCHEMA = 1
NO_CALIBRATION = "no calibration knows causal language models"


@dataclass(frozen=True)
class SequenceForecast:
    """What is said of one run of a language model.

    Attributes:
        plan: The placed model and the rows.
        settings: The run, and what is known of the data.
        curve: Its simulated course; no level and no interval.
        run: The simulated run.
        base: The model without training.
        kept: Share of the gradients' energy that the sketches keep, of the modules on the whole and of the least.
        directions: Directions of inputs and gradients that they keep.
        seconds: Of `load`, `forecast` and `total`.
        made: When it was made, in UTC.
    """

    plan: SequencePlan
    settings: ForecastSettings
    curve: Curve
    run: SequenceRun
    base: Measured
    kept: tuple[float, float]
    directions: int
    seconds: Mapping[str, float]
    made: str = field(default_factory=now)

    def to_dict(self) -> dict[str, Any]:
        """Lay the forecast out as in `result.json` (docs/result.md): the same keys as of a classifier.

        Returns:
            JSON-ready values; `points` and `end` are None.
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
            "rows": None,
            "notes": self.notes(),
            "trials": [],
            "spend": 0.0,
            "simulated_end": self.run.end_to_dict(),
            "base": self.base.to_dict(),
            "sketches": {
                "directions": self.directions,
                "draws": DRAWS,
                "kept": self.kept[0],
                "kept_least": self.kept[1],
            },
            "calibration": None,
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
        known, rows = self.run.run.samples, self.run.run.train_rows
        found = [f"{NO_CALIBRATION.capitalize()} yet: this is the simulated run as it is, without an interval."]
        if self.run.apart:
            found.append(
                f"The linearised model ends at {self.run.linear_loss:.3f} where the model with the same A and B has "
                f"{self.run.run.end.eval_loss:.3f}: the run leaves the ground that it was linearised on. Take its "
                "order among adapters, not its level."
            )
        if rows > known:
            found.append(
                f"It sees the {known} known rows again and again where the run has {rows:,}: its loss on other rows "
                "will rise where the real one still falls."
            )
        return found


def forecast_sequences(
    plan: SequencePlan,
    settings: ForecastSettings,
    *,
    seconds_load: float = 0.0,
    on_batch: OnBatch | None = None,
) -> SequenceForecast:
    """Forecast the course of the run that trains an adapter.

    Args:
        plan: From `foretune.sequence_plan.prepare_sequences`.
        settings: How the run trains, and what it is known from.
        seconds_load: Time that loading took, for the record.
        on_batch: Called with the number of sequences after each batch that goes through the model, `n_passed` in all.

    Returns:
        The forecast.
    """
    start = time.perf_counter()
    schedule = schedule_of(settings, plan.train_rows, seed=settings.seed)
    linearised = linearise_sequences(plan, parse_bytes("memory", settings.memory), on_batch=on_batch)
    adapter = linearised.start(range(len(linearised.sites)))
    (found,) = simulate_sequences(plan, linearised, [adapter], schedule, on_batch=on_batch)
    run = found.run
    order = (run.end.eval_metric, run.end.eval_loss)
    unseen = RunForecast(None, order, Reach(inf, (NO_CALIBRATION,)), KIND, calibrated=False)
    sketches = linearised.train.sketches
    spent = time.perf_counter() - start
    return SequenceForecast(
        plan,
        settings,
        bend(run, unseen),
        found,
        linearised.base,
        sketches.shares,
        max(basis.h.shape[1] for basis in sketches.bases),
        {"load": seconds_load, "forecast": spent, "total": seconds_load + spent},
    )
