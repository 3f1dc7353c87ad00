"""Forecast against real main metric, a panel for each distance."""

from math import ceil

import numpy as np
from matplotlib.figure import Figure

from foretune.evaluation.held_out import HeldOutForecasts
from foretune.evaluation.strata import by_distance, unit_of
from foretune.report.figures import COLOURS, MARKERS
from foretune.report.texts import for_figure
from foretune.tasks.metrics import main_metric

ACROSS = 3  # panels side by side


def distance_figure(held_out: HeldOutForecasts) -> Figure:
    """Draw every forecast with its 90% interval against what the run gave, by N/n without trials and by their spend.

    Args:
        held_out: Forecasts of a study.

    Returns:
        The figure.
    """
    metric = main_metric(held_out.records[0].kind)
    unit, _ = unit_of(metric)
    strata = by_distance(held_out)
    families = sorted({one.record.family for judged in strata.values() for one in judged})
    down = ceil(len(strata) / ACROSS)
    figure = Figure(figsize=(3.1 * ACROSS, 3.1 * down + 0.4), layout="constrained")
    panels = figure.subplots(down, ACROSS, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (name, judged) in zip(panels, strata.items(), strict=False):
        axes.axline((unit / 2.0, unit / 2.0), slope=1.0, color="0.5", linewidth=0.8, zorder=0)
        for index, family in enumerate(families):
            cells = [one for one in judged if one.record.family == family]
            intervals = [one.levels[metric.name] for one in cells]
            x = unit * np.array([interval.value for interval in intervals])
            low, high = (unit * np.array([getattr(interval, end) for interval in intervals]) for end in ("low", "high"))
            y = unit * np.array([one.case.outcomes[metric.name] for one in cells])
            colour = COLOURS[index % len(COLOURS)]
            axes.errorbar(x, y, xerr=[x - low, high - x], fmt="none", ecolor=colour, alpha=0.25, linewidth=0.8)
            axes.scatter(
                x, y, s=18, color=colour, marker=MARKERS[index % len(MARKERS)], label=for_figure(family), linewidths=0
            )
        without = "N/n" in name
        axes.set_title(
            for_figure(f"{'without training' if without else 'with trials'}, {name} ({len(judged)})"), fontsize=9
        )
        axes.grid(alpha=0.3, linewidth=0.5)
    for axes in panels[len(strata) :]:
        axes.set_axis_off()
    figure.supxlabel(f"forecast {metric.label}{' (%)' if metric.percent else ''}", fontsize=9)
    figure.supylabel(f"{metric.label} after fine-tuning{' (%)' if metric.percent else ''}", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=max(1, min(len(families), 6)), frameon=False)
    return figure
