"""What a ranking holds: a row for each finalist and recipe, in order, and what all rows share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peft import LoraConfig

from foretune.forecasting.calibration import Calibration, Interval, RunForecast, tied
from foretune.forecasting.reach import Run
from foretune.forecasting.risk import expected
from foretune.forecasting.simulated_runs import SimulatedRun
from foretune.models.sites import Site
from foretune.ranking.finalists import Quick
from foretune.settings.groups import Recipe
from foretune.tasks.objective import Objective


@dataclass(frozen=True)
class Row:
    """A finalist of the ranking under one recipe.

    Attributes:
        quick: Candidate and quick score.
        recipe: How its run trains.
        steps: Steps of the run.
        said: Forecast, and whether the run lies within what the calibration has seen.
        simulated: The simulated run, before calibration; None of a method whose runs are not simulated.
        best_epoch: Epoch of it after which the main metric was best; of equal ones that of the smallest loss.
        update_rate: Mean learning rate times s·r, at which the adapter moves.
        condition_number: κ of the kernel averaged over draws of A.
        megabytes: Size of the adapter's file in 10⁶ bytes.
        compute: Cost of a training step relative to one that goes back through all layers.
        tie: Whether its main metric cannot be told from that of the first row.
        recommended: Whether it is the one to train: the cheapest of those that cannot be told from the first.
        run: What kind of run it is, to be compared with what a calibration has seen; None where nothing is.
        trials: Its trials, those with the fewest rows first, as in `result.json`.
        collapsed: Rows of the trial in which it collapsed; None where it did not, or was not tried.
        risk: Probability that a run at its rate collapses; None where no finished run tells.
        floor: Main metric that a collapsed run ends at: of the head alone or of one prediction for all, what is better.
    """

    quick: Quick
    recipe: Recipe
    steps: int
    said: RunForecast
    simulated: SimulatedRun | None
    best_epoch: int
    update_rate: float
    condition_number: float
    megabytes: float
    compute: float
    tie: bool = False
    recommended: bool = False
    run: Run | None = None
    trials: tuple[Mapping[str, Any], ...] = ()
    collapsed: int | None = None
    risk: float | None = None
    floor: float | None = None

    @property
    def forecast(self) -> Mapping[str, Interval] | None:
        """Forecasts by outcome, `eval_loss`, the main metric and, inside, `train_loss`, each with its 90% interval.

        None where they are withheld: `said.reach.reasons` says why, and the order of the rows is all there is.
        """
        return self.said.levels

    @property
    def ends_late(self) -> bool:
        """Whether the best epoch is not the last."""
        return self.best_epoch < self.recipe.epochs

    @property
    def judged(self) -> RunForecast:
        """The forecast, put into order by the metric that is to be expected of a run that may collapse."""
        value, loss = self.said.order
        if self.risk is None or self.floor is None or not isfinite(value):
            return self.said
        return replace(self.said, order=(expected(value, self.risk, self.floor), loss))

    @property
    def key(self) -> tuple[bool, float, float]:
        """Sorts what is to be expected the most of first, and what collapsed in a trial behind all that did not."""
        return (self.collapsed is not None, *self.judged.key)


@dataclass(frozen=True)
class Spent:
    """What went into trials.

    Attributes:
        share: Share of one full run, that of the dearest recipe.
        passes: The same in sample passes.
        note: In words: how much of what was asked for.
    """

    share: float
    passes: float
    note: str


@dataclass(frozen=True)
class Ranking:
    """Ranked adapters of one model on one data set.

    Attributes:
        model: Model as given.
        dataset: Data set as given.
        modules: Names of all modules of the model, which itself is not kept.
        template: peft's configuration of all modules, from which a candidate's is made.
        sites: Every module that can be adapted.
        recipes: Recipes that every finalist was simulated with.
        rows: Finalists with their recipes, the best first.
        quick: All candidates, by quick score.
        single: Quick score of every module alone, at the largest of the ranks, whether it fits the budget or not.
        head_alone: Forecast of the head without an adapter, under the recipe that is best for it.
        head_recipe: That recipe.
        head_runs: For each recipe the main metric that the head without an adapter reaches on fewer rows, simulated, by
            rising rows; none where nothing is spent on trials.
        constant: Main metric of one prediction for all, the best for the evaluation samples: of classes the share of
            the most frequent one. None where it is not defined.
        samples: Labelled training samples.
        train_rows: Training rows of the run that is forecast.
        objective: Kind of task.
        steps: Steps of the longest run.
        equal_size: Parameters that all adapters have, nearly; None where they differ.
        notes: What to keep in mind when reading it.
        seconds: Of `load`, `pass`, `quick` and `simulate`; of `trials` where there are any, whenever they were made.
        spent: What went into trials; None where nothing was to be spent.
    """

    model: str
    dataset: str
    modules: tuple[str, ...]
    template: LoraConfig
    sites: tuple[Site, ...]
    recipes: tuple[Recipe, ...]
    rows: tuple[Row, ...]
    quick: tuple[Quick, ...]
    single: NDArray[np.float64]
    head_alone: RunForecast
    head_recipe: Recipe
    head_runs: tuple[tuple[tuple[int, float], ...], ...]
    constant: float | None
    samples: int
    train_rows: int
    objective: Objective
    steps: int
    equal_size: int | None
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    spent: Spent | None = None


def sort_key(row: Row) -> tuple[Any, ...]:
    """Say where a row belongs.

    Args:
        row: Row.

    Returns:
        Sorts the better row first; of equal forecasts the smaller adapter, then the shorter run, then the lower rate.
    """
    return (*row.key, row.quick.parameters, row.recipe.epochs, row.recipe.learning_rate)


def ordered(rows: Sequence[Row], calibration: Calibration) -> tuple[Row, ...]:
    """Put the rows of one ranking into order.

    Args:
        rows: Rows.
        calibration: Calibration of their forecasts.

    Returns:
        The best first, by `sort_key`. Those that cannot be told from the first are marked.
    """
    first, *others = sorted(rows, key=sort_key)
    return (
        replace(first, tie=False),
        *(replace(row, tie=_alike(first, row) and tied(calibration, first.judged, row.judged)) for row in others),
    )


def _alike(first: Row, row: Row) -> bool:
    """What collapsed can be told from what did not."""
    return (first.collapsed is None) == (row.collapsed is None)


def best_first(rankings: Sequence[Ranking]) -> list[tuple[Ranking, Row]]:
    """Put the rows of several rankings into one order: data sets apart, models of one data set together.

    Args:
        rankings: Rankings.

    Returns:
        Rows with their ranking, by data set, then by forecast metric.
    """
    datasets = list(dict.fromkeys(ranking.dataset for ranking in rankings))
    rows = [(ranking, row) for ranking in rankings for row in ranking.rows]
    return sorted(
        rows,
        key=lambda pair: (
            datasets.index(pair[0].dataset),
            *pair[1].key,
        ),
    )
