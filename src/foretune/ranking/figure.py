"""The heat map of a ranking: what each module is worth alone."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from foretune.ranking.candidates import short_kinds
from foretune.ranking.rows import Ranking
from foretune.report.drawing import save_drawing
from foretune.report.texts import for_figure


def heat_map(ranking: Ranking, path: Path) -> None:
    """Draw the quick score of every module alone: layers from bottom to top, module kinds side by side.

    Args:
        ranking: Ranking.
        path: File to write; its suffix gives the format.
    """
    short = short_kinds(ranking.sites)
    inside = [(index, site) for index, site in enumerate(ranking.sites) if site.layer is not None]
    layers = sorted({site.layer for _, site in inside if site.layer is not None})
    kinds = list(dict.fromkeys(site.kind for _, site in inside))
    table = np.full((max(1, len(layers)), max(1, len(kinds))), np.nan)
    for index, site in inside:
        if site.layer is not None:
            table[layers.index(site.layer), kinds.index(site.kind)] = ranking.single[index]
    figure = Figure(figsize=(1.6 + 1.1 * len(kinds), 1.8 + 0.35 * len(layers)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, origin="lower", aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(kinds)), [for_figure(short[kind]) for kind in kinds], rotation=30, ha="right")
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set(ylabel="layer", title=f"quick score of one module, r = {ranking.template.r}")
    middle = (np.nanmin(table) + np.nanmax(table)) / 2 if inside else 0.0
    for row, column in np.argwhere(np.isfinite(table)):
        value = table[row, column]
        colour = "white" if value < middle else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(image, ax=axes, label="share of the probe's error predicted away")
    save_drawing(figure, path)
