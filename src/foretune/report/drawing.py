"""Figures on their way to a file: the same numbers give the same bytes."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METADATA: dict[str, dict[str, None]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
_DPI = 150


def save_drawing(figure: "Figure", path: Path) -> None:
    """Write a figure without a date and without random names in it.

    Args:
        figure: Figure.
        path: File; its suffix gives the format.
    """
    import matplotlib as mpl

    kind = path.suffix[1:].lower()
    with mpl.rc_context({"svg.hashsalt": "foretune"}), warnings.catch_warnings():
        # names in scripts that the font lacks are drawn as boxes, and a figure too full for its layout as it comes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        figure.savefig(path, dpi=_DPI, metadata=_METADATA.get(kind, {}))
