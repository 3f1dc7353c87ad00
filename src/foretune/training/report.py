"""What a person reads on the terminal of a fine-tune."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from foretune.report.terminal import print_facts


def print_tune_plan(console: Console, facts: dict[str, Any], placement: str) -> None:
    """Say what was understood before the work starts.

    Args:
        console: Where to.
        facts: From `describe_tune`.
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
        ("columns", f"text: {', '.join(data['text_columns'])}; label: {data['label_column']}"),
        ("length", f"up to {data['max_length']} tokens, {data['truncated_share']:.1%} of the texts truncated"),
        ("adapter", f"{placement}; {len(counts['modules'])} modules, {counts['trainable_parameters']:,} parameters"),
        ("head", f"trains too, {counts['head_parameters']:,} parameters (from {facts['head_source']})"),
        *([("new", f"{', '.join(facts['head_new'])} from {facts['head_source']}")] if facts["head_new"] else []),
        *(("", note) for note in facts["head_notes"]),
    ]
    print_facts(console, rows)


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
    for name in ("epoch", "train loss", "in eval mode", "eval loss", "accuracy", "Matthews", "macro F1", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for epoch in result["epochs"]:
        table.add_row(
            str(epoch["epoch"]),
            *(_number(epoch[name]) for name in ("train_loss", "train_loss_eval_mode", "eval_loss")),
            f"{epoch['eval_accuracy']:.1%}",
            f"{epoch['eval_matthews']:.3f}",
            f"{epoch['eval_macro_f1']:.3f}",
            f"{epoch['seconds']:.1f}",
        )
    console.print(table)
    if result["diverged"]:
        console.print("• The training diverged: losses are not finite. Lower the learning rate.", style="red")
    best = result["epochs"][result["best_epoch"]]
    if best["eval_accuracy"] > result["final"]["eval_accuracy"]:
        console.print(
            f"• Accuracy was best after epoch {best['epoch']} ({best['eval_accuracy']:.1%}); the adapter saved is that "
            "of the last epoch.",
            style="yellow",
        )
    seconds = result["seconds"]
    console.print(
        f"{seconds['total']:.1f} s: load {seconds['load']:.1f}, train {seconds['train']:.1f}, "
        f"evaluate {seconds['evaluate']:.1f}",
        style="dim",
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
