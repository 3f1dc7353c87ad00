"""Which row to train: where forecasts cannot be told apart, the cheapest adapter among them."""

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite

from foretune.forecasting.cautions import TOLD
from foretune.ranking.rows import Ranking, Row, best_first
from foretune.settings.groups import Recipe


def marked(rows: Sequence[Row], *, equal_sizes: bool = False) -> tuple[Row, ...]:
    """Mark the row to train: the cheapest of those that cannot be told from the first, which is among them.

    Cheapest is what has the fewest parameters; of equal ones the cheapest step, then the better forecast: recipes of
    one adapter are not chosen by their length. A row whose level is withheld counts only where that of the first is
    withheld too, and one at an infinite distance from all finished runs only where the first is as far: its tie says
    nothing. One that is told to collapse, and more likely than the first, is none to
    recommend.

    Args:
        rows: Rows of one ranking in order, with their ties.
        equal_sizes: Whether all adapters are meant to have one size, so that the few parameters between them are no
            reason to take one.

    Returns:
        The same rows.
    """
    first = rows[0]
    alike = [
        first,
        *(row for row in rows if row.tie and _told(first) <= _told(row) and not _riskier(row, first)),
    ]
    cheapest = min(alike, key=lambda row: (0 if equal_sizes else row.quick.parameters, row.compute))  # first of equals
    return tuple(replace(row, recommended=row is cheapest) for row in rows)


def _told(row: Row) -> tuple[bool, bool]:
    """How much is known of a row: whether anything like it was seen, and whether its level is told."""
    return (isfinite(row.said.reach.doublings), row.forecast is not None)


def _riskier(row: Row, first: Row) -> bool:
    return row.risk is not None and row.risk >= TOLD and row.risk > (first.risk or 0.0)


def tie_note(rows: Sequence[Row], n_recipes: int) -> tuple[str, ...]:
    """Say that nothing is known of the order, where that is so.

    Args:
        rows: Rows of one ranking in order, marked.
        n_recipes: Recipes that they were simulated with.

    Returns:
        One sentence where all rows tie with the first, else none.
    """
    if len(rows) < 2 or not all(row.tie for row in rows[1:]):
        return ()
    what = "placements" if n_recipes == 1 else "placements and recipes"
    (best,) = (row for row in rows if row.recommended)
    some = any(row.forecast is None for row in rows) and best.forecast is not None
    return (
        f"The {what} cannot be told apart on this data set: all {len(rows)} rows tie with the first; recommended is "
        f"the cheapest of them{' with a forecast' if some else ''}, {in_words(best, n_recipes)} "
        f"({best.quick.parameters:,} parameters).",
    )


def in_words(row: Row, n_recipes: int) -> str:
    """Name a row.

    Args:
        row: Row.
        n_recipes: Recipes of its ranking.

    Returns:
        Its adapter and, where there are several recipes, its own.

    Example:
        `query, value · all layers · r 8, 3 epochs at 0.001`
    """
    return row.quick.name if n_recipes == 1 else with_recipe(row.quick.name, row.recipe)


def with_recipe(name: str, recipe: Recipe) -> str:
    """Name an adapter with its recipe.

    Args:
        name: The adapter's.
        recipe: Recipe.

    Returns:
        Both.
    """
    return f"{name}, {recipe.epochs} epoch{'s' if recipe.epochs > 1 else ''} at {recipe.learning_rate:g}"


def chosen(rankings: Sequence[Ranking], choose: int | None) -> tuple[int, Ranking, Row] | None:
    """Find the row whose adapter is written.

    Args:
        rankings: Rankings of one table.
        choose: Row of the table, from 1; None for the recommended row of the first row's model and data set.

    Returns:
        Its place in the table, its ranking and the row; None if the table has no such row.
    """
    table = best_first(rankings)
    for place, (ranking, row) in enumerate(table, start=1):
        if place == choose or (choose is None and row.recommended and ranking is table[0][0]):
            return place, ranking, row
    return None
