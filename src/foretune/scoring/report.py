"""What a person reads on the terminal: what was understood, and the table of results."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from foretune.forecasting.factor_room import GIB
from foretune.forecasting.report import model_and_data_rows, print_layout_notes
from foretune.report.terminal import print_facts
from foretune.tasks.metrics import Metric, main_metric


def print_plan(console: Console, facts: dict[str, Any], placement: str) -> None:
    """Say what was understood before the work starts.

    Args:
        console: Where to.
        facts: From `describe`.
        placement: The adapter in words.
    """
    data, head = facts["data"], facts["head"]
    inside = "in" if head["in_kernel"] else "out of"
    rows = [
        *model_and_data_rows(facts),
        (facts["objective"]["noun"], _outputs(data)),
        ("samples", f"{facts['n']} for the kernel, {facts['n_eval']} for evaluation, {facts['repeats']} draw(s)"),
        ("length", f"up to {data['max_length']} tokens, {data['truncated_share']:.1%} of the texts truncated"),
        ("adapter", f"{placement}; {facts['adapter']['sites']} modules, {facts['adapter']['parameters']:,} parameters"),
        ("draws of A", str(facts["adapter"]["draws_of_a"])),
        ("head", f"{head['policy']} (from {head['source']}), {head['parameters']:,} parameters, {inside} the kernel"),
        *([("new", f"{', '.join(head['new'])} from {head['source']}")] if head["new"] else []),
        *(("", note) for note in head["notes"]),
        memory_row(facts["expected_bytes"]),
    ]
    print_facts(console, rows)
    print_layout_notes(console, facts["adapter"])
    print_duplicates(console, data)


def memory_row(memory: dict[str, int]) -> tuple[str, str]:
    """Say what memory is expected.

    Args:
        memory: Bytes of `weights`, `features`, `activations` and `total`, and of `kernels` if they were counted.

    Returns:
        Name and value.
    """
    counted = ", ".join(
        f"{name} {memory[name] / GIB:.2f}" for name in ("weights", "features", "kernels") if name in memory
    )
    activations = f"activations up to {memory['activations'] / GIB:.2f}"
    return "memory", f"about {memory['total'] / GIB:.2f} GiB: {counted}, {activations}"


def print_duplicates(console: Console, data: dict[str, Any]) -> None:
    """Say how many samples are the same, if any.

    Args:
        console: Where to.
        data: Facts of the data.
    """
    if data["duplicates"]:
        console.print(f"note: {data['duplicates']} of the samples repeat another's tokens: λ_min is 0", style="yellow")


def _outputs(data: dict[str, Any]) -> str:
    """The outputs by name, and how often each is there or how its numbers spread."""
    names = [name if name == str(index) else f"{index} {name}" for index, name in enumerate(data["label_names"])]
    if "target_means" in data:
        spread = zip(names, data["target_means"], data["target_deviations"], strict=True)
        return ", ".join(f"{name}: {mean:.3g} ± {deviation:.3g}" for name, mean, deviation in spread)
    counts = data["class_counts"] if "class_counts" in data else data["label_counts"]
    return ", ".join(f"{name}: {count}" for name, count in zip(names, counts, strict=True))


def print_result(console: Console, result: dict[str, Any]) -> None:
    """Print the table of a score.

    Args:
        console: Where to.
        result: As in `result.json`.
    """
    table, row = start_table(result)
    console.print(_title(result), soft_wrap=True)
    _regression_rows(result, row)
    table.add_section()
    kernel_rows(result, row)
    if result["sketch"] is not None:
        row("error of the sketch", f"{result['sketch']['relative_error']:.1%} of ‖K̂‖")
    alignment = result["kernel"]["alignment"]
    row("kernel-target alignment", "–" if alignment is None else f"{alignment:.4g}", "alignment")
    table.add_section()
    _bound_rows(result, row)
    console.print(table)
    print_notes(console, result["notes"])
    seconds = result["seconds"]
    console.print(
        f"{seconds['total']:.1f} s: load {seconds['load']:.1f}, kernel {seconds['kernel']:.1f}, "
        f"spectrum {seconds['spectrum']:.2f}, kernel regression {seconds['kernel_regression']:.1f}",
        style="dim",
    )


def start_table(result: dict[str, Any]) -> tuple[Table, Any]:
    """Start the table of a score, with a column for each spread that there is.

    Args:
        result: As in `result.json`.

    Returns:
        The table, and what adds a row: name, value, the key of the spread and the metric that it is written as.
    """
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("quantity", no_wrap=True)
    table.add_column("this adapter", justify="right", no_wrap=True)
    draws, repeats = result["spread"]["draws_of_a"], result["spread"]["repeats"]
    if draws is not None:
        table.add_column(f"{_count(draws)} draws of A", justify="right", no_wrap=True)
    if repeats is not None:
        table.add_column(f"{_count(repeats)} sample draws", justify="right", no_wrap=True)
    spreads = [spread for spread in (draws, repeats) if spread is not None]

    def row(name: str, value: str, key: str | None = None, metric: Metric | None = None) -> None:
        table.add_row(name, value, *(_mean(spread.get(key) if key else None, metric) for spread in spreads))

    return table, row


def print_notes(console: Console, said: list[str]) -> None:
    """Print what the numbers do not show.

    Args:
        console: Where to.
        said: Sentences.
    """
    for note in said:
        console.print(Text(f"• {note}"), style="yellow")


def _title(result: dict[str, Any]) -> Text:
    return Text(
        f"{result['model']} on {result['dataset']}\n"
        f"n = {result['n']}, output {result['output']}, head {result['details']['head']['policy']}, "
        f"seed {result['seed']}",
        style="bold",
    )


def _count(spread: dict[str, Any]) -> int:
    return max(int(value["count"]) for value in spread.values() if value is not None)


def _metric(result: dict[str, Any]) -> Metric:
    """The main metric of what was scored."""
    return main_metric(result["details"]["objective"]["kind"])


def _mean(summary: dict[str, Any] | None, metric: Metric | None) -> str:
    if summary is None:
        return ""
    if metric is not None:
        return f"{metric.written(summary['mean'])} ± {metric.written(summary['standard_deviation'])}"
    return f"{summary['mean']:.3g} ± {summary['standard_deviation']:.2g}"


def _regression_rows(result: dict[str, Any], row: Any) -> None:
    predicted, metric, head = result["kernel_regression"], _metric(result), result["head_kernel"]
    name, baselines = metric.name, predicted["baselines"]
    if predicted["eval_loss"] is not None:
        error = predicted[f"eval_{name}_standard_error"]
        value = metric.written(predicted[f"eval_{name}"]) + ("" if error is None else f" ± {metric.written(error)}")
        row(f"kernel regression: eval {metric.label}", value, f"eval_{name}", metric)
        if head is not None:
            row("  head's kernel alone", metric.written(head["kernel_regression"][f"eval_{name}"]))
        row("  before training", metric.written(baselines[f"f0_{name}"]))
        if f"majority_{name}" in baselines:
            row("  majority class", metric.written(baselines[f"majority_{name}"]))
        elif baselines[f"constant_{name}"] is not None:
            row("  one prediction for all", metric.written(baselines[f"constant_{name}"]))
        row("  eval loss", f"{predicted['eval_loss']:.4f}", "eval_loss")
    row(
        "  train loss" if predicted["eval_loss"] is not None else "kernel regression: train loss",
        f"{predicted['train_loss']:.4f}",
        "train_loss",
    )
    row(f"  leave-one-out {metric.label}", metric.written(predicted[f"loo_{name}"]), f"loo_{name}", metric)


def kernel_rows(result: dict[str, Any], row: Any) -> None:
    """Add the rows of a kernel's spectrum to the table.

    Args:
        result: As in `result.json`.
        row: From `start_table`.
    """
    kernel = result["kernel"]
    low, high = kernel["condition_number_interval"]
    interval = f" [{low:.4g}, {high:.4g}]" if high > low else ""
    row(f"κ (σ = {kernel['sigma']:g})", f"{kernel['condition_number']:.4g}{interval}", "condition_number")
    if result["kernel_centred"] is not None:
        row("  of the centred kernel", f"{result['kernel_centred']['condition_number']:.4g}")
    row("  scale-free", f"{kernel['condition_number_relative']:.4g}")
    row("λ_max", f"{kernel['lambda_max']:.4g}", "lambda_max")
    resolved = "" if kernel["lambda_min_resolved"] else f" (below the floor {kernel['floor']:.1g})"
    row("λ_min", f"{kernel['lambda_min']:.4g}{resolved}", "lambda_min")
    row("trace", f"{kernel['trace']:.4g}", "trace")
    row("effective dimension", f"{kernel['effective_dimension']:.4g}", "effective_dimension")


def _bound_rows(result: dict[str, Any], row: Any) -> None:
    bounds = result["bounds"]
    row("empirical risk at σ", f"{bounds['empirical_risk']:.4g}", "empirical_risk")
    tight, printed = bounds["tight"], bounds["printed"]
    row("  bounds, tight form", f"{tight['lower']:.3g} … {tight['upper']:.3g}")
    verdict = "as printed" if printed["holds"] else "printed: violated"
    row(f"  bounds, {verdict}", f"{printed['lower']:.3g} … {printed['upper']:.3g}")


def saturation(result: dict[str, Any]) -> list[str]:
    """Say what κ is worth where λ_min does not count.

    Args:
        result: As in `result.json`.

    Returns:
        A sentence, or none.
    """
    if not result["kernel"]["saturated"]:
        return []
    return [
        "κ is saturated: λ_min does not count beside σ, so κ ≈ 1 + λ_max/σ is a gradient-norm meter in units "
        "of σ and says nothing of conditioning."
    ]


def notes(result: dict[str, Any]) -> list[str]:
    """Say what the numbers do not show.

    Args:
        result: As in `result.json`.

    Returns:
        Sentences.
    """
    said = saturation(result)
    if not result["bounds"]["printed"]["holds"]:
        said.append("The bound as the paper prints it does not hold for this kernel; the tight form does.")
    if result["kernel_regression"]["eval_loss"] is not None:
        said.append(
            f"Kernel regression on {result['n']} samples is no simulation of the training on "
            f"{result['details']['data']['train_rows']} rows: compare configurations by it, do not read it as the "
            "level that will be reached. foretune forecast simulates the run."
        )
    data = result["details"]["data"]
    counts = data.get("sample_class_counts", data.get("sample_label_counts", ()))
    if result["kernel"]["estimated"] is not None:
        said.append(
            f"A kernel of {result['kernel']['n']:,} rows is not decomposed: effective dimensions, entropy rank and "
            "decay exponent are estimates, whose errors stand in result.json."
        )
    if result["sketch"] is not None:
        width, error = result["sketch"]["width"], result["sketch"]["relative_error"]
        said.append(
            f"The kernel is that of a random sketch of width {width:,}: in Frobenius norm it is off by about "
            f"{error:.1%}, and its small eigenvalues are those of the sketch."
        )
    missing = [name for name, count in zip(data["label_names"], counts, strict=False) if count == 0]
    if missing:
        noun = "class" if "sample_class_counts" in data else "label"
        said.append(f"No sample of {noun} {', '.join(missing)} was drawn: take more samples.")
    return said
