"""Tables 1, 2 and 3 in the paper's layout, ours beside the printed numbers."""

from collections.abc import Callable, Sequence
from statistics import mean, stdev

from foretune.evaluation.records import Record
from foretune.paper.experiment import Experiment, title
from foretune.paper.published import COMMON3, TABLE1, TABLE2, TABLE3
from foretune.report.tables import Table
from foretune.study.grid import Cell

KEYS_ONLY = 3  # index of ({0,5,11}, {W_k}) among the placements, which Table 2 is about


def table1(experiment: Experiment, records: Sequence[Record]) -> Table:
    """Lay out κ, losses and accuracy of each data set and placement; the paper's number in parentheses.

    Args:
        experiment: What was run.
        records: Its cells.

    Returns:
        The table.
    """
    lines: list[tuple[str, Callable[[Record], float | None], Callable[..., str], str]] = [
        ("κ", lambda r: r.quantities["condition_number"], _four, "condition_number"),
        ("train loss", lambda r: r.outcomes["train_loss"], "{:.4f}".format, "train_loss"),
        ("eval loss", lambda r: r.outcomes["eval_loss"], "{:.4f}".format, "eval_loss"),
        ("accuracy %", lambda r: _percent(r.outcomes["accuracy"]), "{:.2f}".format, "accuracy"),
    ]
    rows = []
    for dataset in experiment.datasets:
        for index, (name, value, write, printed_name) in enumerate(lines):
            row = [title(dataset) if index == 0 else "", name]
            for number, placement in enumerate(experiment.placements):
                values = [value(r) for r in records if (r.dataset, r.placement) == (dataset, placement)]
                printed = TABLE1.get(dataset, ())
                paper = f" ({write(getattr(printed[number], printed_name))})" if number < len(printed) else ""
                row.append(_with_spread(values, write) + paper)
            rows.append(tuple(row))
    caption = (
        "Table 1 of the paper made again: κ at initialisation (n = 32, σ = 1e-4), train loss (mean over the last "
        "epoch's steps), eval loss and accuracy after the last epoch; in parentheses the paper's printed number. "
        f"{experiment.caption}"
    )
    return Table(caption, ("data set", "", *experiment.placements), tuple(rows), right_from=2)


def _four(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _with_spread(values: Sequence[float | None], write: Callable[..., str]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return write(mean(known)) if len(known) == 1 else f"{write(mean(known))} ± {write(stdev(known))}"


def table2(experiment: Experiment, records: Sequence[Record]) -> Table:
    """Lay out the seconds of fine-tuning and of the kernel, for the placement that the paper timed.

    Args:
        experiment: What was run.
        records: Its cells; those of other placements are passed over.

    Returns:
        The table.
    """
    placement = experiment.placements[KEYS_ONLY]
    rows = []
    for dataset in experiment.datasets:
        cells = [record for record in records if (record.dataset, record.placement) == (dataset, placement)]
        if not cells:
            continue
        tune, kernel, load = (
            mean(record.seconds[name] or 0.0 for record in cells) for name in ("fine_tune", "kernel", "load")
        )
        paper_tune, paper_kernel = TABLE2[dataset]
        rows.append(
            (
                title(dataset),
                f"{tune:.1f}",
                f"{kernel:.2f}",
                f"{100 * kernel / tune:.2f}%",
                f"{kernel + load:.2f}",
                f"{100 * (kernel + load) / tune:.2f}%",
                f"{paper_tune:.0f}",
                f"{paper_kernel:.0f}",
                f"{100 * paper_kernel / paper_tune:.2f}%",
            )
        )
    header = (
        "data set",
        "fine-tuning s",
        "kernel s",
        "ratio",
        "kernel s with loading",
        "ratio",
        "paper: fine-tuning s",
        "NTK s",
        "ratio",
    )
    caption = (
        f"Table 2 of the paper made again, {placement}: seconds of fine-tuning (evaluation not counted) and of the "
        "kernel of 32 samples, in one process on one device; with loading: of model, tokenizer and data. Only the "
        f"ratios can be compared with the paper's, which are from a Tesla V100. {experiment.caption}"
    )
    return Table(caption, header, tuple(rows))


def table3(experiment: Experiment) -> Table:
    """Lay out the training settings beside the paper's.

    Args:
        experiment: What was, or would be, run.

    Returns:
        The table.
    """
    first = {dataset: next(c for c in experiment.cells if c.data_name == dataset) for dataset in experiment.datasets}

    def common(cell: Cell) -> dict[str, str]:
        return {
            "optimiser": "AdamW",
            "schedule": cell.train.scheduler,
            "warm-up ratio": f"{cell.train.warmup_ratio:g}",
            "max length": str(cell.train.max_length),
            "rank r": str(cell.adapter.r),
            "α": f"{cell.adapter.alpha:g}",
            "epochs": str(cell.train.epochs),
        }

    rows = []
    for name, paper in COMMON3.items():
        rows.append((name, *(f"{common(cell)[name]} ({paper})" for cell in first.values())))
    batch = (f"{cell.train.train_batch_size} ({TABLE3[dataset][0]})" for dataset, cell in first.items())
    rate = (f"{cell.train.learning_rate:g} ({TABLE3[dataset][1]:g})" for dataset, cell in first.items())
    rows += [("batch size", *batch), ("learning rate", *rate)]
    caption = f"Table 3 of the paper: training settings; in parentheses the paper's. {experiment.caption}"
    return Table(caption, ("setting", *map(title, first)), tuple(rows))
