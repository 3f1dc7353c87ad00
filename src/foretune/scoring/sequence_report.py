"""What a person reads of a language model's score: what was understood, the table, and what it leaves out."""

from typing import Any

from rich.console import Console
from rich.text import Text

from foretune.forecasting.report import columns_of_tokens, length_of_tokens
from foretune.report.terminal import print_facts
from foretune.scoring.report import (
    kernel_rows,
    memory_row,
    print_duplicates,
    print_notes,
    saturation,
    start_table,
)

NOT_APPLICABLE = "not applicable"
WORDS = {
    "loss": "gradients of each sequence's loss, mean per token",
    "loss-sum": "gradients of each sequence's loss, summed over its tokens",
    "fisher": "gradients of the loss of labels drawn from the model, per token",
}


def print_sequence_score_plan(console: Console, facts: dict[str, Any], placement: str, kernel: str) -> None:
    """Say what was understood before the work starts.

    Args:
        console: Where to.
        facts: From `describe_sequence_score`.
        placement: The adapter in words.
        kernel: Name of the kernel.
    """
    data, adapter = facts["data"], facts["adapter"]
    of_labels = f", {facts['label_draws']} draws of labels" if facts["label_draws"] else ""
    rows = [
        ("model", facts["model"]),
        ("", f"{facts['architecture']}, {facts['parameters'] / 1e6:.1f} M parameters, {facts['dtype']}"),
        ("device", f"{facts['device']}, {facts['threads']} threads"),
        ("data", facts["dataset"]),
        ("", f"{data['train_rows']} training rows ({data['train_split']})"),
        columns_of_tokens(data),
        ("samples", f"{facts['n']} sequences with {data['known_targets']:,} targets, {facts['repeats']} draw(s)"),
        length_of_tokens(data),
        ("adapter", f"{placement}; {adapter['sites']} modules, {adapter['parameters']:,} parameters"),
        ("draws of A", str(adapter["draws_of_a"])),
        ("kernel", f"{kernel}: {WORDS[kernel]}{of_labels}"),
        *(("", note) for note in facts["notes"]),
        memory_row(facts["expected_bytes"]),
    ]
    print_facts(console, rows)
    print_duplicates(console, data)


def print_sequence_score(console: Console, result: dict[str, Any]) -> None:
    """Print the table of a language model's score.

    Args:
        console: Where to.
        result: As in `result.json`.
    """
    title = (
        f"{result['model']} on {result['dataset']}\n"
        f"n = {result['n']}, kernel {result['output']} ({WORDS[result['output']]}), seed {result['seed']}"
    )
    table, row = start_table(result)
    console.print(Text(title, style="bold"), soft_wrap=True)
    row("loss before training, nats a token", f"{result['base']['train_loss']:.4f}")
    table.add_section()
    kernel_rows(result, row)
    table.add_section()
    for name in ("kernel-target alignment", "risk bounds", "kernel regression"):
        row(name, NOT_APPLICABLE)
    console.print(table)
    print_notes(console, result["notes"])
    seconds = result["seconds"]
    console.print(
        f"{seconds['total']:.1f} s: load {seconds['load']:.1f}, kernel {seconds['kernel']:.1f}, "
        f"spectrum {seconds['spectrum']:.2f}",
        style="dim",
    )


def sequence_notes(result: dict[str, Any]) -> list[str]:
    """Say what the numbers are and what they are not.

    Args:
        result: As in `result.json`.

    Returns:
        Sentences.
    """
    said = saturation(result)
    if result["output"] == "fisher":
        said.append(
            f"The eigenvalues divided by n = {result['n']} estimate those of the adapter's Fisher (Gauss–Newton) "
            f"matrix per token, mean over the sequences, from {result['label_draws']} draws of labels; they say how "
            "the loss curves, not what the labels are."
        )
    else:
        said.append(
            "The spectrum says how differently the sequences pull at the adapter at its start: its products are of "
            "gradients of the loss, not of outputs."
        )
    simulated = " foretune forecast simulates the run." if result["placement"]["method"] == "LoRA" else ""
    said.append(
        "Risk bounds, kernel-target alignment and kernel regression are of squared loss on outputs with targets, and a "
        f"language model has no such kernel here: they are not applicable.{simulated}"
    )
    return said
