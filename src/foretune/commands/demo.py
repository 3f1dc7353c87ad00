"""`foretune demo`."""

import shlex
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from foretune.commands.forecast import make_forecast
from foretune.commands.score import make_score
from foretune.commands.tune import make_tune
from foretune.settings.commands import Configuration, ForecastSettings, ScoreSettings, TuneSettings
from foretune.settings.groups import AdapterConfig, DataConfig, ModelConfig, Recipe

if TYPE_CHECKING:
    from rich.table import Table

MODULES = ("query", "value")
RECIPE = Recipe(epochs=5, learning_rate=5e-3)  # 80 steps: what the calibration that comes with foretune has seen
LAYERS = (3, 4, 5)
MAX_LENGTH = 32
EVAL_SAMPLES = 256
SPECTRUM = (
    ("condition_number", "κ"),
    ("lambda_max", "λ_max"),
    ("lambda_min", "λ_min"),
    ("trace", "trace"),
    ("effective_dimension", "effective dimension"),
    ("alignment", "kernel-target alignment"),
)


def demo(
    *,
    output: Annotated[Path | None, Parameter(group="Run")] = None,
    samples: Annotated[int, Parameter(group="Run")] = 32,
    json: Annotated[bool, Parameter(group="Run")] = False,
) -> None:
    """Forecast a fine-tune of MiniLM on BBC news, then run it, and print both side by side.

    Real weights and real text come with the extra `demo`. Above the two stands the spectrum of the adapter's tangent
    kernel; the commands that do the same are printed to stderr.

    Args:
        output: New folder for score, forecast and fine-tune; the texts are written beside it, to OUTPUT-data.
        samples: Training samples of the kernel whose spectrum is shown.
        json: Print all three results as JSON to stdout instead of the tables.
    """
    from foretune.report.folders import disk, remove
    from foretune.report.store import make_folder, to_json
    from foretune.report.terminal import console, print_json
    from foretune.tasks.demo import data_of_demo, model_folder

    kernel = ScoreSettings(samples=samples, eval_samples=0, max_length=MAX_LENGTH)
    with ExitStack() as stack:
        data = stack.enter_context(data_of_demo(output))
        if output is None:
            with disk("cannot make a temporary folder"):
                folder = Path(stack.enter_context(TemporaryDirectory()))
        else:
            folder = output
            make_folder(folder)
        try:
            results = _run(ModelConfig(_near(model_folder())), DataConfig(_near(data)), kernel, folder)
        except BaseException:
            if output is not None:
                with disk(f"cannot remove {str(folder)!r}"):
                    remove(folder)
            raise
    if json:
        print_json(to_json(results))
        return
    screen = console()
    screen.print(_spectrum(results["score"]))
    screen.print()
    screen.print(_side_by_side(results["forecast"], results["tune"]))
    for note in results["forecast"]["notes"]:
        screen.print(f"• {note}", style="yellow", markup=False, highlight=False)
    if output is not None:
        drawn = "both curves" if results["forecast"]["points"] else "the run"
        screen.print(f"{drawn}: {output / 'tuned' / 'loss.png'}", style="dim", markup=False, highlight=False)


def _near(path: Path) -> str:
    """A path as a person in the working folder would write it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _run(model: ModelConfig, data: DataConfig, kernel: ScoreSettings, folder: Path) -> dict[str, Any]:
    """Score, forecast and fine-tune one adapter, each as the command that is printed does it."""
    adapter = AdapterConfig(target_modules=MODULES, layers=LAYERS)
    known = ForecastSettings(eval_samples=EVAL_SAMPLES, max_length=MAX_LENGTH, **vars(RECIPE))
    trained = TuneSettings(eval_samples=EVAL_SAMPLES, max_length=MAX_LENGTH, train_eval_samples=0, **vars(RECIPE))
    of_score = Configuration(model, data, adapter, kernel)
    of_forecast = Configuration(model, data, adapter, known)
    of_tune = Configuration(model, data, adapter, trained)
    _say("score", of_score, folder / "score")
    score = make_score(of_score, folder / "score", brief=True)
    _say("forecast", of_forecast, folder / "forecast")
    forecast = make_forecast(of_forecast, folder / "forecast", brief=True)
    curve = folder / "forecast" if forecast["points"] else None
    _say("tune", of_tune, folder / "tuned", curve)
    tune = make_tune(of_tune, folder / "tuned", forecast=curve, brief=True)
    return {"score": score, "forecast": forecast, "tune": tune}


def _say(command: str, config: Configuration[Any], output: Path, forecast: Path | None = None) -> None:
    """Print the command that does what is done now."""
    from foretune.report.terminal import console

    tokens = ["foretune", command, *flags_of(config), *([] if forecast is None else ["--forecast", str(forecast)])]
    console(stderr=True).print(f"$ {shlex.join([*tokens, '--output', str(output)])}", soft_wrap=True, markup=False)


def flags_of(config: Configuration[Any]) -> list[str]:
    """Write a configuration as flags.

    Args:
        config: Configuration of a command.

    Returns:
        Flags and values, those that differ from the defaults.
    """
    tokens: list[str] = []
    for group in (config.model, config.data, config.adapter, config.settings):
        for name, value in vars(group).items():
            if value != getattr(type(group), name, None):
                values = value if isinstance(value, tuple) else (value,)
                tokens += [f"--{name.replace('_', '-')}", *map(str, values)]
    return tokens


def _spectrum(score: Mapping[str, Any]) -> "Table":
    """The numbers of the kernel's spectrum, with their spread over draws of A."""
    from rich.table import Table

    kernel, draws = score["kernel"], score["spread"]["draws_of_a"]
    table = Table(title=f"Tangent kernel of {score['n']} texts, before training", title_justify="left", show_edge=False)
    table.add_column("quantity")
    table.add_column("this adapter", justify="right")
    table.add_column(f"{score['settings']['draws']} draws of A", justify="right")
    for name, label in SPECTRUM:
        spread = draws[name]
        several = "–" if spread is None else f"{spread['mean']:.3g} ± {spread['standard_deviation']:.2g}"
        value = "–" if kernel[name] is None else f"{kernel[name]:.4g}"
        table.add_row(f"κ (σ = {kernel['sigma']:g})" if name == "condition_number" else label, value, several)
    return table


def _side_by_side(forecast: Mapping[str, Any], tune: Mapping[str, Any]) -> "Table":
    """What was forecast beside what the fine-tune gave."""
    from rich.table import Table

    from foretune.tasks.metrics import main_metric

    metric = main_metric(forecast["details"]["objective"]["kind"])
    end, final, count = forecast["end"] or {}, tune["final"], forecast["placement"]["trainable_parameters"]
    placed = f"{', '.join(MODULES)} of layers {', '.join(map(str, LAYERS))}"
    title = (
        f"MiniLM on BBC news: {forecast['train_rows']} texts train, {forecast['eval_rows']} evaluate,\n"
        f"{placed} ({count:,} parameters), {forecast['steps']} steps"
    )
    table = Table(title=title, title_justify="left", show_edge=False)
    table.add_column("after the last epoch")
    for name in ("forecast", "90% interval", "fine-tune", "inside"):
        table.add_column(name, justify="right")
    rows = ((metric.label, metric.name, f"eval_{metric.name}"), ("evaluation loss", "eval_loss", "eval_loss"))
    for label, name, measured in (*rows, ("training loss", "train_loss", "train_loss")):
        write = metric.written if name == metric.name else "{:.3f}".format
        value, real = end.get(name), final[measured]
        interval = ("withheld", "–", "–")
        if value is not None:
            inside = "yes" if real is not None and value["low"] <= real <= value["high"] else "no"
            interval = (write(value["value"]), f"{write(value['low'])} to {write(value['high'])}", inside)
        table.add_row(label, interval[0], interval[1], "–" if real is None else write(real), interval[2])
    seconds = (forecast["seconds"]["forecast"], tune["seconds"]["train"] + tune["seconds"]["evaluate"])
    table.add_row("seconds", f"{seconds[0]:.1f}", "", f"{seconds[1]:.1f}", "")
    return table
