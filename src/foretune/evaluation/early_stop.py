"""What the first steps of the run itself foretell: the baseline that costs a share of the fine-tune."""

from collections.abc import Sequence
from math import isfinite

from foretune.evaluation.extrapolate import extrapolate
from foretune.report.curves import Step

SHARES = (0.05, 0.2)


def early_quantities(
    steps: Sequence[Step], epochs: Sequence[tuple[int, float, float]], total: int
) -> dict[str, float | None]:
    """Forecast the end of a run from its first 5% and 20% of steps.

    The training loss is extrapolated from the steps' losses. Evaluation loss and accuracy are those of the last
    evaluation within the share; before the first epoch ends there is none after training began, and none is given.

    Args:
        steps: Training loss over steps.
        epochs: Step, loss and accuracy of each evaluation.
        total: Steps of the run.

    Returns:
        `early_5_train_loss`, `early_20_train_loss`, `early_20_eval_loss`, `early_20_accuracy`; None where unknown.
    """
    found: dict[str, float | None] = {}
    for share in SHARES:
        seen = [step for step in steps if step.step <= share * total]
        name = f"early_{round(100 * share)}"
        value = extrapolate([step.step for step in seen], [step.loss for step in seen], total)
        found[f"{name}_train_loss"] = value if isfinite(value) else None
    evaluated = [epoch for epoch in epochs if 0 < epoch[0] <= SHARES[-1] * total]
    found["early_20_eval_loss"] = evaluated[-1][1] if evaluated else None
    found["early_20_accuracy"] = evaluated[-1][2] if evaluated else None
    return found
