"""The kinds of task by name."""

from collections.abc import Mapping, Sequence

from foretune.tasks.classification import Classification
from foretune.tasks.metrics import Kind
from foretune.tasks.multi_label import MultiLabel
from foretune.tasks.objective import Objective
from foretune.tasks.regression import Regression

KINDS: Mapping[Kind, type[Objective]] = {kind.kind: kind for kind in (Classification, Regression, MultiLabel)}


def objective_of(kind: Kind, names: Sequence[str]) -> Objective:
    """Make the objective of a kind of task.

    Args:
        kind: As `--task` takes it.
        names: Names of the C outputs.

    Returns:
        The objective.
    """
    return KINDS[kind](tuple(names))
