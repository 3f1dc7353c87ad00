"""What a forecast prints, and the files of its run folder: result.json, curve.csv, curve.png, config.yaml."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foretune.forecasting.calibration import CALIBRATION, Calibration
from foretune.forecasting.curve import write_curve
from foretune.forecasting.forecast import ForecastResult
from foretune.models.adapter_file import save_adapter
from foretune.models.sites import kinds_in_words
from foretune.report.curve_figure import curve_figure
from foretune.report.curves import CURVE
from foretune.report.provenance import versions
from foretune.report.store import plain_text, write_json, write_run
from foretune.report.terminal import print_facts
from foretune.settings.commands import ADAPTER_FILE

ROWS = 5  # of the course in the table


def save_forecast(
    result: ForecastResult,
    folder: Path,
    flags: Mapping[str, Any] | None = None,
    *,
    adapter: LoraConfig | None = None,
    calibration: Calibration | None = None,
) -> None:
    """Write a run folder, whole or not at all.

    Args:
        result: The forecast.
        folder: New or empty folder.
        flags: Settings that replay it; None leaves `config.yaml` out (a forecast from Python objects).
        adapter: The adapter that was read from a file, written beside the settings; None if they describe it.
        calibration: The calibration that was given, written beside them; None if it is foretune's.
    """
    content, course = result.to_dict(), result.curve
    writers: dict[str, Callable[[Path], None]] = {"result.json": lambda path: write_json(path, content)}
    if course.points:
        title = f"forecast for {content['dataset']}"
        writers[CURVE] = lambda path: write_curve(course, path)
        writers["curve.png"] = lambda path: curve_figure(course.points, title, path)
    if flags is not None:
        given = {**flags, **({} if calibration is None else {"calibration": CALIBRATION})}  # beside config.yaml
        header = f"# foretune {versions()['foretune']}. Replay: foretune forecast --config config.yaml --output NEW\n"
        text = header + yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
        writers["config.yaml"] = lambda path: plain_text(path, text)
    if adapter is not None:
        writers[ADAPTER_FILE] = lambda path: save_adapter(adapter, path)
    if calibration is not None:
        own = calibration.to_dict()
        writers[CALIBRATION] = lambda path: write_json(path, own)
    write_run(folder, writers)


def print_forecast_plan(console: Console, facts: Mapping[str, Any], placement: str) -> None:
    """Say what was understood before the work starts.

    Args:
        console: Where to.
        facts: From `problem.describe`.
        placement: The adapter in words.
    """
    data, adapter = facts["data"], facts["adapter"]
    rows = [
        ("model", facts["model"]),
        ("", f"{facts['architecture']}, {facts['parameters'] / 1e6:.1f} M parameters, {facts['dtype']}"),
        ("device", f"{facts['device']}, {facts['threads']} threads"),
        ("data", facts["dataset"]),
        ("", f"{data['train_rows']} training rows ({data['train_split']}), evaluation on {data['eval_split']}"),
        ("columns", f"text: {', '.join(data['text_columns'])}; label: {data['label_column']}"),
        ("samples", f"{facts['n']} known, {facts['n_eval']} to predict"),
        ("length", f"up to {data['max_length']} tokens, {data['truncated_share']:.1%} of the texts truncated"),
        ("adapter", f"{placement}; {adapter['sites']} modules, {adapter['parameters']:,} parameters"),
        *(("head", note) for note in facts["head"]["notes"]),
    ]
    print_facts(console, rows)
    for name, words in (("left_out", "no output depends on it: left out"), ("one_at_a_time", "texts go one at a time")):
        if adapter[name]:
            note = f"note: {kinds_in_words(adapter[name])}: {words}"
            console.print(note, style="yellow", markup=False, highlight=False)


def print_forecast(console: Console, result: Mapping[str, Any]) -> None:
    """Print the course of a run and its end with intervals, or why they are withheld.

    Args:
        console: Where to.
        result: As in `result.json`.
    """
    steps, rows = result["steps"], result["train_rows"]
    said = f"{result['model']} on {result['dataset']}\n{steps} steps on {rows} rows, from {result['samples']} of them"
    console.print(Text(said, style="bold"), soft_wrap=True)
    if result["end"] is not None:
        console.print(_table(result["end"], result["points"]))
    for note in result["notes"]:
        console.print(Text(f"• {note}"), style="yellow")
    seconds = result["seconds"]
    console.print(
        f"{seconds['total']:.1f} s: load {seconds['load']:.1f}, forecast {seconds['forecast']:.1f}", style="dim"
    )


def _table(end: Mapping[str, Any], points: list[dict[str, Any]]) -> Table:
    table = Table(show_edge=False, pad_edge=False, title="Forecast of the run, 90% intervals", title_justify="left")
    for name in ("after step", "eval accuracy", "eval loss", "train loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in points[: -1 : max(1, len(points) // ROWS)]:
        train = "–" if point["train_loss"] is None else f"{point['train_loss']:.4f}"
        table.add_row(str(point["step"]), f"{point['eval_accuracy']:.1%}", f"{point['eval_loss']:.4f}", train)
    table.add_section()

    def interval(name: str, form: str) -> str:
        value = end[name]
        return f"{value['value']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"

    table.add_row(
        str(points[-1]["step"]),
        interval("accuracy", ".1%"),
        interval("eval_loss", ".3f"),
        "withheld" if end["train_loss"] is None else interval("train_loss", ".3f"),
    )
    return table
