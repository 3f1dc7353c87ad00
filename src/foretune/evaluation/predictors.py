"""What a study compares: quantities at initialisation, and outcomes of the fine-tune."""

from dataclasses import dataclass

from foretune.forecasting.reach import RUN


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
INITIAL = (
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
# What the simulated run and its calibration say (foretune study outlook); cells without one lack them.
FORESIGHT = (
    Quantity("predicted_accuracy", "foretune: accuracy", +1),
    Quantity("predicted_eval_loss", "foretune: eval loss", -1),
    Quantity("predicted_train_loss", "foretune: train loss", -1),
    Quantity("simulated_accuracy", "simulated run: accuracy", +1),
    Quantity("simulated_eval_loss", "simulated run: eval loss", -1),
    Quantity("simulated_train_loss", "simulated run: train loss", -1),
    Quantity("lazy_accuracy", "simulated with A fixed: accuracy", +1),
    Quantity("lazy_eval_loss", "simulated with A fixed: eval loss", -1),
    Quantity("random_head_accuracy", "simulated at the random head: accuracy", +1),
    Quantity("regression_accuracy", "kernel regression from the probe: accuracy", +1),
    Quantity("logistic_accuracy", "kernel logistic regression from the probe: accuracy", +1),
    Quantity("sign_accuracy", "kernel of sign descent: accuracy", +1),
    Quantity("asymmetric_accuracy", "asymmetric kernel of sign descent: accuracy", +1),
    Quantity("quick_score", "quick score", +1),
)
# Metrics of others and simple rules, at the cost that docs/study.md names. Those of a data set's features alone are the
# same for all its placements.
BASELINES = (
    Quantity("gradient_norm", "gradient norm", +1, logarithmic=True),
    Quantity("page", "PAGE", +1, logarithmic=True),
    Quantity("plop", "PLoP", -1),
    Quantity("kappa_tune", "KappaTune", -1, logarithmic=True),
    Quantity("probe_accuracy", "linear probe: accuracy", +1),
    Quantity("probe_loss", "linear probe: loss", -1),
    Quantity("log_me", "LogME", +1),
    Quantity("h_score", "H-score", +1),
    Quantity("nleep", "NLEEP", +1),
    Quantity("trans_rate", "TransRate", +1),
    Quantity("gbc", "GBC", +1),
    Quantity("parc", "PARC", +1),
    Quantity("early_5_train_loss", "first 5% of the steps: train loss", -1),
    Quantity("early_20_train_loss", "first 20% of the steps: train loss", -1),
    Quantity("early_20_accuracy", "first 20% of the steps: accuracy", +1),
    Quantity("early_20_eval_loss", "first 20% of the steps: eval loss", -1),
)
# What must know less: the same forecast with something taken away.
CONTROLS = (
    Quantity("head_alone_accuracy", "control, head alone: accuracy", +1),
    Quantity("f0_accuracy", "control, before training: accuracy", +1),
    Quantity("permuted_accuracy", "control, permuted labels: accuracy", +1),
    Quantity("random_backbone_accuracy", "control, random backbone: accuracy", +1),
)
QUANTITIES = (*INITIAL, *FORESIGHT, *BASELINES, *CONTROLS)
# Numbers of an outlook that its calibration takes, and those that are compared with the area under the real curves.
OUTLOOK = (
    "simulated_train_loss",
    "simulated_eval_loss",
    "simulated_accuracy",
    "probe_loss",
    "probe_accuracy",
    "movement",
    "doublings",
)
AREAS = ("simulated_train_area", "simulated_eval_area")
FORECASTS = {"train_loss": "predicted_train_loss", "eval_loss": "predicted_eval_loss", "accuracy": "predicted_accuracy"}
HELD = tuple(dict.fromkeys([*(quantity.name for quantity in QUANTITIES), *OUTLOOK, *AREAS, *RUN]))
KAPPA = QUANTITIES[0]
OUTCOMES = (
    Outcome("train_loss", "train loss"),
    Outcome("eval_loss", "eval loss"),
    Outcome("accuracy", "accuracy"),
    Outcome("steps_to_loss", "steps to loss"),
)
