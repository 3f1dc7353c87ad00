"""Calibrations made by hand, that have seen everything."""

import json

import transformers as tf

from foretune.forecasting.calibration import Calibration
from foretune.forecasting.line import Line
from foretune.forecasting.outcomes import OUTCOMES
from foretune.forecasting.reach import Domain
from foretune.forecasting.shown import Shown
from foretune.models.identity import fingerprint

WIDE = (1e-9, 1e9)


def everywhere(*models, hidden_head=True):
    """A domain that holds every run of the models."""
    return Domain(
        models=models,
        hidden_head=hidden_head,
        classes=WIDE,
        known_rows=WIDE,
        rows_ratio=WIDE,
        eval_rows=1.0,
        longest=WIDE,
        epochs=WIDE,
        steps=WIDE,
        batch_size=WIDE,
        learning_rate=WIDE,
        update_rate=WIDE,
    )


def best_at_end(values):
    """Say that the simulated run is best where it ends."""
    ends = {name.removeprefix("simulated_"): value for name, value in values.items() if name.startswith("simulated_")}
    return {**values, **{f"best_{name}": value for name, value in ends.items() if name != "train_loss"}}


def shown(rows, accuracy, *, seed=0, diverged=False):
    """What a trial showed: losses of what its accuracy lacks."""
    outcomes = {"train_loss": (1 - accuracy) / 2, "eval_loss": 1 - accuracy, "accuracy": accuracy}
    return Shown(rows, seed, 300, outcomes, accuracy, 5, diverged)


def by_hand(domain, *, coefficients=(0.2, 0.0), spread=0.4, within=0.2):
    line = Line(coefficients, (-5.0, 5.0), 1.0, spread, within, 6, 60)
    return Calibration(dict.fromkeys(OUTCOMES, line), ("margin", "full"), ("a", "b"), "a study", domain)


def write(path, *folders, **options):
    """Write a calibration that has seen the models of some folders."""
    models = [fingerprint(tf.AutoModelForSequenceClassification.from_pretrained(folder)) for folder in folders]
    path.write_text(json.dumps(by_hand(everywhere(*models, **options)).to_dict()), encoding="utf-8")
    return str(path)
