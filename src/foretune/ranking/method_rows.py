"""Rows of adapter methods beside LoRA: an order by the simulated run where there is one, and no level."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf, nan

import numpy as np

from foretune.errors import KernelError
from foretune.forecasting.calibration import Calibration, RunForecast, apply_calibration
from foretune.forecasting.reach import Reach
from foretune.forecasting.simulated_runs import case_values
from foretune.ntk.spectrum import spectrum
from foretune.problem import Plan
from foretune.ranking.budget import BYTES_PER_PARAMETER
from foretune.ranking.candidates import Candidate
from foretune.ranking.method_pass import Priced
from foretune.ranking.methods import with_steps
from foretune.ranking.recipes import RecipeRuns, after_epochs, best_epoch
from foretune.ranking.rows import Row
from foretune.ranking.step_cost import lengthened


def method_rows(
    priced: Sequence[Priced],
    runs: RecipeRuns,
    calibration: Calibration,
    plan: Plan,
    cost: Callable[[Candidate], float],
) -> list[Row]:
    """Make the rows of one recipe.

    The order of a simulated run is that of its forecast by the calibration of LoRA's runs, whose scale the rows of LoRA
    have. Two finished runs of each method were held against it (`studies/minilm-methods`), too few for a level. What
    has no simulated run has no order either, and stands behind what has.

    Args:
        priced: Placements.
        runs: The simulated runs of those that have one.
        calibration: Calibration of LoRA's runs.
        plan: Plan of the pass.
        cost: What a training step of a placement costs, relative to one through all layers, without the tokens that a
            prompt adds.

    Returns:
        A row for each placement.
    """
    simulated = iter(zip(runs.simulated, runs.kinds, strict=True))
    rows = []
    for entry in priced:
        quick = replace(entry.quick, config=with_steps(entry.quick.config, runs.steps))
        row = Row(
            quick=quick,
            recipe=runs.recipe,
            steps=runs.steps,
            said=_nothing_said(quick.method, plan),
            simulated=None,
            best_epoch=runs.recipe.epochs,
            update_rate=0.0,
            condition_number=_condition_number(entry, plan),
            megabytes=quick.parameters * BYTES_PER_PARAMETER / 1e6,
            compute=cost(quick.candidate) * lengthened(quick.config, float(plan.train.lengths.mean())),
        )
        if entry.start is not None:
            found, run = next(simulated)
            said = apply_calibration(calibration, case_values(found), plan.reduction.name, run=run)
            reasons = (*said.reach.reasons, f"two finished runs of {quick.method} alone were checked")
            row = replace(
                row,
                said=replace(said, levels=None, reach=Reach(inf, reasons)),
                simulated=found,
                best_epoch=best_epoch(*after_epochs(found.trajectory, runs.recipe.epochs), found.metric),
                update_rate=run.update_rate or 0.0,
                run=run,
            )
        rows.append(row)
    return rows


def _nothing_said(method: str, plan: Plan) -> RunForecast:
    reach = Reach(inf, (f"no run of {method} is simulated",))
    return RunForecast(None, (nan, inf), reach, kind=plan.task.objective.kind, calibrated=False)


def _condition_number(entry: Priced, plan: Plan) -> float:
    try:
        epsilon = float(np.finfo(np.float32).eps)
        return spectrum(entry.kernel, sigma=plan.settings.sigma, epsilon=epsilon).condition_number
    except KernelError:
        return nan
