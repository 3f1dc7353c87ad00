"""What the figures of a study share: colours, marks, and the formats that they are saved in."""

from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from foretune.report.drawing import save_drawing
from foretune.report.store import write_whole

# distinguishable for colour-blind readers; the markers tell them apart in grey
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")


MARKERS = "o^sDvP*X"


FORMATS = ("png", "svg", "pdf")


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write NAME.png, NAME.svg and NAME.pdf.

    Args:
        figure: Figure.
        folder: Existing folder.
        name: File name without suffix.

    Returns:
        The files.
    """
    paths = [folder / f"{name}.{suffix}" for suffix in FORMATS]
    for path in paths:
        write_whole(path, partial(save_drawing, figure))
    return paths
