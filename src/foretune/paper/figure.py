"""Figure 1 in the paper's layout."""

from collections.abc import Sequence
from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from foretune.evaluation.correlations import SCOPE_WORDS
from foretune.evaluation.predictors import KAPPA
from foretune.evaluation.records import Record
from foretune.paper.claims import check_claims
from foretune.paper.experiment import Experiment, title
from foretune.report.curves import running_mean
from foretune.report.figures import COLOURS, MARKERS
from foretune.report.texts import for_figure

CURVES = (2, 3)  # placements of panels (a) and (b): {first, middle, last} with {W_q, W_v} and with {W_k}


def figure1(experiment: Experiment, records: Sequence[Record]) -> Figure:
    """Draw (a) and (b) the training loss over steps with κ in the legend, (c) accuracy against κ.

    Args:
        experiment: What was run.
        records: Its cells.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, letter, number in zip(panels, "ab", CURVES, strict=False):
        _curves(axes, experiment, records, experiment.placements[number])
        axes.set_title(for_figure(f"({letter}) {experiment.placements[number]}"), fontsize=10)
    _accuracy(panels[2], experiment, records)
    panels[2].set_title("(c) accuracy and κ", fontsize=10)
    return figure


def _curves(axes: Axes, experiment: Experiment, records: Sequence[Record], placement: str) -> None:
    for index, dataset in enumerate(experiment.datasets):
        cells = [record for record in records if (record.dataset, record.placement) == (dataset, placement)]
        if not cells:
            continue
        kappa = mean(record.quantities[KAPPA.name] or float("nan") for record in cells)
        label = for_figure(f"{title(dataset)}, κ = {kappa:.3g}")
        for record in cells:
            window = max(1, record.steps[-1].step // 20)
            means = [float("nan") if m is None else m for m in running_mean(record.steps, window=window)]
            axes.plot([step.step for step in record.steps], means, color=COLOURS[index], label=label, linewidth=1.2)
            label = "_nolegend_"
    axes.set(xlabel="step", ylabel="train loss, mean of a twentieth of the steps")
    axes.legend(frameon=False, fontsize=8)


def _accuracy(axes: Axes, experiment: Experiment, records: Sequence[Record]) -> None:
    for index, dataset in enumerate(experiment.datasets):
        points = [
            (record.quantities[KAPPA.name], 100 * (record.outcomes["accuracy"] or float("nan")))
            for record in records
            if record.dataset == dataset
        ]
        if points:
            x, y = np.array(points, dtype=np.float64).T
            axes.scatter(
                x, y, s=22, color=COLOURS[index], marker=MARKERS[index], label=for_figure(title(dataset)), linewidths=0
            )
    axes.set(xlabel="κ at initialisation", ylabel="accuracy %", xscale="log")
    axes.legend(frameon=False, fontsize=8)


def figure_caption(experiment: Experiment, records: Sequence[Record], *, resamples: int = 2000) -> str:
    """Say what the figure shows, with the rank correlation of panel (c) and its interval.

    Args:
        experiment: What was run.
        records: Its cells.
        resamples: Draws of the bootstrap.

    Returns:
        The caption.
    """
    said = []
    for claim in check_claims(records, resamples=resamples):
        if claim.outcome == "accuracy":
            judged = "" if claim.finding is None else f" (the claim of a negative sign is {claim.verdict})"
            said.append(f"{SCOPE_WORDS[claim.scope]} {claim.correlation}{judged}")
    return (
        "Figure 1 of the paper made again: (a), (b) train loss over steps, κ in the legend; (c) accuracy against κ, "
        f"{len(records)} cells. Spearman's ρ of κ and accuracy, with 95% intervals: {'; '.join(said)}. "
        f"{experiment.caption}"
    )
