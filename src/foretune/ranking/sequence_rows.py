"""What a ranking of a language model's adapters holds: a row for each finalist and recipe, in order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite

from peft import LoraConfig

from foretune.forecasting.sequence_simulation import APART, Measured, SequenceRun
from foretune.models.sites import Site
from foretune.ranking.budget import BYTES_PER_PARAMETER
from foretune.ranking.finalists import Quick
from foretune.ranking.recommend import with_recipe
from foretune.settings.groups import Recipe

TIE = 0.015  # nats a token between two rows that are told apart by nothing but chance


@dataclass(frozen=True)
class SequenceRow:
    """A finalist under one recipe.

    Attributes:
        quick: Candidate, and the score that it was screened by.
        recipe: How its run trains.
        steps: Steps of the run.
        found: The simulated run.
        compute: Cost of a training step relative to one that goes back through all layers.
        tie: Whether its loss cannot be told from that of the first row.
        recommended: Whether it is the one to train: the cheapest of those that cannot be told from the first.
    """

    quick: Quick
    recipe: Recipe
    steps: int
    found: SequenceRun
    compute: float
    tie: bool = False
    recommended: bool = False

    @property
    def loss(self) -> float:
        """Evaluation loss, in nats a token, of the model with the simulated A and B plugged in, at the run's end."""
        return self.found.run.end.eval_loss

    @property
    def best_step(self) -> int:
        """Step of the least evaluation loss of those at which the adapter was plugged in."""
        run = self.found.run.trajectory
        known = [place for place in range(1, len(run.steps)) if isfinite(run.eval_loss[place])]
        return run.steps[min(known, key=lambda place: run.eval_loss[place], default=-1)]

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
        seconds: Of `load`, `pass`, `quick` and `simulate`.
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


def in_order(rows: Sequence[SequenceRow], *, equal_sizes: bool = False) -> tuple[SequenceRow, ...]:
    """Put rows into order, and mark the ties and the row to train.

    Args:
        rows: Rows of one ranking.
        equal_sizes: Whether all adapters are meant to have one size, so that the few parameters between them are no
            reason to take one.

    Returns:
        By the loss at the end; of equal ones the smaller adapter, the shorter run, the lower rate. Recommended is, of
        those within 0.015 nats of the first, the one with the fewest parameters, then with the cheapest step.
    """

    def key(row: SequenceRow) -> tuple[bool, float, int, int, float]:
        known = isfinite(row.loss)
        loss = row.loss if known else 0.0
        return not known, loss, row.quick.parameters, row.recipe.epochs, row.recipe.learning_rate

    first, *others = sorted(rows, key=key)
    marked = [first, *(replace(row, tie=row.loss - first.loss <= TIE) for row in others)]
    alike = [marked[0], *(row for row in marked if row.tie)]
    cheapest = min(alike, key=lambda row: (0 if equal_sizes else row.quick.parameters, row.compute))  # first of equals
    return tuple(replace(row, recommended=row is cheapest) for row in marked)


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
    notes = [
        "The order is that of the simulated runs, no level is forecast. "
        f"Losses that are nearer than {TIE:g} nats a token are ties."
    ]
    if len(rows) > 1 and all(row.tie for row in rows[1:]):
        notes.append(f"The order says nothing here: all {len(rows)} rows tie with the first.")
    if not rows[0].loss < base.loss - TIE:
        notes.append(
            f"No row ends more than {TIE:g} nats below the {base.loss:.3f} that the model has without training: name "
            "other learning rates or numbers of epochs."
        )
    apart = sum(row.found.apart for row in rows)
    if apart:
        notes.append(
            f"{apart} of {len(rows)} rows, marked '!', end more than {APART:g} nats away from their linearised loss: "
            "these runs leave the ground that they were linearised on, and their places are less sure."
        )
    if train_rows > samples:
        notes.append(
            f"The simulated runs see the {samples} known rows again and again where the real ones have "
            f"{train_rows:,}: their loss on other rows rises earlier. More --samples bring them nearer."
        )
    return tuple(notes)
