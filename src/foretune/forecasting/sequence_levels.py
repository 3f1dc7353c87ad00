"""From simulated runs of a language model to forecasts, for one number of training rows or several.

Of a run on more rows than are known the run on the known ones is simulated: seen again and again instead of other rows
they would be learnt by heart. What more rows bring on top, the calibration knows from other runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from foretune.forecasting.calibration import RunForecast
from foretune.forecasting.linear_model import Start
from foretune.forecasting.reach import Run
from foretune.forecasting.rows import RowsCurve, RowsPoint, rows_curve
from foretune.forecasting.schedule import schedule_of
from foretune.forecasting.sequence_calibration import (
    SequenceCalibration,
    SequenceCase,
    apply_sequence_calibration,
    largest_trial,
    shipped_language_calibration,
)
from foretune.forecasting.sequence_simulation import SequenceRun
from foretune.forecasting.shown import Shown
from foretune.models.identity import fingerprint
from foretune.sequence_plan import SequencePlan
from foretune.settings.groups import Recipe


@dataclass(frozen=True)
class Levels:
    """What turns the simulated runs of a plan into forecasts.

    Attributes:
        plan: The placed model and the rows.
        calibration: Calibration.
        model: Fingerprint of the pretrained weights.
    """

    plan: SequencePlan
    calibration: SequenceCalibration
    model: str

    @property
    def known_rows(self) -> int:
        """Known rows n."""
        return len(self.plan.known.features)

    def seen(self, rows: int) -> int:
        """Say on how many rows the run on so many is simulated.

        Args:
            rows: Training rows N.

        Returns:
            min(N, n).
        """
        return min(rows, self.known_rows)

    def run(self, recipe: Recipe, rows: int, speed: float) -> Run:
        """Say what kind of run it is, to be compared with what the calibration has seen.

        Args:
            recipe: How it trains.
            rows: Training rows N.
            speed: s·r of the adapter: α, or α √r where it is scaled by that.

        Returns:
            The kind.
        """
        schedule = schedule_of(recipe, rows, seed=0)
        rate = float(schedule.rates().mean())
        return Run(
            model=self.model,
            hidden_head=False,
            classes=1,
            known_rows=self.seen(rows),
            train_rows=rows,
            eval_rows=len(self.plan.rows.evaluation.features),
            longest=max(len(feature["input_ids"]) for feature in self.plan.known.features),
            epochs=recipe.epochs,
            steps=schedule.steps,
            batch_size=recipe.train_batch_size,
            learning_rate=rate,
            update_rate=rate * speed,
            kind=self.plan.language.kind,
        )

    def forecast(self, found: SequenceRun, run: Run, shown: Sequence[Shown] = ()) -> RunForecast:
        """Forecast the end of a run.

        Args:
            found: The simulated run on `seen` rows.
            run: What kind of run it is.
            shown: Trials of the same adapter and recipe; those on more rows than the run has do not count.

        Returns:
            The forecast.
        """
        trial = largest_trial([one for one in shown if one.rows <= run.train_rows])
        return apply_sequence_calibration(self.calibration, case_of(found, run, trial), run)


def levels_of(plan: SequencePlan, calibration: SequenceCalibration | None) -> Levels:
    """Prepare what turns the simulated runs of a plan into forecasts.

    Args:
        plan: The placed model and the rows.
        calibration: Calibration; None takes the one that comes with foretune.

    Returns:
        The levels.
    """
    return Levels(plan, calibration or shipped_language_calibration(), fingerprint(plan.placed))


def case_of(found: SequenceRun, run: Run, trial: tuple[int, float] | None = None) -> SequenceCase:
    """Take what a calibration needs out of a simulated run.

    Args:
        found: The simulated run, on no more rows than are known.
        run: The run that is forecast.
        trial: Rows and loss of the largest trial.

    Returns:
        The case.
    """
    trajectory = found.run.trajectory
    return SequenceCase(
        base=trajectory.eval_loss[0],
        third=float(np.interp(trajectory.steps[-1] / 3.0, trajectory.steps, trajectory.eval_loss)),
        end=trajectory.eval_loss[-1],
        linear=found.linear_loss,
        known_rows=run.known_rows,
        train_rows=run.train_rows,
        trial=trial,
    )


def speed_of(start: Start) -> float:
    """Take the speed of an adapter.

    Args:
        start: Adapter.

    Returns:
        The largest s·r of its modules.
    """
    return max(s * len(a) for s, a in zip(start.scaling, start.a, strict=True))


def forecast_sequence_rows(
    levels: Levels,
    recipe: Recipe,
    rows: Sequence[int],
    simulate: Callable[[int], SequenceRun],
    *,
    speed: float,
    shown: Sequence[Shown] = (),
) -> RowsCurve:
    """Forecast the run on several numbers of rows, and say how many are enough.

    Args:
        levels: Plan and calibration.
        recipe: How it trains.
        rows: Numbers of rows, rising.
        simulate: Gives the simulated run on so many known rows, which several numbers may share.
        speed: s·r of the adapter.
        shown: What trials of it showed.

    Returns:
        The curve.
    """
    points = []
    for number in rows:
        run = levels.run(recipe, number, speed)
        points.append(RowsPoint(number, levels.forecast(simulate(levels.seen(number)), run, shown)))
    return rows_curve(points)


def stretched(steps: int, whole: int, to: int) -> int:
    """Say where a step of the simulated run lies in the course of a longer one.

    Args:
        steps: Steps done.
        whole: Steps of the simulated run.
        to: Steps of the run.

    Returns:
        The same share of these, rounded.
    """
    return round(steps * to / whole)
