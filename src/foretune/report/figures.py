"""What the figures of a study share: colours, marks, and the formats that they are saved in."""

from functools import partial

from matplotlib.figure import Figure

from foretune.report.drawing import save_drawing
from foretune.report.store import Writer

# distinguishable for colour-blind readers; the markers tell them apart in grey
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
MARKERS = "o^sDvP*X"
FORMATS = ("png", "svg", "pdf")


def figure_writers(figure: Figure, name: str) -> dict[str, Writer]:
    """Lay out NAME.png, NAME.svg and NAME.pdf.

    Args:
        figure: Figure.
        name: File name without suffix.

    Returns:
        A writer for each file.
    """
    return {f"{name}.{suffix}": partial(save_drawing, figure) for suffix in FORMATS}
