"""Figures of a score."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from foretune.report.drawing import save_drawing
from foretune.scoring.score import ScoreResult


def spectrum_figure(result: ScoreResult, path: Path) -> None:
    """Draw the eigenvalues of K and HKH, what other draws of A give, σ and the numerical floor.

    Args:
        result: The score.
        path: File to write; its suffix gives the format.
    """
    own = result.draws[0]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    rank = np.arange(1, len(own.eigenvalues) + 1)
    least = max(own.kernel.floor, own.kernel.lambda_max * 1e-16, np.finfo(float).tiny)
    if len(result.draws) > 1:
        every = np.array([np.maximum(draw.eigenvalues, least) for draw in result.draws])
        label = f"K, {len(result.draws)} draws of A"
        axes.fill_between(rank, every.min(0), every.max(0), color="0.85", linewidth=0, label=label)
    axes.plot(rank, np.maximum(own.eigenvalues, least), "o-", color="#0072b2", markersize=3.5, label="K")
    n_centred = len(rank) - result.plan.reduction.rows_per_example  # the others are 0 by construction
    centred = np.maximum(own.eigenvalues_centred, least)[:n_centred]
    axes.plot(rank[:n_centred], centred, "^--", color="#d55e00", markersize=3.5, label="centred HKH")
    axes.axhline(own.kernel.sigma, color="0.3", linestyle=":", label=f"σ = {own.kernel.sigma:g}")
    if own.kernel.floor > 0:
        axes.axhline(own.kernel.floor, color="0.6", linewidth=0.8, label="numerical floor n·ε·λ_max")
    axes.set(yscale="log", xlabel="index", ylabel="eigenvalue")
    placement = f"{len(result.plan.adapted.sites)} modules, output {result.plan.reduction.name}"
    axes.set_title(
        f"{placement}, n = {result.plan.settings.samples}, κ = {own.kernel.condition_number:.3g}", fontsize=10
    )
    axes.legend(frameon=False, fontsize=8)
    save_drawing(figure, path)
