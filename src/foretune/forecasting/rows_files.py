"""The forecast over training rows as files: rows.csv and rows.png."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from foretune.forecasting.outcomes import Outcome, outcomes_of
from foretune.forecasting.rows import RowsCurve, RowsPoint
from foretune.report.curve_figure import Caption
from foretune.report.drawing import save_drawing
from foretune.report.texts import for_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = "rows.csv"


def write_rows(curve: RowsCurve, path: Path) -> None:
    """Write a curve over rows as CSV.

    Args:
        curve: Curve.
        path: File.
    """
    names = outcomes_of(curve.points[0].forecast.kind)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["rows", *(f"{name}{part}" for name in names for part in ("", "_low", "_high")), "withheld"])
        for point in curve.points:
            levels, cells = point.forecast.levels or {}, []
            for name in names:
                interval = levels.get(name)
                ends = () if interval is None else (interval.value, interval.low, interval.high)
                cells += [f"{value:.6g}" for value in ends] or ["", "", ""]
            why = "" if levels else "; ".join(point.forecast.reach.reasons)
            writer.writerow([point.rows, *cells, why])


def rows_figure(curve: RowsCurve, own: int, caption: Caption, path: Path) -> None:
    """Draw the main metric and the evaluation loss over training rows, each with its 90% band.

    Args:
        curve: Curve, with one level or more.
        own: Training rows of the run itself, which are marked.
        caption: Title and names of the axes.
        path: File to write; its suffix gives the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    metric, losses = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    _band(metric, curve.points, curve.points[0].forecast.metric.name, "#0072b2")
    _band(losses, curve.points, "eval_loss", "#d55e00")
    rows = [point.rows for point in curve.points]
    for axes in (metric, losses):
        axes.axvline(own, color="0.4", linestyle=(0, (4, 2)), linewidth=1, label=f"this run, {own:,} rows")
        if curve.enough is not None:
            axes.axvline(curve.enough, color="#009e73", linewidth=1, label=f"enough, {curve.enough:,} rows")
    withheld = [point.rows for point in curve.points if point.forecast.levels is None]
    if withheld:
        low, _ = metric.get_ylim()
        metric.plot(withheld, [low] * len(withheld), "x", color="0.4", clip_on=False, label="withheld")
    metric.set(ylabel=caption.metric)
    metric.legend(fontsize=8, framealpha=0.9, edgecolor="none")
    metric.set_title(for_figure(caption.title), fontsize=10)
    losses.set(xlabel="training rows", ylabel=f"evaluation loss\n({caption.unit})", xscale="log")
    losses.set_xticks(rows, [f"{n_rows:,}" for n_rows in rows], rotation=30 if len(rows) > 6 else 0)
    losses.set_xticks([], minor=True)
    save_drawing(figure, path)


def _band(axes: "Axes", points: Sequence[RowsPoint], outcome: Outcome, colour: str) -> None:
    """Forecasts and their band; what is withheld leaves a gap."""
    rows = [point.rows for point in points]
    levels = [None if point.forecast.levels is None else point.forecast.levels[outcome] for point in points]
    gap = float("nan")
    low, value, high = (
        [gap if level is None else getattr(level, end) for level in levels] for end in ("low", "value", "high")
    )
    axes.fill_between(rows, low, high, color=colour, alpha=0.2, linewidth=0, label="90% band")
    axes.plot(rows, value, "o-", color=colour, markersize=3.5, label="forecast")
    axes.vlines(rows, low, high, color=colour, alpha=0.5, linewidth=1)  # a level between two that are withheld
