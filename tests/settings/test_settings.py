"""Settings are valid or refused in one way, whatever they are given."""

import importlib
import inspect
import math
import pkgutil
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune import settings
from foretune.cli import run
from foretune.errors import ConfigError
from foretune.settings.commands import (
    Configuration,
    ForecastSettings,
    PaperSettings,
    RankSettings,
    ScoreSettings,
    TuneSettings,
)
from foretune.settings.groups import AdapterConfig, DataConfig, ModelConfig, Recipe, Recipes
from foretune.settings.ranges import Range, Settings
from odd_values import SCALARS

GROUPS = {
    ModelConfig: {"model": "m"},
    DataConfig: {"dataset": "d"},
    AdapterConfig: {},
    ScoreSettings: {},
    ForecastSettings: {},
    TuneSettings: {},
    RankSettings: {},
    PaperSettings: {},
}
PLACES = [(group, field.name) for group in GROUPS for field in fields(group)]
VALUES = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.tuples(x) | st.sets(st.integers()), max_leaves=4)


@given(st.sampled_from(PLACES), VALUES)
def test_any_value_of_any_setting_is_refused_or_taken(place, value):
    group, name = place
    made = refused = None
    try:
        made = group(**{**GROUPS.get(group, {}), name: value})
    except ConfigError as error:  # and nothing else
        refused = str(error)
    assert made is not None or (refused.startswith(f"{name} = ") and len(refused) < 300)
    if made is not None:
        assert replace(made) == made
        assert hash(made) == hash(replace(made))
        held = getattr(made, name)
        assert not isinstance(held, float) or math.isfinite(held)
        assert not isinstance(held, str) or (held and "\0" not in held)


def test_lists_become_tuples_and_numpys_numbers_pythons():
    adapter = AdapterConfig(["query"], [np.int64(0)], r=np.int32(4), alpha=np.float32(2.0))
    assert adapter == AdapterConfig(("query",), (0,), r=4, alpha=2.0)
    assert [type(value) for value in (adapter.r, adapter.alpha, adapter.layers[0])] == [int, float, int]
    assert type(AdapterConfig(alpha=8).alpha) is int  # as it was given


def declared():
    """Every class of the room's settings with the fields that it declares itself."""
    for module in pkgutil.iter_modules(settings.__path__):
        for kind in vars(importlib.import_module(f"{settings.__name__}.{module.name}")).values():
            if isinstance(kind, type) and is_dataclass(kind) and kind.__module__.endswith(f".{module.name}"):
                names = {field.name for field in fields(kind)}
                yield kind, [name for name in inspect.get_annotations(kind) if name in names]


def test_few_fields_are_declared_each_once():
    """What a setting may be is no setting; a score draws other samples than a forecast, by default; a ranking takes
    several rates and numbers of epochs."""
    found = {kind: names for kind, names in declared() if kind is not Range}
    assert {*GROUPS, Recipe, Configuration} < set(found)
    assert sum(map(len, found.values())) <= 75
    again = {"samples", "eval_samples", "epochs", "learning_rate"} | {field.name for field in fields(PaperSettings)}
    rest = [name for kind, names in found.items() if kind not in (PaperSettings, Configuration) for name in names]
    assert {name for name in rest if rest.count(name) > 1} <= again


def test_a_run_is_stated_by_one_recipe():
    for kind in (TuneSettings, ForecastSettings, RankSettings):
        assert issubclass(kind, Recipes if kind is RankSettings else Recipe)
        for field in fields(Recipe):
            assert field.name not in inspect.get_annotations(kind)
    assert {field.name for field in fields(Recipe)} == {field.name for field in fields(Recipes)}


def test_every_group_checks_itself():
    for kind, _ in declared():
        assert issubclass(kind, Settings) or kind in (Range, Configuration), kind


@pytest.mark.parametrize(
    ("group", "name", "wrong", "right"),
    [
        (AdapterConfig, "r", [0, -1, 2**63, 1.5, True, "8"], [1, 65536]),
        (AdapterConfig, "alpha", [0, -1, math.nan, math.inf, 1e31, 10**400], [0.5, 32, 1e-9]),
        (AdapterConfig, "layers", [[None], [-1], 3, "3", [0.5], [True]], [(0,), ()]),
        (AdapterConfig, "target_modules", ["query", [None], [""], [1]], [("query",)]),
        (ScoreSettings, "seed", [-1, 2**32, 0.0], [0, 2**32 - 1]),
        (ScoreSettings, "sigma", [0.0, -1.0, math.nan, math.inf], [1e-4]),
        (ScoreSettings, "draws", [0, 10**9], [1]),
        (ScoreSettings, "reduction", ["", 3, "x\0"], ["trace", None]),
        (TuneSettings, "seed", [-1, 2**32], [2**32 - 1]),
        (TuneSettings, "train_batch_size", [0, 2**63, 2**31], [1]),
        (TuneSettings, "learning_rate", [0.0, -1.0, math.inf, math.nan, 1e308], [1e-5]),
        (TuneSettings, "weight_decay", [-1e-9, math.nan, math.inf], [0.0, 0.1]),
        (TuneSettings, "warmup_ratio", [-0.1, 1.0, math.nan], [0.0, 0.999]),
        (TuneSettings, "report_to", ["tensorboard", [None]], [("tensorboard",)]),
        (TuneSettings, "bf16", [1, "yes", None], [True, False]),
        (DataConfig, "dataset", ["", "x\0", None, 3], ["d"]),
        (DataConfig, "max_train", [1, 0, -5, 2**31], [2, None]),
        (ModelConfig, "dtype", ["float8", None, 3, ["float32"]], ["bfloat16"]),
        (PaperSettings, "seeds", [(), (0, 0), (-1,), (2**32,), 0], [(0, 1)]),
        (PaperSettings, "epochs", [0, 2**31], [1]),
        (RankSettings, "seed", [-1, 2**32], [0]),
        (RankSettings, "ranks", [(), (0,), (2**63,), 8], [(4, 8)]),
        (RankSettings, "epochs", [(), 0, (3, 0), 2**31, "3", True, (1.5,)], [(5,), (3, 1, 3)]),
        (RankSettings, "learning_rate", [(), 0.0, (1e-3, -1.0), (math.nan,), range(1, 300)], [(1e-3, 1e-4)]),
        (RankSettings, "equal_size", ["", 500, "x\0"], ["500k", None]),
        (Recipe, "epochs", [0, 2**31], [3]),
        (
            ForecastSettings,
            "rows",
            [(), (1,), (3, 2), (2, 2), 500, (2**31,), tuple(range(2, 15))],
            [(2,), (500, 1000), None],
        ),
    ],
)
def test_ranges(group, name, wrong, right):
    for value in wrong:
        with pytest.raises(ConfigError, match=f"^{name} = "):
            group(**{**GROUPS.get(group, {}), name: value})
    for value in right:
        assert getattr(group(**{**GROUPS.get(group, {}), name: value}), name) == value


FLAGS = [
    *(["--seed", value] for value in ("-1", "4294967296", "1e400", "9" * 5000)),
    *(["--alpha", value] for value in ("-1", "0", "nan", "inf", "1e400")),
    *(["--r", value] for value in ("0", "-3", "99999999999999999999")),
    *(["--batch-size", value] for value in ("0", "9223372036854775808", "x" * 3000)),
    ["--layers", "-1"],
    ["--text-column", ""],
    ["--dataset", "a\0b"],
    ["--output", "x" * 5000],
    ["--output", "x/" * 3000],
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: " ".join(flags)[:30].replace("\0", "NUL"))
@pytest.mark.parametrize("command", ["score", "tune", "rank"])
def test_odd_values_are_refused_in_one_line(command, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if command == "rank":
        flags = ["--ranks" if flag == "--r" else flag for flag in flags]
    tokens = [command, "--model", "none", *([] if "--dataset" in flags else ["--dataset", "none"]), *flags]
    assert run([f"{flags[0]}={flags[1]}" if token == flags[0] else token for token in tokens if token != flags[1]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert len(error) <= 1001
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        "1: 2",
        "null: 1",
        "true: 1",
        "? [a]\n: 1",
        "model: {a: 1}",
        "model: [[a]]",
        "layers: [null]",
        "samples: 2024-01-01",
        "model: !!binary aGk=",
        "r: 3\nlora_r: 4",
        "sampels: 3",
        'model: "a\\0b"',
        "&a [*a]",
        "[" * 3000,
        "--- 1\n--- 2",
        "a: &a [x]\nb: &b [*a]\n",
        "!!python/object/apply:os.system [ls]",
        "seed: .nan",
        "seed: .inf",
        "alpha: -1",
        "r: 1e400",
        "r: 99999999999999999999",
        "samples: [1, 2]",
        "config_name: ''",
        "target_modules: [1, [2]]",
    ],
)
def test_config_files_of_odd_content_are_refused_in_one_line(content, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(content, encoding="utf-8")
    assert run(["score", "--model", "none", "--dataset", "none", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "ConfigError" not in error
    assert "none" not in error.replace("None", "")  # it is the file that is refused, not the model


@pytest.mark.parametrize(
    ("command", "flag", "values"),
    [
        ("tune", "epochs", [1.5]),
        ("rank", "epochs", [1.5]),
        ("rank", "epochs", [3, 1.5]),
        ("rank", "ranks", [4, 2.5]),
        ("rank", "choose", [1.5]),
        ("score", "layers", [0.5]),
        ("forecast", "samples", [32.5]),
        ("forecast", "rows", [100, 1000.5]),
    ],
)
def test_whole_numbers_are_not_rounded_to(command, flag, values, tmp_path, capsys):
    """Neither on the command line nor in a file: 1.5 epochs are not 2."""
    path = tmp_path / "c.yaml"
    path.write_text(f"{flag}: {values if values[1:] else values[0]}\n", encoding="utf-8")
    start = [command, "--model", "none", "--dataset", "none"]
    for tokens in ([f"--{flag}", *map(str, values)], [f"--{flag}={values[-1]}"], ["--config", str(path)]):
        assert run([*start, *tokens]) == 2
        assert capsys.readouterr().err == f"error: {flag} = {values[-1]}: must be a whole number\n"


def test_an_alias_bomb_is_refused_before_it_grows(tmp_path, capsys):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(lines), encoding="utf-8")
    for tokens in (["score", "--config", str(path)], ["study", str(path), "--output", str(tmp_path / "s")]):
        assert run(tokens) == 2
        assert "aliases" in capsys.readouterr().err
