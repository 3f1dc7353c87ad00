"""What the simulation says of each adapter, before calibration: at the end of the recipe, and over its steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import log2

import numpy as np

from foretune.forecasting.linear_model import Start
from foretune.forecasting.linearise import Survey, probe_scores
from foretune.forecasting.reach import Run
from foretune.forecasting.recipe import Recipe
from foretune.forecasting.simulate import Course, simulate
from foretune.models.identity import fingerprint
from foretune.models.placement import head_modules
from foretune.problem import Plan
from foretune.tasks.metrics import Metric

ENTRIES = 30_000_000  # trained numbers that are simulated side by side, with AdamW's moments 360 MB


@dataclass(frozen=True)
class Ending:
    """The end of a simulated run, in the units of its objective.

    Attributes:
        train_loss: Mean over the batches of the last epoch, as a run's log gives it.
        eval_loss: On the evaluation examples.
        eval_metric: The main metric on them.
    """

    train_loss: float
    eval_loss: float
    eval_metric: float

    def to_dict(self, metric: Metric) -> dict[str, float]:
        """Lay out as in `result.json`.

        Args:
            metric: What `eval_metric` is.

        Returns:
            Losses, and the metric under its name.
        """
        return {
            "train_loss": self.train_loss,
            "eval_loss": self.eval_loss,
            f"eval_{metric.name}": self.eval_metric,
        }


@dataclass(frozen=True)
class Outlook:
    """What is known of one adapter without training it.

    Attributes:
        course: The simulated run.
        end: Its end.
        probe_loss: Loss of the linear probe on the evaluation examples.
        probe_metric: Its main metric on them.
        samples: Labelled training examples n.
        train_rows: Training rows N of the run.
        metric: The main metric.
    """

    course: Course
    end: Ending
    probe_loss: float
    probe_metric: float
    samples: int
    train_rows: int
    metric: Metric


def outlooks(
    survey: Survey,
    starts: Sequence[Start],
    recipe: Recipe,
    *,
    points: int = 1,
    train_a: bool = True,
    on_step: Callable[[], None] | None = None,
) -> tuple[Outlook, ...]:
    """Simulate the recipe for each adapter.

    Args:
        survey: The pass over the samples.
        starts: Adapters.
        recipe: Recipe of the run; its rows may be more than the samples.
        points: Evaluations over the steps.
        train_a: Whether A trains.
        on_step: Called after each step of each group of adapters, `n_steps` times in all.

    Returns:
        One for each adapter.
    """
    n, metric = survey.train.factors.n, survey.train.objective.metric
    recipe = replace(recipe, train_rows=max(recipe.train_rows, n))
    known = probe_scores(survey.evaluation)
    found: list[Outlook] = []
    for group in _groups(starts):
        courses = simulate(
            group,
            survey.head,
            survey.train,
            survey.evaluation,
            recipe,
            points=points,
            train_a=train_a,
            on_step=on_step,
        )
        found += [Outlook(course, ending(course, recipe), *known, n, recipe.train_rows, metric) for course in courses]
    return tuple(found)


def kind_of(plan: Plan, recipe: Recipe) -> Run:
    """Say what kind of run a recipe makes of a plan, to be held against what a calibration has seen.

    Args:
        plan: Plan of the pass.
        recipe: Recipe of the run.

    Returns:
        The kind, without an adapter.
    """
    known = len(plan.train.features)
    idle = () if plan.adapted.layout is None else plan.adapted.layout.idle
    return Run(
        model=fingerprint(plan.placed),
        hidden_head=sum(name not in idle for name in head_modules(plan.placed)) > 1,
        classes=plan.task.objective.n_outputs,
        known_rows=known,
        train_rows=max(recipe.train_rows, known),
        eval_rows=0 if plan.evaluation is None else len(plan.evaluation.features),
        longest=int(plan.train.lengths.max()),
        epochs=recipe.epochs,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        learning_rate=float(recipe.rates().mean()),
        update_rate=None,
        kind=plan.task.objective.kind,
    )


def runs_of(kind: Run, starts: Sequence[Start]) -> tuple[Run, ...]:
    """Say what kind of runs are simulated.

    Args:
        kind: Their kind without an adapter.
        starts: Adapters.

    Returns:
        One for each adapter, with its rate.
    """
    speeds = [[s * len(a) for s, a in zip(start.scaling, start.a, strict=True)] for start in starts]
    return tuple(replace(kind, update_rate=kind.learning_rate * max(speed)) if speed else kind for speed in speeds)


def ending(course: Course, recipe: Recipe) -> Ending:
    """Read the end off a course.

    Args:
        course: Simulated run.
        recipe: Its recipe.

    Returns:
        Losses and metric.
    """
    last = course.batch_loss[-recipe.steps_per_epoch :]
    return Ending(float(np.mean(last)), course.eval_loss[-1], course.eval_metric[-1])


def n_steps(starts: Sequence[Start], recipe: Recipe) -> int:
    """Count the steps that `outlooks` simulates, for a progress bar.

    Args:
        starts: Adapters.
        recipe: Recipe.

    Returns:
        Steps, summed over groups of adapters.
    """
    return len(_groups(starts)) * recipe.steps


def _groups(starts: Sequence[Start]) -> list[list[Start]]:
    """Adapters side by side, as many as memory allows: each token is read once for all of them."""
    groups: list[list[Start]] = []
    held = ENTRIES + 1
    for start in starts:
        size = sum(2 * a.numel() for a in start.a)
        if held + size > ENTRIES:
            groups.append([])
            held = 0
        groups[-1].append(start)
        held += size
    return groups


def case_values(outlook: Outlook) -> dict[str, float]:
    """Take what a calibration needs out of an outlook.

    Args:
        outlook: Outlook.

    Returns:
        Numbers by name, those of the metric under its name.
    """
    name = outlook.metric.name
    return {
        "simulated_train_loss": outlook.end.train_loss,
        "simulated_eval_loss": outlook.end.eval_loss,
        f"simulated_{name}": outlook.end.eval_metric,
        "probe_loss": outlook.probe_loss,
        f"probe_{name}": outlook.probe_metric,
        "movement": outlook.course.movement,
        "doublings": log2(max(1.0, outlook.train_rows / outlook.samples)),
    }
