"""`config.yaml` replays a command whole: every flag of every command, taken from their signatures."""

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from peft import LoraConfig

from foretune.cli import _REPLAYED, app, flags_of, run
from foretune.commands import loading
from foretune.settings import groups
from foretune.settings.commands import ForecastSettings, RankSettings, ScoreSettings, TuneSettings

import domains

# What a run's folder is for, not what the run is.
OF_CALL = {"output", "config", "json"}
# A value unlike the default, where a number more, the other truth value or another choice is none that is allowed.
VALUES = {
    "model": "m", "dataset": "d", "device": "cpu", "config-name": "sst2", "text-column": "review", "eval-split": "dev",
    "label-column": "kind", "train-split": "first", "max-train": "50", "positive-from": "4",
    "reduction": "trace", "target-modules": "query", "exclude-modules": "key", "layers": "1",
    "budget": "300k", "equal-size": "300k", "choose": "2",
    "eval-samples": "7", "report-to": "tensorboard", "ridge": "0.5", "warmup-ratio": "0.25", "init": "gaussian",
    "rows": "300", "methods": "ia3",
    "spend": "2%", "memory": "500MB", "scratch": "s", "sketch": "64",
}  # fmt: skip
STRUCTURE = {"model": "m", "dataset": "d"}
BESIDE = {"workers": ["--spend", "2%"], "engine": ["--spend", "2%"]}  # without which the flag is refused


@pytest.fixture
def folder(tmp_path):
    calibration = domains.by_hand(domains.everywhere("m"))
    (tmp_path / "calibration.json").write_text(json.dumps(calibration.to_dict()), encoding="utf-8")
    (tmp_path / "curve.csv").write_text("step,train_loss,eval_loss,eval_accuracy\n0,,1,0.5\n1,1,1,0.5\n", "utf-8")
    LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS").save_pretrained(str(tmp_path))
    return tmp_path


def other(command, flag, folder):
    """A value unlike the default, as it is typed."""
    if flag in ("calibration", "adapter-config", "forecast"):
        name = {"calibration": "calibration.json", "adapter-config": "adapter_config.json", "forecast": "curve.csv"}
        return [str(folder / name[flag])]
    if flag in VALUES:
        return [VALUES[flag]]
    (argument,) = [a for a in app[command].assemble_argument_collection() if f"--{flag}" in a.names]
    default = argument.field_info.default
    if isinstance(default, bool):
        return [] if not default else [f"--no-{flag}"]
    if isinstance(default, tuple):
        return [str(value + 1) for value in default]
    choices = argument.get_choices()
    if choices:
        return [next(choice for choice in choices if choice != default)]
    return [str(2 * default or 0.125 if isinstance(default, float) else default + 1)]


def taken(command, tokens, monkeypatch):
    """What the work of a command is given, once its tokens are parsed."""
    names = {"score": "score_command", "forecast": "forecast_command", "tune": "tune_command", "rank": "rank_command"}
    given = []

    def catch(*args, **options):
        given.append((args, options))

    monkeypatch.setattr(f"foretune.commands.{command}.{names[command]}", catch)
    assert run([command, *tokens]) == 0
    monkeypatch.undo()
    return given[0]


def written(command, tokens, folder, monkeypatch):
    """The `config.yaml` of a command, its heavy work left out."""
    args, options = taken(command, tokens, monkeypatch)
    out = folder / "out"
    if command == "tune":
        from foretune.training.folder import open_folder, read_forecast

        config = args[0]
        drawn = read_forecast(out, options["forecast"])
        open_folder(out, config.to_dict(), loading.read_adapter(config), forecast=drawn)
        return out / "config.yaml"
    files = {}
    for place in ("scoring.files", "forecasting.files", "ranking.report"):
        monkeypatch.setattr(f"foretune.{place}.write_run", lambda _, writers: files.update(writers))
    if command == "rank":
        from foretune.forecasting.calibration_file import read_calibration
        from foretune.ranking import report

        wanted = report.Wanted(options["choose"], own_calibration=args[2] is not None)
        report.save_rankings((), args[0], read_calibration(args[2]), out, wanted)
    elif command == "score":
        from foretune.scoring import files as score_files

        monkeypatch.setattr(score_files, "score_content", lambda _: {"versions": {"foretune": "0"}})
        score_files.save_score(None, out, args[0], loading.read_adapter(args[0]))
    else:
        from foretune.forecasting.calibration_file import read_calibration
        from foretune.forecasting.files import save_forecast

        result = SimpleNamespace(to_dict=dict, curve=SimpleNamespace(points=()), rows=None)
        own = None if args[2] is None else read_calibration(args[2])
        save_forecast(result, out, args[0].to_dict(), adapter=loading.read_adapter(args[0]), calibration=own)
    monkeypatch.undo()
    out.mkdir()
    for name in ("config.yaml", "calibration.json", "adapter_config.json"):
        if name in files:
            files[name](out / name)
    return out / "config.yaml"


def plain(value, folder):
    """Arguments of a command's work, files by what they hold."""
    args, options = value
    contents = [json.loads(part.read_text("utf-8")) if isinstance(part, Path) else part for part in args]
    configuration = getattr(args[0], "adapter", None)
    if isinstance(configuration, Path):
        file = configuration if configuration.is_file() else configuration / "adapter_config.json"
        told = args[0].to_dict()
        contents[0] = {**told, "adapter_config": {**json.loads(file.read_text("utf-8")), "target_modules": None}}
    if options.get("forecast") is not None:
        options = {**options, "forecast": options["forecast"].read_text("utf-8")}
    return contents, options


FLAGS = [(command, flag) for command in _REPLAYED for flag in sorted(flags_of(command) - OF_CALL)]


@pytest.mark.parametrize(("command", "flag"), FLAGS)
def test_a_run_is_replayed_with_every_flag(command, flag, folder, monkeypatch):
    value = other(command, flag, folder)
    if value[:1] == [f"--no-{flag}"]:
        pytest.fail(f"--{flag} is on by default: there is no flag to turn it off")
    required = [token for name, text in STRUCTURE.items() if name != flag for token in (f"--{name}", text)]
    beside = BESIDE.get(flag, [])
    tokens = [*required, *beside, f"--{flag}", *value]
    if flag == "model":
        tokens = ["--dataset", "d", "--model", "another"]
    if flag == "dataset":
        tokens = ["--model", "m", "--dataset", "another"]
    given = taken(command, tokens, monkeypatch)
    structure = [token for pair in STRUCTURE.items() for token in (f"--{pair[0]}", pair[1])]
    bare = taken(command, [*structure, *beside], monkeypatch)
    assert plain(given, folder) != plain(bare, folder)  # the value is unlike the default
    config = written(command, tokens, folder, monkeypatch)
    again = taken(command, ["--config", str(config)], monkeypatch)
    assert plain(again, folder) == plain(given, folder)


@pytest.mark.parametrize("reader", _REPLAYED)
@pytest.mark.parametrize("command", _REPLAYED)
def test_a_file_of_another_command_is_read_for_what_is_common(command, reader, folder, monkeypatch):
    """The others' flags are passed over; what both have is taken."""
    tokens = ["--model", "m", "--dataset", "d", "--max-length", "17", "--seed", "5", "--max-train", "33"]
    common = flags_of(command) & flags_of(reader)
    for flag in ("epochs", "learning-rate", "alpha"):
        if flag in common:
            tokens += [f"--{flag}", "3"]
    config = written(command, tokens, folder, monkeypatch)
    args, _ = taken(reader, ["--config", str(config)], monkeypatch)
    settings = args[0].settings
    assert (settings.max_length, settings.seed) == (17, 5)
    data = args[0].data[0] if reader == "rank" else args[0].data
    assert (data.dataset, data.max_train) == ("d", 33)
    for flag in ("epochs", "learning_rate"):
        if flag.replace("_", "-") in common:
            assert getattr(settings, flag) == ((3,) if reader == "rank" else 3)


def test_files_of_earlier_scores_are_read(folder, monkeypatch):
    """They may ask for a curve, which is `foretune forecast`'s now."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "dataset": "d", "curve": True, "epochs": 3, "draws": 2}), "utf-8")
    assert taken("score", ["--config", str(path)], monkeypatch)[0][0].settings.draws == 2
    assert taken("forecast", ["--config", str(path)], monkeypatch)[0][0].settings.epochs == 3


def test_one_recipe_or_several_are_read_of_a_file(folder, monkeypatch):
    """A number, or a list of them; the same in any order, each once."""
    path = folder / "config.yaml"
    content = {"model": "m", "dataset": "d", "num_train_epochs": 3, "learning_rate": [3e-3, 1e-3, 3e-3]}
    path.write_text(yaml.safe_dump(content), "utf-8")
    settings = taken("rank", ["--config", str(path)], monkeypatch)[0][0].settings
    assert [(one.epochs, one.learning_rate) for one in settings.each()] == [(3, 1e-3), (3, 3e-3)]
    over = taken("rank", ["--config", str(path), "--epochs", "5", "1"], monkeypatch)[0][0].settings
    assert sorted({one.epochs for one in over.each()}) == [1, 5]
    path.write_text(
        yaml.safe_dump({**content, "learning_rate": [], "epochs": None}).replace("epochs: null\n", ""), "utf-8"
    )
    assert taken("rank", ["--config", str(path)], monkeypatch)[0][0].settings.learning_rate == (4e-4,)


def test_every_setting_is_a_flag():
    kinds = {"score": ScoreSettings, "forecast": ForecastSettings, "tune": TuneSettings, "rank": RankSettings}
    for command, kind in kinds.items():
        names = {field.name for part in (kind, groups.ModelConfig, groups.DataConfig) for field in fields(part)}
        assert {name.replace("_", "-") for name in names} <= flags_of(command)
