"""What a study compares: quantities at initialisation, and outcomes of the fine-tune."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """A number that is known before training.

    Attributes:
        name: Its name in `cells.csv`.
        label: Its name in tables and figures.
        prefers: +1 if a user of it picks the placement where it is largest, -1 if where it is smallest.
        logarithmic: Whether Pearson's coefficient and figures take its logarithm.
    """

    name: str
    label: str
    prefers: int
    logarithmic: bool = False


@dataclass(frozen=True)
class Outcome:
    """A number that training gives.

    Attributes:
        name: Its name in `cells.csv`.
        label: Its name in tables and figures.
    """

    name: str
    label: str


# Which way each one points is fixed here, before any outcome is seen. κ small is the paper's claim; the others by the
# theory of docs/mathematics.md, or by what the number says of itself.
QUANTITIES = (
    Quantity("condition_number", "κ", -1, logarithmic=True),
    Quantity("condition_number_mean", "κ, mean over draws of A", -1, logarithmic=True),
    Quantity("condition_number_relative", "κ, scale-free", -1, logarithmic=True),
    Quantity("lambda_max", "λ_max", +1, logarithmic=True),
    Quantity("lambda_min", "λ_min", +1, logarithmic=True),
    Quantity("trace", "trace", +1, logarithmic=True),
    Quantity("effective_dimension", "effective dimension", +1),
    Quantity("alignment", "alignment", +1),
    Quantity("empirical_risk", "empirical risk at σ", -1),
    Quantity("forecast_train_loss", "forecast train loss", -1),
    Quantity("forecast_eval_loss", "forecast eval loss", -1),
    Quantity("forecast_eval_accuracy", "forecast accuracy", +1),
    Quantity("loo_mse", "leave-one-out error", -1),
    Quantity("loo_accuracy", "leave-one-out accuracy", +1),
    Quantity("head_eval_loss", "head's kernel: eval loss", -1),
    Quantity("head_eval_accuracy", "head's kernel: accuracy", +1),
    Quantity("adapter_parameters", "adapter parameters", +1, logarithmic=True),
)
KAPPA = QUANTITIES[0]
OUTCOMES = (
    Outcome("train_loss", "train loss"),
    Outcome("eval_loss", "eval loss"),
    Outcome("accuracy", "accuracy"),
    Outcome("steps_to_loss", "steps to loss"),
)
