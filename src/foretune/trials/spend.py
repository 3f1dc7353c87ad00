"""Spends: what share of one full run may go into trials, and what a fine-tune costs.

The unit is a sample pass: forward and backward of one training row is 1, an evaluated row a third of it, since a
backward pass costs about two forward passes.
"""

from collections.abc import Sequence

from foretune.settings.groups import Recipe

EVALUATED = 3  # evaluated rows that cost as much as one row of training


def run_passes(rows: int, epochs: int, eval_rows: int, evaluations: int) -> float:
    """Count what a fine-tune costs.

    Args:
        rows: Training rows.
        epochs: Passes over them.
        eval_rows: Rows of one evaluation.
        evaluations: Evaluations.

    Returns:
        epochs · rows + evaluations · eval_rows / 3 sample passes.
    """
    return epochs * rows + evaluations * eval_rows / EVALUATED


def whole_run(recipes: Sequence[Recipe], rows: int) -> int:
    """Count what one full run trains: that of the dearest recipe where there are several.

    Args:
        recipes: One or more.
        rows: Training rows N.

    Returns:
        max epochs · N sample passes; evaluation is not counted.
    """
    return max(recipe.epochs for recipe in recipes) * rows


def percent(share: float) -> str:
    """Write a share for a person.

    Args:
        share: From 0 to 1.

    Returns:
        Per cent with two digits that count.
    """
    return f"{100 * share:.2g}%" if share < 0.1 else f"{100 * share:.0f}%"
