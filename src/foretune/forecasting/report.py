"""What a person reads on the terminal of a forecast."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from foretune.models.sites import kinds_in_words
from foretune.report.terminal import print_facts
from foretune.tasks.metrics import Metric, main_metric

ROWS = 5  # of the course in the table


def print_forecast_plan(console: Console, facts: Mapping[str, Any], placement: str) -> None:
    """Say what was understood before the work starts.

    Args:
        console: Where to.
        facts: From `problem.describe`.
        placement: The adapter in words.
    """
    data, adapter = facts["data"], facts["adapter"]
    rows = [
        *model_and_data_rows(facts),
        ("samples", f"{facts['n']} known, {facts['n_eval']} to predict"),
        ("length", f"up to {data['max_length']} tokens, {data['truncated_share']:.1%} of the texts truncated"),
        ("adapter", f"{placement}; {adapter['sites']} modules, {adapter['parameters']:,} parameters"),
        *(("head", note) for note in facts["head"]["notes"]),
    ]
    print_facts(console, rows)
    print_layout_notes(console, adapter)


def print_sequence_plan(console: Console, facts: Mapping[str, Any], placement: str) -> None:
    """Say what was understood of a language model's run before the work starts.

    Args:
        console: Where to.
        facts: From `foretune.sequence_plan.describe_sequences`.
        placement: The adapter in words.
    """
    data, adapter = facts["data"], facts["adapter"]
    rows = [
        ("model", facts["model"]),
        ("", f"{facts['architecture']}, {facts['parameters'] / 1e6:.1f} M parameters, {facts['dtype']}"),
        ("device", f"{facts['device']}, {facts['threads']} threads"),
        ("data", facts["dataset"]),
        ("", f"{data['train_rows']} training rows ({data['train_split']}), evaluation on {data['eval_split']}"),
        columns_of_tokens(data),
        (
            "samples",
            f"{facts['n']} known with {data['known_targets']:,} targets, {facts['n_eval']} to predict with "
            f"{data['eval_targets']:,}",
        ),
        length_of_tokens(data),
        ("adapter", f"{placement}; {adapter['sites']} modules, {adapter['parameters']:,} parameters"),
        *(("", note) for note in facts["notes"]),
    ]
    print_facts(console, rows)


def columns_of_tokens(data: Mapping[str, Any]) -> tuple[str, str]:
    """Say what a language model reads, and which tokens carry loss.

    Args:
        data: From `foretune.sequence_plan.describe_rows`.

    Returns:
        Name and value.
    """
    given = data["loss_on"] or ("completion" if data["format"] in ("prompt-completion", "instruction") else "all")
    return "columns", f"{', '.join(data['text_columns'])} ({data['format']}); loss on: {given}"


def length_of_tokens(data: Mapping[str, Any]) -> tuple[str, str]:
    """Say how long a language model's rows are, and how many were cut or left out.

    Args:
        data: From `foretune.sequence_plan.describe_rows`.

    Returns:
        Name and value.
    """
    emptied = f"; {data['emptied_rows']} left out, for no token of theirs carries loss" if data["emptied_rows"] else ""
    cut = f"{data['truncated_rows']} rows truncated ({data['truncated_share']:.1%})"
    return "length", f"up to {data['max_length']} tokens, {cut}{emptied}"


def model_and_data_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say which model and data were read, as the first rows of what was understood.

    Args:
        facts: From `problem.describe`.

    Returns:
        Names, the same as above where empty, with their values.
    """
    data = facts["data"]
    return [
        ("model", facts["model"]),
        ("", f"{facts['architecture']}, {facts['parameters'] / 1e6:.1f} M parameters, {facts['dtype']}"),
        ("device", f"{facts['device']}, {facts['threads']} threads"),
        ("data", facts["dataset"]),
        ("", f"{data['train_rows']} training rows ({data['train_split']}), evaluation on {data['eval_split']}"),
        ("columns", f"text: {', '.join(data['text_columns'])}; label: {data['label_column']}"),
    ]


def print_layout_notes(console: Console, adapter: Mapping[str, Any]) -> None:
    """Say which modules are left out or take their texts one at a time.

    Args:
        console: Where to.
        adapter: `adapter` of the facts.
    """
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
    if result["end"] or result["simulated"]:
        console.print(_table(result))
    for verdict in result["verdicts"]:
        console.print(Text(f"• {verdict['sentence']}"))
    for caution in result["cautions"]:
        if caution["sentence"]:
            console.print(Text(f"• {caution['sentence']}"), style="yellow")
    metric = main_metric(result["details"]["objective"]["kind"])
    for trial in result["trials"]:
        console.print(Text(f"• {trial_in_words(trial, metric)}"))
    for note in result["notes"]:
        console.print(Text(f"• {note}"), style="yellow")
    if result["rows"] is not None:
        _print_rows(console, result["rows"], main_metric(result["details"]["objective"]["kind"]))
    seconds = result["seconds"]
    parts = [f"load {seconds['load']:.1f}", f"forecast {seconds['forecast']:.1f}"]
    parts += [f"trials, now or before, {seconds['trials']:.1f}"] if "trials" in seconds else []
    console.print(f"{seconds['total']:.1f} s: {', '.join(parts)}", style="dim")


def trial_in_words(trial: Mapping[str, Any], metric: Metric) -> str:
    """Say what a trial showed.

    Args:
        trial: As in `result.json`.
        metric: Main metric.

    Returns:
        Rows, and what was reached on the evaluation rows.
    """
    outcomes = trial["outcomes"]
    loss = "diverged" if trial["diverged"] else f"eval loss {outcomes['eval_loss']:.4f}"
    return f"trained on {trial['rows']:,} rows: eval {metric.label} {metric.written(outcomes[metric.name])}, {loss}"


def _table(result: Mapping[str, Any]) -> Table:
    """The course and its end with intervals; the simulated course where there is no calibration of this kind."""
    end, metric = result["end"], main_metric(result["details"]["objective"]["kind"])
    points = result["simulated"] if end is None else result["points"]
    title = "Simulated run, not calibrated: no forecast" if end is None else "Forecast of the run, 90% intervals"
    table = Table(show_edge=False, pad_edge=False, title=title, title_justify="left")
    for name in ("after step", f"eval {metric.label}", "eval loss", "train loss"):
        table.add_column(name, justify="right", no_wrap=True)

    def add(point: Mapping[str, Any]) -> None:
        train = "–" if point["train_loss"] is None else f"{point['train_loss']:.4f}"
        value = metric.written(point[f"eval_{metric.name}"])
        table.add_row(str(point["step"]), value, f"{point['eval_loss']:.4f}", train)

    for point in points[: -1 : max(1, len(points) // ROWS)]:
        add(point)
    table.add_section()
    if end is None:
        add(points[-1])
        return table
    table.add_row(str(points[-1]["step"]), *_levels(end, metric))
    return table


def _levels(end: Mapping[str, Any], metric: Metric) -> tuple[str, str, str]:
    """Main metric, evaluation loss and training loss with their intervals."""
    value = end[metric.name]
    words = f"{metric.written(value['value'])} [{metric.written(value['low'])}, {metric.written(value['high'])}]"
    train = "withheld" if end["train_loss"] is None else interval_of_loss(end["train_loss"])
    return words, interval_of_loss(end["eval_loss"]), train


def _print_rows(console: Console, rows: Mapping[str, Any], metric: Metric) -> None:
    """The forecast over training rows: a table, why levels are withheld, and how many rows are enough."""
    table = Table(show_edge=False, pad_edge=False, title="Forecast over training rows, 90% intervals")
    table.title_justify = "left"
    for name in ("rows", f"eval {metric.label}", "eval loss", "train loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in rows["points"]:
        levels = point["levels"]
        table.add_row(f"{point['rows']:,}", *(("withheld",) * 3 if levels is None else _levels(levels, metric)))
    console.print(Text())
    console.print(table)
    for point in rows["points"]:
        if point["reach"]["withheld"]:
            console.print(Text(f"• {point['rows']:,} rows: {'; '.join(point['reach']['reasons'])}"), style="yellow")
    console.print(Text(f"• {rows['sentence']}"), style="bold")


def interval_of_loss(value: Mapping[str, float]) -> str:
    """Write a loss with its interval.

    Args:
        value: `value`, `low` and `high`.

    Returns:
        All three, to three digits.
    """
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
