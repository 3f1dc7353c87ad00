"""What a ranking of a language model's adapters holds: a row for each finalist and recipe, in order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, nan
from typing import Any

from peft import LoraConfig

from foretune.forecasting.calibration import RunForecast
from foretune.forecasting.reach import Run
from foretune.forecasting.sequence_levels import stretched
from foretune.forecasting.sequence_simulation import APART, Measured, SequenceRun
from foretune.models.sites import Site
from foretune.ranking.budget import BYTES_PER_PARAMETER
from foretune.ranking.finalists import Quick
from foretune.ranking.recommend import with_recipe
from foretune.ranking.rows import Spent
from foretune.settings.groups import Recipe

TIE = 0.015  # nats a token between two rows that are told apart by nothing but chance


@dataclass(frozen=True)
class SequenceRow:
    """A finalist under one recipe.

    Attributes:
        quick: Candidate, and the score that it was screened by.
        recipe: How its run trains.
        run: What kind of run it is.
        found: The simulated run, on no more rows than are known; None of methods beside LoRA.
        forecast: What is forecast of the run; without levels where the calibration has not seen its kind.
        compute: Cost of a training step relative to one that goes back through all layers.
        tie: Whether its loss cannot be told from that of the first row.
        recommended: Whether it is the one to train: the cheapest of those that cannot be told from the first.
        trials: Its trials, those with the fewest rows first, as in `result.json`.
    """

    quick: Quick
    recipe: Recipe
    run: Run
    found: SequenceRun | None
    forecast: RunForecast
    compute: float
    tie: bool = False
    recommended: bool = False
    trials: tuple[Mapping[str, Any], ...] = ()

    @property
    def simulated(self) -> SequenceRun | None:
        """The simulated run."""
        return self.found

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return self.run.steps

    @property
    def loss(self) -> float:
        """Evaluation loss at the run's end, in nats a token, as forecast; a level where the forecast has one.

        Without a simulated run what trials tell, not a number where there is none.
        """
        return self.forecast.order[1]

    @property
    def apart(self) -> bool:
        """Whether its linearised loss is another than the simulated one."""
        return self.found is not None and self.found.apart

    @property
    def best_step(self) -> int:
        """Step of the least evaluation loss of those at which the adapter was plugged in; the last of no such run."""
        if self.found is None:
            return self.steps
        run = self.found.run.trajectory
        known = [place for place in range(1, len(run.steps)) if isfinite(run.eval_loss[place])]
        best = run.steps[min(known, key=lambda place: run.eval_loss[place], default=-1)]
        return stretched(best, run.steps[-1], self.steps)

    @property
    def diverged(self) -> int | None:
        """Rows of the trial in which a loss was not finite; None where there is none."""
        return next((int(trial["rows"]) for trial in self.trials if trial["diverged"]), None)

    def ended_at(self, rows: int | None) -> float | None:
        """Say where a trial ended.

        Args:
            rows: Its rows; None for none.

        Returns:
            Its evaluation loss in nats a token; None where there is no such trial.
        """
        return next((float(trial["outcomes"]["eval_loss"]) for trial in self.trials if trial["rows"] == rows), None)

    @property
    def megabytes(self) -> float:
        """Size of the adapter's file in 10⁶ bytes."""
        return self.quick.parameters * BYTES_PER_PARAMETER / 1e6


@dataclass(frozen=True)
class SequenceRanking:
    """Ranked adapters of one language model on one data set.

    Attributes:
        model: Model as given.
        dataset: Data set as given.
        modules: Names of all modules of the model, which itself is not kept.
        template: peft's configuration of all modules, from which a candidate's is made.
        sites: Every module that a candidate uses.
        recipes: Recipes that every finalist was simulated with.
        rows: Finalists with their recipes, the best first.
        quick: All candidates, by the score of the screen.
        base: The model without training on the sequences to predict.
        samples: Known sequences.
        train_rows: Training rows of the run.
        eval_rows: Sequences to predict.
        kept: Share of the gradients' energy that the sketches keep, of the modules on the whole and of the least.
        equal_size: Parameters that all adapters have, nearly; None where they differ.
        notes: What to keep in mind when reading it.
        seconds: Of `load`, `pass`, `quick` and `simulate`; of `trials` where there are any, whenever they were made.
        spent: What went into trials; None where nothing was to be spent.
        compared: Rows of the trials that the first rows are ordered by; None where trials order nothing.
        calibration: Study that the calibration comes from.
    """

    model: str
    dataset: str
    modules: tuple[str, ...]
    template: LoraConfig
    sites: tuple[Site, ...]
    recipes: tuple[Recipe, ...]
    rows: tuple[SequenceRow, ...]
    quick: tuple[Quick, ...]
    base: Measured
    samples: int
    train_rows: int
    eval_rows: int
    kept: tuple[float, float]
    equal_size: int | None
    notes: tuple[str, ...]
    seconds: Mapping[str, float]
    spent: Spent | None = None
    compared: int | None = None
    calibration: str | None = None

    @property
    def steps(self) -> int:
        """Steps of the longest run."""
        return max(row.steps for row in self.rows)

    def chosen(self, choose: int | None) -> tuple[int, SequenceRow] | None:
        """Find the row whose adapter is written.

        Args:
            choose: Row of the table, from 1; None for the recommended one.

        Returns:
            Its place and the row; None if there is no such row.
        """
        for place, row in enumerate(self.rows, start=1):
            if place == choose or (choose is None and row.recommended):
                return place, row
        return None


def in_words(ranking: SequenceRanking, row: SequenceRow) -> str:
    """Name a row.

    Args:
        ranking: Its ranking.
        row: Row.

    Returns:
        Its adapter and, where there are several recipes, its own.
    """
    return row.quick.name if len(ranking.recipes) == 1 else with_recipe(row.quick.name, row.recipe)


def compared_rows(rows: Sequence[SequenceRow]) -> int | None:
    """Say which trials put rows into order: losses of trials compare where they trained on as many rows.

    Args:
        rows: Rows of one ranking.

    Returns:
        The largest number of rows on which two or more were tried; None if there is none.
    """
    tried = [int(trial["rows"]) for row in rows for trial in row.trials]
    return max((size for size in tried if tried.count(size) > 1), default=None)


def in_order(rows: Sequence[SequenceRow], *, equal_sizes: bool = False) -> tuple[SequenceRow, ...]:
    """Put rows into order, and mark the ties and the row to train.

    Args:
        rows: Rows of one ranking.
        equal_sizes: Whether all adapters are meant to have one size, so that the few parameters between them are no
            reason to take one.

    Returns:
        Those that were tried on the largest number of rows on which several were come first, by the loss that these
        trials showed; then all others by the loss at the end of the simulated run; last what diverged in a trial. A row
        without a simulated run that ends above every simulated one in these trials says nothing against rows that were
        not tried, and stands among them by the loss that it is told to end at. Of
        equal ones the smaller adapter, the shorter run, the lower rate. Recommended is, of those within 0.015 nats of
        the first by the same loss, the one with the fewest parameters, then with the cheapest step.
    """
    compared = comparison_of(rows)
    first, *others = sorted(rows, key=lambda row: place_of(row, compared))
    group, of_first = _measured(first, compared)

    def ties(row: SequenceRow) -> bool:
        own, loss = _measured(row, compared)
        return own == group and loss - of_first <= TIE

    marked = [replace(first, tie=False), *(replace(row, tie=ties(row)) for row in others)]
    alike = [marked[0], *(row for row in marked if row.tie)]
    cheapest = min(alike, key=lambda row: (0 if equal_sizes else row.quick.parameters, row.compute))  # first of equals
    return tuple(replace(row, recommended=row is cheapest) for row in marked)


@dataclass(frozen=True)
class Comparison:
    """Which trials put rows into order.

    Attributes:
        rows: Their training rows; None where trials put nothing into order.
        worst: Largest loss that a row with a simulated run ended at in them; infinite where none was tried.
    """

    rows: int | None
    worst: float


def comparison_of(rows: Sequence[SequenceRow]) -> Comparison:
    """Look which trials put rows into order.

    Args:
        rows: Rows of one ranking.

    Returns:
        The comparison.
    """
    compared = compared_rows(rows)
    ended = [row.ended_at(compared) for row in rows if row.found is not None and row.diverged is None]
    return Comparison(compared, max((loss for loss in ended if loss is not None), default=inf))


def place_of(row: SequenceRow, compared: Comparison) -> tuple[int, bool, float, int, int, float]:
    """Make a key that sorts rows as `in_order` does.

    Args:
        row: Row.
        compared: From `comparison_of`.

    Returns:
        The key.
    """
    group, loss = _measured(row, compared)
    known = isfinite(loss)
    sizes = row.quick.parameters, row.recipe.epochs, row.recipe.learning_rate
    return group, not known, loss if known else 0.0, *sizes


def _measured(row: SequenceRow, compared: Comparison) -> tuple[int, float]:
    """With which others a row is compared, and by what loss."""
    if row.diverged is not None:
        return 2, row.loss
    of_trial = row.ended_at(compared.rows)
    if of_trial is None or (row.found is None and of_trial > compared.worst):
        return 1, row.loss
    return 0, of_trial


def notes_of(rows: Sequence[SequenceRow], base: Measured, samples: int, train_rows: int) -> tuple[str, ...]:
    """Say what to keep in mind when reading the rows.

    Args:
        rows: Rows in order, marked.
        base: The model without training.
        samples: Known sequences.
        train_rows: Training rows of the run.

    Returns:
        Sentences.
    """
    comparison, compared = comparison_of(rows), compared_rows(rows)
    of_trials = sum(_measured(row, comparison)[0] == 0 for row in rows)
    level = any(row.forecast.levels is not None for row in rows)
    runs = "forecasts" if level else "simulated runs"
    by = f"the order is that of the {runs}"
    if of_trials:
        first = (
            "the first row stands there by its trial"
            if of_trials == 1
            else (f"the first {of_trials} rows are ordered by their trials")
        )
        by = f"{first} on {compared:,} rows, the others by {runs}"
    notes = [
        f"{by[0].upper()}{by[1:]}{'' if level else ', no level is forecast'}. Losses that are nearer than {TIE:g} nats "
        "a token are ties."
    ]
    if compared is None and any(row.trials for row in rows):
        notes.append("No two rows were tried on as many training rows: the trials put nothing into order.")
    diverged = sum(row.diverged is not None for row in rows)
    if diverged:
        last = ": they stand last" if diverged < len(rows) else ""
        notes.append(f"{diverged} of {len(rows)} rows diverged in a trial{last}.")
    if len(rows) > 1 and all(row.tie for row in rows[1:]):
        notes.append(f"The order says nothing here: all {len(rows)} rows tie with the first.")
    if not min((row.loss for row in rows if isfinite(row.loss)), default=nan) < base.loss - TIE:
        notes.append(
            f"No row ends more than {TIE:g} nats below the {base.loss:.3f} that the model has without training: name "
            "other learning rates or numbers of epochs."
        )
    apart = sum(row.apart for row in rows)
    if apart:
        notes.append(
            f"{apart} of {len(rows)} rows, marked '!', end more than {APART:g} nats away from their linearised loss: "
            "these runs leave the ground that they were linearised on, and their places are less sure."
        )
    simulated = [row for row in rows if row.found is not None]
    unseen = next((row.forecast.reach.verdict for row in simulated if row.forecast.levels is None), None)
    if unseen:
        notes.append(unseen)
    if train_rows > samples:
        more = "what more rows bring is what others gained" if level else "what more rows bring is not in it"
        notes.append(f"The runs on the {samples:,} known rows are simulated, of {train_rows:,}; {more}.")
    return tuple(notes)
