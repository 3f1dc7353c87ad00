"""Make one item of the paper: print it, and write it in every format."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from foretune.evaluation.records import Record, record_writers
from foretune.paper.claims import check_claims
from foretune.paper.experiment import Experiment
from foretune.paper.figure import figure1, figure_caption
from foretune.paper.tables import KEYS_ONLY, table1, table2, table3
from foretune.report.figures import figure_writers
from foretune.report.store import plain_text, write_files
from foretune.report.texts import for_markdown
from foretune.study.grid import Cell


def needed_cells(experiment: Experiment, items: Sequence[str]) -> tuple[Cell, ...]:
    """Choose the cells that the items rest on.

    Args:
        experiment: The experiment.
        items: Items.

    Returns:
        All for Table 1 and Figure 1, those of one placement for Table 2, none for Table 3.
    """
    if {"table1", "figure1"} & set(items):
        return experiment.cells
    if "table2" in items:
        return tuple(cell for cell in experiment.cells if cell.placement == experiment.placements[KEYS_ONLY])
    return ()


def make_item(item: str, experiment: Experiment, records: Sequence[Record], folder: Path, screen: Console) -> None:
    """Print an item and write it as CSV, Markdown and LaTeX, or PNG, SVG and PDF, with the cells that it rests on.

    Args:
        item: `table1`, `table2`, `table3` or `figure1`.
        experiment: What was run.
        records: Its cells.
        folder: Folder for the files.
        screen: Where to print.
    """
    writers = record_writers(records) if records else {}
    if item == "figure1":
        words = figure_caption(experiment, records)
        drawn = figure_writers(figure1(experiment, records), item)
        markdown = f"![Figure 1](figure1.png)\n\n{for_markdown(words)}\n"
        write_files(folder, {**writers, **drawn, "figure1.md": lambda path: plain_text(path, markdown)})
        for name in drawn:
            screen.print(Text(str(folder / name)), soft_wrap=True)
        screen.print(Text(words, style="dim"))
        return
    table = {
        "table1": lambda: table1(experiment, records),
        "table2": lambda: table2(experiment, records),
        "table3": lambda: table3(experiment),
    }[item]()
    sentences = [claim.sentence() for claim in check_claims(records)] if item == "table1" else []
    if sentences:
        listed = "".join(f"- {for_markdown(sentence)}\n" for sentence in sentences)
        writers["claims.md"] = lambda path: plain_text(path, listed)
    write_files(folder, {**writers, **table.writers(item)})
    table.show(screen)
    for sentence in sentences:
        screen.print(Text(f"• {sentence}", style="yellow"), soft_wrap=True)
