"""Every finalist under every recipe: which runs are simulated, and what is read off them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isnan

from foretune.errors import ConfigError
from foretune.forecasting.cautions import collapse_caution
from foretune.forecasting.linear_model import Start
from foretune.forecasting.linearise import Linearised
from foretune.forecasting.reach import Run
from foretune.forecasting.risk import Risk
from foretune.forecasting.schedule import Schedule, schedule_of
from foretune.forecasting.simulate import Trajectory
from foretune.forecasting.simulated_runs import SimulatedRun, head_alone_on, kind_of, n_steps, runs_of, simulate_runs
from foretune.problem import Plan
from foretune.ranking.recommend import in_words, tie_note
from foretune.ranking.rows import Row
from foretune.settings.commands import RankSettings
from foretune.settings.groups import FEWEST_ROWS, MOST_RUNS, Recipe
from foretune.settings.spend import parse_spend
from foretune.tasks.metrics import Metric

_VERDICTS = 3  # that are told in full


@dataclass(frozen=True)
class RecipeRuns:
    """The simulated runs of one recipe.

    Attributes:
        recipe: How they train.
        steps: Steps of each.
        simulated: One for each start.
        kinds: What kind of run each is, to be compared with what a calibration has seen.
        head_alone: Main metric of the head without an adapter on fewer rows, as trials have them, by rising rows; none
            where nothing is spent on trials.
    """

    recipe: Recipe
    steps: int
    simulated: tuple[SimulatedRun, ...]
    kinds: tuple[Run, ...]
    head_alone: tuple[tuple[int, float], ...] = ()


def check_runs(settings: RankSettings, listed: int) -> None:
    """Refuse more simulated runs than anybody waits for, before any work.

    Args:
        settings: What the user asked for.
        listed: Candidates that were listed; under a budget a search finds more.

    Raises:
        ConfigError: If finalists times recipes are more than 256, naming how many finalists fit.
    """
    recipes = len(settings.each())
    finalists = settings.finalists if settings.budget is not None else min(settings.finalists, listed)
    if finalists * recipes <= MOST_RUNS:
        return
    rates, lengths = len(set(settings.learning_rate)), len(set(settings.epochs))
    raise ConfigError(
        f"{finalists:,} finalists times {rates} learning rates times {lengths} numbers of epochs are "
        f"{finalists * recipes:,} runs, and at most {MOST_RUNS} are simulated: use --finalists {MOST_RUNS // recipes}, "
        "or name fewer rates or epochs"
    )


def simulate_recipes(
    linearised: Linearised,
    starts: Sequence[Start],
    settings: RankSettings,
    plan: Plan,
    counter: Callable[[int], Callable[[], None]],
) -> tuple[RecipeRuns, ...]:
    """Simulate each adapter under each recipe, evaluated at the end of every epoch.

    Args:
        linearised: The model after the pass over the samples.
        starts: Adapters.
        settings: The recipes, and the seed of the order of the rows.
        plan: Plan of the pass.
        counter: Takes the steps in all, and gives what to call after each.

    Returns:
        The runs of each recipe.
    """
    schedules = [(recipe, schedule_of(recipe, plan.train_rows, seed=settings.seed)) for recipe in settings.each()]
    on_step = counter(sum(n_steps(starts, schedule) for _, schedule in schedules))
    return tuple(
        RecipeRuns(
            recipe,
            schedule.steps,
            simulate_runs(linearised, starts, schedule, on_step=on_step),
            runs_of(kind_of(plan, schedule), starts),
            _head_alone(linearised, schedule) if parse_spend(settings.spend) else (),
        )
        for recipe, schedule in schedules
    )


def _head_alone(linearised: Linearised, schedule: Schedule) -> tuple[tuple[int, float], ...]:
    most, sizes = min(linearised.train.factors.n, schedule.train_rows), [FEWEST_ROWS]
    while 2 * sizes[-1] <= most:
        sizes.append(2 * sizes[-1])
    sizes = [rows for rows in sizes if rows <= most]
    return tuple((rows, head_alone_on(linearised, schedule, rows).eval_metric) for rows in sizes)


def after_epochs(trajectory: Trajectory, epochs: int) -> tuple[list[float], list[float]]:
    """Take the evaluations after each epoch out of those at `Schedule.looks`.

    Args:
        trajectory: Simulated run.
        epochs: Its epochs.

    Returns:
        Main metric and loss after each epoch.
    """
    ends = [trajectory.steps[-1] // epochs * epoch for epoch in range(1, epochs + 1)]
    at = [trajectory.steps.index(end) for end in ends]
    return [trajectory.eval_metric[place] for place in at], [trajectory.eval_loss[place] for place in at]


def best_epoch(metrics: Sequence[float], losses: Sequence[float], metric: Metric) -> int:
    """Find the epoch after which a run was best.

    Args:
        metrics: The main metric after each epoch.
        losses: The evaluation loss after each.
        metric: The main metric.

    Returns:
        The epoch, from 1: by the metric, one that is not defined last, then by the loss; of equal ones the first.
    """

    def key(epoch: int) -> tuple[float, float]:
        value, loss = -metric.better * metrics[epoch - 1], losses[epoch - 1]
        return (inf if isnan(value) else value), (inf if isnan(loss) else loss)

    return min(range(1, len(metrics) + 1), key=key)


def notes_of(rows: Sequence[Row], recipes: Sequence[Recipe], risk: Risk | None) -> tuple[str, ...]:
    """Say what to keep in mind when reading the rows.

    Args:
        rows: Rows in order, marked.
        recipes: Recipes of the ranking.
        risk: Of a collapse, from the calibration; None where no finished run tells.

    Returns:
        Sentences.
    """
    (best,) = (row for row in rows if row.recommended)
    return (*verdicts(rows), *tie_note(rows, len(recipes)), *rate_note(best, recipes, risk))


def verdicts(rows: Sequence[Row]) -> tuple[str, ...]:
    """Say which rows lie outside of what the calibration has seen, and what becomes of their forecasts.

    Args:
        rows: Rows in order. Those of methods beside LoRA, which have notes of their own, count where there are no
            others.

    Returns:
        A sentence for each way to lie outside, the first of them in full.
    """
    of_lora = [row for row in rows if row.quick.config is None]
    every = tuple(dict.fromkeys(row.said.reach.verdict for row in of_lora or rows if row.said.reach.reasons))
    if len(every) <= _VERDICTS + 1:
        return every
    more = len(every) - _VERDICTS
    return (*every[:_VERDICTS], f"Other rows lie outside for {more} other reasons: result.json has them under reach.")


def rate_note(row: Row, recipes: Sequence[Recipe], risk: Risk | None) -> tuple[str, ...]:
    """Say that the recommended row may collapse, or moves its adapter at a rate far from those of finished runs.

    Args:
        row: The row.
        recipes: Recipes of the ranking.
        risk: Of a collapse; None where no finished run tells.

    Returns:
        A sentence if there is something to be told.
    """
    if risk is None or row.risk is None:
        return ()
    said = collapse_caution(risk, row.update_rate, row.steps).sentence
    return (f"{in_words(row, len(recipes))}: {said} Another α moves an adapter as another rate does.",) if said else ()
