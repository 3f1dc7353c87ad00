"""Make one item of the paper: print it, and write it in every format."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from foretune.evaluation.records import Record, write_records
from foretune.paper.claims import check_claims
from foretune.paper.experiment import Experiment
from foretune.paper.figure import caption, figure1
from foretune.paper.tables import KEYS_ONLY, table1, table2, table3
from foretune.report.figures import save_figure
from foretune.report.store import make_folder, write_text
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


def make(item: str, experiment: Experiment, records: Sequence[Record], folder: Path, screen: Console) -> None:
    """Print an item and write it as CSV, Markdown and LaTeX, or PNG, SVG and PDF.

    Args:
        item: `table1`, `table2`, `table3` or `figure1`.
        experiment: What was run.
        records: Its cells.
        folder: Folder for the files.
        screen: Where to print.
    """
    make_folder(folder)
    if records:
        write_records(records, folder)
    if item == "figure1":
        words = caption(experiment, records)
        for path in save_figure(figure1(experiment, records), folder, item):
            screen.print(Text(str(path)), soft_wrap=True)
        write_text(folder / "figure1.md", f"![Figure 1](figure1.png)\n\n{for_markdown(words)}\n")
        screen.print(Text(words, style="dim"))
        return
    table = {
        "table1": lambda: table1(experiment, records),
        "table2": lambda: table2(experiment, records),
        "table3": lambda: table3(experiment),
    }[item]()
    table.save(folder, item)
    table.show(screen)
    if item == "table1":
        sentences = [claim.sentence() for claim in check_claims(records)]
        write_text(folder / "claims.md", "".join(f"- {for_markdown(sentence)}\n" for sentence in sentences))
        for sentence in sentences:
            screen.print(Text(f"• {sentence}", style="yellow"), soft_wrap=True)
