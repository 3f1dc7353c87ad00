"""Scatter plots of predictors against outcomes."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from foretune.evaluation.predictors import Outcome, Predictor, outcomes_of
from foretune.evaluation.records import Record
from foretune.report.figures import COLOURS, MARKERS
from foretune.report.texts import for_figure


def scatter_figure(records: Sequence[Record], predictors: Sequence[Predictor]) -> Figure:
    """Draw each predictor against each outcome, one mark for each cell, one colour for each model and data set.

    Args:
        records: Cells of one kind of task.
        predictors: One column of panels each.

    Returns:
        The figure.
    """
    outcomes = outcomes_of(records[0].kind)
    groups = sorted({record.group for record in records})
    several_models = len({model for model, _ in groups}) > 1
    figure = Figure(figsize=(2.6 * len(predictors) + 0.6, 2.3 * len(outcomes) + 0.6), layout="constrained")
    panels = figure.subplots(len(outcomes), len(predictors), squeeze=False, sharex="col", sharey="row")
    for row, outcome in zip(panels, outcomes, strict=True):
        for axes, predictor in zip(row, predictors, strict=True):
            for index, group in enumerate(groups):
                label = for_figure(" · ".join(group) if several_models else group[1])
                cells = [record for record in records if record.group == group]
                _marks(axes, cells, predictor, outcome, index, label)
            if predictor.logarithmic and all((r.quantities[predictor.name] or 0.0) > 0 for r in records):
                axes.set_xscale("log")
            axes.grid(alpha=0.3, linewidth=0.5)
    for axes, predictor in zip(panels[-1], predictors, strict=True):
        axes.set_xlabel(predictor.label)
    for row, outcome in zip(panels, outcomes, strict=True):
        row[0].set_ylabel(outcome.label)
    handles, labels = panels[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(groups), 6), frameon=False, fontsize=8)
    return figure


def _marks(
    axes: Axes, records: Sequence[Record], predictor: Predictor, outcome: Outcome, index: int, label: str
) -> None:
    points = [
        (x, y)
        for record in records
        if (x := record.quantities[predictor.name]) is not None and (y := record.outcomes[outcome.name]) is not None
    ]
    if points:
        x, y = np.array(points).T
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        axes.scatter(x, y, s=18, color=colour, marker=marker, label=label, alpha=0.8, linewidths=0)
