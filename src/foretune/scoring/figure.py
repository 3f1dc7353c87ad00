"""Figures of a score."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from foretune.arrays import Array
from foretune.ntk.spectrum import Spectrum
from foretune.report.drawing import save_drawing
from foretune.scoring.score import ScoreResult
from foretune.scoring.sequence_score import SequenceScore


def spectrum_figure(result: ScoreResult | SequenceScore, path: Path) -> None:
    """Draw the eigenvalues of K and HKH, what other draws of A give, σ and the numerical floor.

    Args:
        result: The score.
        path: File to write; its suffix gives the format.
    """
    own = result.draws[0]
    values = [draw.eigenvalues for draw in result.draws]
    if isinstance(result, SequenceScore):
        adapted, rows = result.plan.placed.adapted, 1
        what = f"kernel {result.plan.kernel}, n = {result.plan.n}"
    else:
        adapted, rows = result.plan.adapted, result.plan.reduction.rows_per_example
        what = f"output {result.plan.reduction.name}, n = {result.plan.settings.samples}"
    title = f"{len(adapted.sites)} modules, {what}, κ = {own.kernel.condition_number:.3g}"
    centred = own.eigenvalues_centred
    # the last of HKH are 0 by construction
    _draw(own.kernel, values, None if centred is None else centred[: len(centred) - rows], title, path)


def _draw(kernel: Spectrum, draws: Sequence[Array], centred: Array | None, title: str, path: Path) -> None:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    rank = np.arange(1, len(draws[0]) + 1)
    least = max(kernel.floor, kernel.lambda_max * 1e-16, np.finfo(float).tiny)
    if len(draws) > 1:
        every = np.array([np.maximum(values, least) for values in draws])
        label = f"K, {len(draws)} draws of A"
        axes.fill_between(rank, every.min(0), every.max(0), color="0.85", linewidth=0, label=label)
    axes.plot(rank, np.maximum(draws[0], least), "o-", color="#0072b2", markersize=3.5, label="K")
    if centred is not None:
        shown = np.maximum(centred, least)
        axes.plot(rank[: len(shown)], shown, "^--", color="#d55e00", markersize=3.5, label="centred HKH")
    axes.axhline(kernel.sigma, color="0.3", linestyle=":", label=f"σ = {kernel.sigma:g}")
    if kernel.floor > 0:
        axes.axhline(kernel.floor, color="0.6", linewidth=0.8, label="numerical floor n·ε·λ_max")
    axes.set(yscale="log", xlabel="index", ylabel="eigenvalue")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    save_drawing(figure, path)
