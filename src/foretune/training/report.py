"""What a person reads on the terminal of a fine-tune."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from foretune.forecasting.report import columns_of_tokens, length_of_tokens
from foretune.report.terminal import print_facts
from foretune.settings.groups import LANGUAGE_KINDS
from foretune.tasks.metrics import metrics_of


def print_tune_plan(console: Console, facts: dict[str, Any], placement: str) -> None:
    """Say what was understood before the work starts.

    Args:
        console: Where to.
        facts: From a plan's `describe`.
        placement: The adapter in words.
    """
    data, counts = facts["data"], facts["placement"]
    rows = [
        ("model", facts["model"]),
        ("", f"{facts['architecture']}, {facts['parameters'] / 1e6:.1f} M parameters"),
        ("data", facts["dataset"]),
        (
            "",
            f"{data['train_rows']} rows train ({data['train_split']}), {data['eval_rows']} rows of "
            f"{data['eval_split']} evaluate, {data['train_eval_rows']} training rows evaluated again",
        ),
        *(_tokens(data) if data["task"] in LANGUAGE_KINDS else _texts(data)),
        ("adapter", f"{placement}; {len(counts['modules'])} modules, {counts['trainable_parameters']:,} parameters"),
        *([("", note) for note in facts["notes"]] if data["task"] in LANGUAGE_KINDS else _head(facts)),
    ]
    print_facts(console, rows)


def _head(facts: dict[str, Any]) -> list[tuple[str, str]]:
    counts = facts["placement"]
    return [
        ("head", f"trains too, {counts['head_parameters']:,} parameters (from {facts['head_source']})"),
        *([("new", f"{', '.join(facts['head_new'])} from {facts['head_source']}")] if facts["head_new"] else []),
        *(("", note) for note in facts["head_notes"]),
    ]


def _texts(data: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("columns", f"text: {', '.join(data['text_columns'])}; label: {data['label_column']} ({_outputs(data)})"),
        ("length", f"up to {data['max_length']} tokens, {data['truncated_share']:.1%} of the texts truncated"),
    ]


def _tokens(data: dict[str, Any]) -> list[tuple[str, str]]:
    carry = f"{data['train_targets']:,} carry loss in training, {data['eval_targets']:,} in the evaluation"
    return [columns_of_tokens(data), ("tokens", carry), length_of_tokens(data)]


def print_tune(console: Console, result: dict[str, Any]) -> None:
    """Print the table of a fine-tune.

    Args:
        console: Where to.
        result: As in `result.json`.
    """
    settings = result["settings"]
    console.print(
        Text(
            f"{result['model']} on {result['dataset']}\n{result['steps']} steps of AdamW, learning rate "
            f"{settings['learning_rate']:g}, batch size {result['batch_size_total']}, seed {result['seed']}",
            style="bold",
        ),
        soft_wrap=True,
    )
    table = Table(show_edge=False, pad_edge=False)
    metrics = metrics_of(result["details"]["data"]["task"])
    labels = (metric.label for metric in metrics)
    for name in ("epoch", "train loss", "in eval mode", "eval loss", *labels, "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for epoch in result["epochs"]:
        table.add_row(
            str(epoch["epoch"]),
            *(_number(epoch[name]) for name in ("train_loss", "train_loss_eval_mode", "eval_loss")),
            *(metric.written(epoch[f"eval_{metric.name}"]) for metric in metrics),
            f"{epoch['seconds']:.1f}",
        )
    console.print(table)
    if result["diverged"]:
        console.print("• The training diverged: losses are not finite. Lower the learning rate.", style="red")
    main, best = metrics[0], result["best_epoch"]
    last, reached = (
        None if epoch is None else epoch[f"eval_{main.name}"]
        for epoch in (result["final"], None if best is None else result["epochs"][best])
    )
    if reached is not None and (last is None or main.better * reached > main.better * last):
        console.print(
            f"• {main.label[0].upper()}{main.label[1:]} was best after epoch {best} ({main.written(reached)}); the "
            "adapter saved is that of the last epoch.",
            style="yellow",
        )
    seconds = result["seconds"]
    console.print(
        f"{seconds['total']:.1f} s: load {seconds['load']:.1f}, train {seconds['train']:.1f}, "
        f"evaluate {seconds['evaluate']:.1f}",
        style="dim",
    )


def _outputs(data: dict[str, Any]) -> str:
    """Kind of the task, and how many outputs it has."""
    n, words = len(data["label_names"]), {"classification": "classes", "multi-label": "labels"}
    what = words.get(data["task"], "number" if n == 1 else "numbers")
    return f"{n} {what}" if data["task"] == "classification" else f"{data['task']}, {n} {what}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
