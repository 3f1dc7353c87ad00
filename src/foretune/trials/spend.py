"""Spends: what share of one full run may go into trials, and what a fine-tune costs.

The unit is a sample pass: forward and backward of one training row is 1, an evaluated row a third of it, since a
backward pass costs about two forward passes.
"""

import re
from collections.abc import Sequence

from foretune.errors import ConfigError, shown
from foretune.settings.groups import Recipe

EVALUATED = 3  # evaluated rows that cost as much as one row of training
_SHARE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15})(?:[eE][+-]?[0-9]{1,2})?")


def parse_spend(text: str) -> float:
    """Read what share of the cost of one full run may be spent.

    Args:
        text: `2%`, `5 %` or `0.02`; `0` for nothing.

    Returns:
        The share, from 0 to 1.

    Raises:
        ConfigError: If it is none, or more than one run.

    Example:
        >>> parse_spend("2%"), parse_spend("0.02"), parse_spend("0")
        (0.02, 0.02, 0.0)
    """
    number = text.strip()
    percent = number.endswith("%")
    number = number.removesuffix("%").rstrip()
    if not _SHARE.fullmatch(number):
        raise ConfigError(f"spend = {shown(text)}: give a share of one full run, such as 2% or 0.02, or 0 for none")
    share = float(number) / (100 if percent else 1)
    if share > 1:
        meant = f", or {number}% if that is meant" if not percent and float(number) <= 100 else ""
        raise ConfigError(f"spend = {shown(text)}: more than one full run; give at most 100%{meant}")
    return share


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
