"""What a forecast and a run have in common, said without either being made."""

import copy

import pytest

from foretune.forecasting.seal import HASH, content_hash
from foretune.ledger.entries import Told
from foretune.ledger.judgement import RECIPE, Times, adapter_in_short, differences, entry_of, run_hash

PLACEMENT = {"target_modules": ["query"], "layers": [0, 1], "r": 8, "alpha": 8, "rslora": False, "init": "True",
             "modules": ["0.query", "1.query"], "trainable_parameters": 512}  # fmt: skip
SETTINGS = {"epochs": 2, "learning_rate": 1e-3, "train_batch_size": 8, "weight_decay": 0.0, "warmup_ratio": 0.06,
            "scheduler": "linear", "max_length": 64, "seed": 0}  # fmt: skip
LEVEL = {"value": 0.5, "low": 0.25, "high": 0.75}
FORECAST = {
    "made": "2026-03-01T12:00:00+00:00",
    "weights": "w",
    "placement": PLACEMENT,
    "samples": 20,
    "train_rows": 40,
    "steps": 10,
    "end": {"accuracy": LEVEL, "eval_loss": LEVEL, "train_loss": None},
    "details": {"data": {"fingerprint": "f"}, "adapter": {"left_out": []}},
    "settings": {**SETTINGS, "samples": 20, "eval_samples": 10},
}
TUNED = {
    "model": "m",
    "dataset": "d",
    "placement": {**PLACEMENT, "alpha": 8.0},
    "final": {"eval_accuracy": 0.75, "eval_loss": None},
    "steps": 10,
    "details": {"weights": "w", "data": {"task": "classification", "fingerprint": "f", "train_rows": 40,
                                         "eval_rows": 20}},
    "settings": {**SETTINGS, "bf16": False, "batch_size": 4},
}  # fmt: skip
TIMES = Times("2026-03-01T12:00:00+00:00", "2026-03-01T13:00:00+00:00")


def sealed(**changes):
    content = {**copy.deepcopy(FORECAST), **changes}
    return {**content, HASH: content_hash(content)}


def with_change(content, path, value):
    content = copy.deepcopy(content)
    place = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return content


def test_a_forecast_of_the_run_is_ok():
    """Made within the second in which the run began, and the spelling of a number does not count."""
    entry = entry_of(sealed(spend=0.02), TUNED, TIMES)
    assert (entry.state, entry.why, entry.spend, entry.known_rows, entry.rows) == ("ok", "", 0.02, 20, 40)
    assert entry.main == Told(0.5, 0.25, 0.75, 0.75)
    assert entry.eval_loss == Told(0.5, 0.25, 0.75, None)  # it diverged


CHANGES = [
    (("details", "weights"), "x", "model"),
    (("details", "data", "fingerprint"), "x", "data"),
    (("details", "data", "train_rows"), 41, "rows"),
    (("placement", "modules"), ["0.query"], "modules"),
    (("placement", "modules"), ["0.query", "1.query", "1.key"], "modules"),
    (("placement", "trainable_parameters"), 513, "parameters"),
    (("placement", "r"), 4, "r"),
    (("placement", "rslora"), True, "rslora"),
    (("placement", "init"), "gaussian", "init"),
    (("steps",), 5, "steps"),
    *((("settings", name), "x", name) for name in RECIPE),
]


@pytest.mark.parametrize(("path", "value", "why"), CHANGES)
def test_what_differs_is_named(path, value, why):
    other = with_change(TUNED, path, value)
    assert differences(FORECAST, other) == (why,)
    entry = entry_of(sealed(), other, TIMES)
    assert (entry.state, entry.why) == ("other run", why)
    assert run_hash(other) != run_hash(TUNED)


@pytest.mark.parametrize("path", [("settings", "batch_size"), ("model",), ("dataset",), ("final", "eval_loss")])
def test_what_is_no_other_run(path):
    other = with_change(TUNED, path, 7)
    assert differences(FORECAST, other) == ()
    assert run_hash(other) == run_hash(TUNED) == run_hash(with_change(TUNED, ("placement", "alpha"), 8))


def test_modules_that_no_output_depends_on_may_be_left_out():
    more = with_change(TUNED, ("placement", "modules"), ["0.query", "1.query", "pooler"])
    more["placement"]["trainable_parameters"] = 640
    assert differences(FORECAST, more) == ("modules",)
    assert differences(with_change(FORECAST, ("details", "adapter", "left_out"), ["pooler"]), more) == ()


def test_the_first_that_holds_is_the_state():
    late, other = {"made": "2026-03-01T12:00:01+00:00"}, {"train_rows": 7}
    withheld = {"end": None}
    states = [entry_of(content, TUNED, TIMES).state for content in (
        {**sealed(**late), "train_rows": 8}, sealed(**late, **other), sealed(**other, **withheld), sealed(**withheld),
    )]  # fmt: skip
    assert states == ["altered", "late", "other run", "withheld"]


def test_many_modules_are_counted():
    many = {**PLACEMENT, "target_modules": [f"{i}.query" for i in range(9)], "layers": []}
    assert adapter_in_short(many) == "9 modules, r = 8, α = 8"
