"""One table, four ways to write it: CSV, Markdown, LaTeX (booktabs), terminal."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from foretune.report.store import Writer, plain_text
from foretune.report.terminal import Screen
from foretune.report.texts import for_markdown, for_spreadsheet, printable

_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "κ": r"$\kappa$",
    "λ": r"$\lambda$",
    "σ": r"$\sigma$",
    "τ": r"$\tau$",
    "ρ": r"$\rho$",
    "α": r"$\alpha$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": r"$-$",
    "–": "--",
    "…": r"\ldots{}",
    "∞": r"$\infty$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
}


@dataclass(frozen=True)
class Table:
    """A table of words and numbers that are written already.

    Attributes:
        caption: What it shows and under which conditions.
        header: Column heads; a column of numbers is aligned to the right by `right_from`.
        rows: Rows, each as long as the header.
        right_from: First column aligned to the right.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right_from: int = 1

    def markdown(self) -> str:
        """Write as Markdown.

        Returns:
            The caption, then the table.
        """
        rule = ["---" if i < self.right_from else "---:" for i in range(len(self.header))]
        lines = [list(map(for_markdown, self.header)), rule, *(map(for_markdown, row) for row in self.rows)]
        body = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        return f"{for_markdown(self.caption)}\n\n{body}\n"

    def latex(self) -> str:
        """Write as LaTeX for the package booktabs.

        Returns:
            A `table` environment.
        """
        columns = "".join("l" if i < self.right_from else "r" for i in range(len(self.header)))
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{tex(self.caption)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
        ]
        lines += [r"\toprule", _tex_row(self.header), r"\midrule", *map(_tex_row, self.rows), r"\bottomrule"]
        return "\n".join([*lines, r"\end{tabular}", r"\end{table}", ""])

    def write_csv(self, path: Path) -> None:
        """Write as CSV, without the caption.

        Args:
            path: File.
        """
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows([for_spreadsheet(printable(cell)) for cell in row] for row in (self.header, *self.rows))

    def writers(self, name: str) -> dict[str, Writer]:
        """Lay out NAME.csv, NAME.md and NAME.tex.

        Args:
            name: File name without suffix.

        Returns:
            A writer for each file.
        """
        return {
            f"{name}.csv": self.write_csv,
            f"{name}.md": lambda path: plain_text(path, self.markdown()),
            f"{name}.tex": lambda path: plain_text(path, self.latex()),
        }

    def show(self, console: Console) -> None:
        """Print to a terminal.

        Args:
            console: Where to.
        """
        table = RichTable(show_edge=False, pad_edge=False)
        for i, name in enumerate(self.header):
            table.add_column(Text(printable(name)), justify="left" if i < self.right_from else "right")
        for row in self.rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        if console.is_terminal:
            console.print(table)
        else:  # a file or a pipe takes lines of any length
            wide = Screen(file=console.file, width=1000)
            wide.print(table, width=Measurement.get(wide, wide.options, table).maximum)
        console.print(Text(self.caption, style="dim"))


def _tex_row(cells: Sequence[str]) -> str:
    row = " & ".join(map(tex, cells)) + r" \\"
    return f"{{}}{row}" if row.startswith(("[", "*")) else row  # the line above it would take them for its option


def tex(text: str) -> str:
    r"""Write a text for LaTeX.

    Args:
        text: Text.

    Returns:
        The same with special and Greek characters as commands.

    Example:
        >>> tex("κ of 50% & more")
        '$\\kappa$ of 50\\% \\& more'
    """
    return "".join(_TEX.get(character, character) for character in printable(text))
