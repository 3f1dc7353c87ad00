"""Tables and figure of a study's forecasts: how good they are, beside every other predictor."""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from foretune.evaluation.choice import choice_table
from foretune.evaluation.correlations import StudyReport, capitalised, finding_in_words, report_writers
from foretune.evaluation.distance_figure import distance_figure
from foretune.evaluation.held_out import (
    ForecastQuality,
    HeldOutForecasts,
    forecast_qualities,
    level_error,
)
from foretune.evaluation.predictors import BASELINES, CONTROLS, OF_SCORE, OF_SIMULATION, SIMULATED_AREAS, Predictor
from foretune.evaluation.rates import rates_table
from foretune.evaluation.records import AREAS, Record, record_writers
from foretune.evaluation.regret import ELSEWHERE, RANDOM
from foretune.evaluation.strata import rho_in_words, strata_table, unit_of
from foretune.evaluation.troubles import trouble_table
from foretune.forecasting.calibration import CALIBRATION, Calibration
from foretune.report.figures import COLOURS, MARKERS, figure_writers
from foretune.report.store import Writer, write_files, write_json
from foretune.report.tables import Table
from foretune.report.texts import for_figure
from foretune.tasks.kinds import KINDS
from foretune.tasks.metrics import Kind, Metric, main_metric


def quality_table(held_out: HeldOutForecasts) -> Table:
    """Lay out how good the forecasts were.

    Args:
        held_out: Forecasts of a study.

    Returns:
        A row for each outcome; shares such as accuracy in points.
    """
    kind = held_out.records[0].kind
    metric = main_metric(kind)
    rows = [_quality_row(quality, metric) for quality in forecast_qualities(held_out)]
    n_sets = len({record.family for record in held_out.records if record.key in held_out.forecasts})
    caption = (
        f"Forecast against the finished run, each of {n_sets} data sets by a calibration fitted on the others. "
        f"{capitalised(metric.label)} {'in points' if metric.percent else 'as it is'}, losses in "
        f"{KINDS[kind].loss_unit}. Noise: what one run's seed changes, which bounds the error from below."
    )
    header = (
        "outcome",
        "cells",
        "ρ, all cells",
        "ρ within a data set",
        "mean error",
        "uncalibrated",
        "noise",
        "bias",
        "in 90% interval",
        "width",
    )
    return Table(caption, header, tuple(rows))


def _quality_row(quality: ForecastQuality, metric: Metric) -> tuple[str, ...]:
    of_metric = quality.outcome == metric.name
    unit, digits = unit_of(metric) if of_metric else (1.0, 3)

    def number(value: float, *, sign: bool = False) -> str:
        return "–" if not isfinite(value) else f"{unit * value:{'+' if sign else ''}.{digits}f}"

    return (
        metric.label if of_metric else quality.outcome.replace("_", " "),
        str(quality.cells),
        rho_in_words(quality.spearman),
        rho_in_words(quality.spearman_within),
        number(quality.error),
        number(quality.simulated_error),
        number(quality.noise),
        number(quality.bias, sign=True),
        f"{quality.covered:.0%}",
        number(quality.width),
    )


def rivals_table(report: StudyReport) -> Table:
    """Lay the forecast beside every other predictor: order, level, choice and cost.

    Args:
        report: Report whose records hold the forecasts.

    Returns:
        A row for each predictor that the cells have.
    """
    lost = {regret.predictor or regret.rule: regret for regret in report.regrets}
    metric = report.metric
    unit, digits = unit_of(metric)
    rows = []
    for predictor in (*OF_SIMULATION, *OF_SCORE, *BASELINES, *CONTROLS):
        findings = [report.finding(predictor.name, metric.name, "spearman", scope) for scope in ("all", "within")]
        if all(finding is None for finding in findings):
            continue
        error = _error(report.records, predictor)
        regret = lost.get(predictor.name)
        rows.append(
            (
                predictor.label,
                *("–" if finding is None else finding_in_words(finding) for finding in findings),
                "–" if error is None else f"{unit * error:.{digits}f}",
                "–" if regret is None else f"{unit * regret.mean:.{digits}f}",
                cost_in_words(report.records, predictor),
            )
        )
    for rule in (RANDOM, ELSEWHERE):
        if rule in lost:
            rows.append((rule, "–", "–", "–", f"{unit * lost[rule].mean:.{digits}f}", "0"))
    points = " in points" if metric.percent else ""
    caption = (
        f"{capitalised(metric.label)} after fine-tuning against what was known before. ρ: Spearman with 95% bootstrap "
        f"interval, in parentheses where not established. error: mean absolute error{points} of the forecast; for all "
        f"else, of the {metric.label} that a line in it, fitted on the other data sets, gives. "
        f"lost: {'points of ' if metric.percent else ''}{metric.label} lost by choosing "
        "the placement by it. cost: seconds as a share of fine-tuning all placements that it ranks, as measured; ≤ "
        "where a bound is known alone: the metrics of others and the quick score were timed together, and the forward "
        "passes that features and probe need are counted as 1/(C + 1) and 1/C of the pass, as if a way back took no "
        "longer than a way forward."
    )
    return Table(caption, ("known before", "ρ, all cells", "ρ within a data set", "error", "lost", "cost"), tuple(rows))


def _error(records: Sequence[Record], predictor: Predictor) -> float | None:
    """The forecast's own error, as it is calibrated on the other data sets; that of a line for all else."""
    metric = main_metric(records[0].kind).name
    if predictor.forecast_of != metric:
        return level_error(records, predictor.name, logarithmic=predictor.logarithmic)
    pairs = [(record.quantities.get(predictor.name), record.outcomes[metric]) for record in records]
    errors = [abs(forecast - real) for forecast, real in pairs if forecast is not None and real is not None]
    return float(np.mean(errors)) if len(errors) == len(pairs) else None


def cost_in_words(records: Sequence[Record], predictor: Predictor) -> str:
    """Say what a predictor costs beside the fine-tunes that it orders.

    Args:
        records: Cells.
        predictor: Predictor.

    Returns:
        Share in percent, with ≤ before it where it is a bound; a dash where no cell tells.
    """
    cost = predictor.cost
    if cost.of_run is not None:
        return f"{cost.of_run:.0%}" if cost.of_run else "0"
    timed = [
        (cost.seconds(record.seconds, float(record.facts["classes"] or 2.0)), record.seconds.get("fine_tune"))
        for record in records
    ]
    known = [(spent, run) for spent, run in timed if spent is not None and run]
    if not known:
        return "–"
    spent, run = map(sum, zip(*known, strict=True))
    return f"{'≤ ' if cost.bound else ''}{spent / run:.1%}"


def area_table(records: Sequence[Record]) -> Table:
    """Lay out how far the simulated curves are from the real ones.

    Args:
        records: Cells.

    Returns:
        A row for each data set and one for all; empty where no cell has curves.
    """
    errors: dict[str, list[list[float]]] = {}
    for record in records:
        pair = [
            _relative(record.quantities.get(simulated), record.outcomes.get(real))
            for simulated, real in zip(SIMULATED_AREAS, AREAS, strict=True)
        ]
        if None not in pair:
            errors.setdefault(record.dataset, []).append([float(value or 0.0) for value in pair])
    rows = [
        (name, str(len(pairs)), *(f"{value:.0%}" for value in np.mean(pairs, axis=0)))
        for name, pairs in sorted(errors.items())
    ]
    if rows:
        every = [pair for pairs in errors.values() for pair in pairs]
        rows.append(("all", str(len(every)), *(f"{value:.0%}" for value in np.mean(every, axis=0))))
    caption = (
        "Relative error of the area under the simulated loss curves, without calibration: "
        "mean of |simulated − real| / real."
    )
    return Table(caption, ("data set", "cells", "training loss", "evaluation loss"), tuple(rows))


def _relative(simulated: float | None, real: float | None) -> float | None:
    if simulated is None or not real:
        return None
    return abs(simulated - real) / real


def forecast_figure(held_out: HeldOutForecasts) -> Figure:
    """Draw forecast against real main metric and evaluation loss, with the 90% intervals.

    Args:
        held_out: Forecasts of a study.

    Returns:
        The figure.
    """
    kind = held_out.records[0].kind
    metric = main_metric(kind)
    wanted = (metric.name, "eval_loss")
    forecast = [
        record
        for record in held_out.records
        if record.key in held_out.forecasts and None not in [record.outcomes[name] for name in wanted]
    ]
    figure = Figure(figsize=(9.2, 4.4), layout="constrained")
    panels = figure.subplots(1, 2)
    datasets = sorted({record.dataset for record in forecast})
    families = sorted({record.family for record in forecast})
    for axes, outcome, unit in zip(panels, wanted, (unit_of(metric)[0], 1.0), strict=True):
        for index, dataset in enumerate(datasets):
            cells = [record for record in forecast if record.dataset == dataset]
            middle = [held_out.forecasts[record.key][outcome] for record in cells]
            x = unit * np.array([interval.value for interval in middle])
            below = x - unit * np.array([interval.low for interval in middle])
            above = unit * np.array([interval.high for interval in middle]) - x
            y = unit * np.array([float(record.outcomes[outcome] or 0.0) for record in cells])
            colour = COLOURS[families.index(cells[0].family) % len(COLOURS)]
            axes.errorbar(x, y, xerr=[below, above], fmt="none", ecolor=colour, alpha=0.2, linewidth=0.8)
            axes.scatter(
                x, y, s=16, color=colour, marker=MARKERS[index % len(MARKERS)], label=for_figure(dataset), linewidths=0
            )
        both = [axes.dataLim.intervaly, axes.dataLim.intervaly]
        low, high = min(end[0] for end in both), max(end[1] for end in both)
        axes.plot([low, high], [low, high], color="0.5", linewidth=0.8, zorder=0)
        margin = 0.1 * (high - low)
        axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin))
        axes.grid(alpha=0.3, linewidth=0.5)
    names = (metric.label, "evaluation loss")
    units = (" (%)" if metric.percent else "", f" ({KINDS[kind].loss_unit})")
    for axes, name, unit_name in zip(panels, names, units, strict=True):
        axes.set(xlabel=f"forecast {name}{unit_name}", ylabel=f"{name} after fine-tuning{unit_name}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=max(1, min(len(datasets), 6)), frameon=False, fontsize=8
    )
    return figure


def forecasts_table(held_out: HeldOutForecasts) -> Table:
    """List every forecast with its interval beside the outcome, for other programs.

    Args:
        held_out: Forecasts of a study.

    Returns:
        The table.
    """
    outcomes = (main_metric(held_out.records[0].kind).name, "eval_loss", "train_loss")
    header = ["key", "model", "dataset", "placement", "r", "seed"]
    header += [f"{name}{end}" for name in outcomes for end in ("_forecast", "_low", "_high", "_real")]
    rows = []
    for record in held_out.records:
        forecast = held_out.forecasts.get(record.key)
        if forecast is None:
            continue
        cells = [record.key, record.model, record.dataset, record.placement, str(record.r), str(record.seed)]
        for name in outcomes:
            interval = forecast[name]
            values = [interval.value, interval.low, interval.high, record.outcomes[name]]
            cells += ["" if value is None else f"{value:.6g}" for value in values]
        rows.append(tuple(cells))
    return Table("Forecasts.", tuple(header), tuple(rows), right_from=4)


def forecast_writers(held_out: HeldOutForecasts, report: StudyReport) -> dict[str, Writer]:
    """Lay out the tables and the figures of the forecasts.

    Args:
        held_out: Forecasts of a study.
        report: Report of the same cells.

    Returns:
        A writer for each file; none without forecasts.
    """
    if not held_out.forecasts:
        return {}
    return {
        **quality_table(held_out).writers("forecast-quality"),
        **strata_table(held_out).writers("distance"),
        **choice_table(held_out).writers("choice"),
        **rates_table(held_out).writers("rates"),
        **trouble_table(held_out).writers("warnings"),
        **rivals_table(report).writers("rivals"),
        **area_table(held_out.records).writers("curves-error"),
        "forecasts.csv": forecasts_table(held_out).write_csv,
        **figure_writers(forecast_figure(held_out), "forecast"),
        **figure_writers(distance_figure(held_out), "distance"),
    }


def _calibration_writer(calibration: Calibration | None) -> dict[str, Writer]:
    if calibration is None:
        return {}
    content = calibration.to_dict()
    return {CALIBRATION: lambda path: write_json(path, content)}


def save_reports(
    reports: Sequence[tuple[StudyReport, HeldOutForecasts]],
    folder: Path,
    *,
    calibrations: Mapping[Kind, Calibration] | None = None,
) -> list[Path]:
    """Write cells, tables, figures and, where runs were simulated, forecasts and a calibration for other data.

    Args:
        reports: For each kind of task its report, and the forecasts of the same cells.
        folder: Folder; files of an earlier report are replaced. Of several kinds, those of each but the cells and
            curves are in a folder of the kind's name.
        calibrations: Of each kind that there is one for.

    Returns:
        The files.
    """
    fitted = calibrations or {}
    parts: dict[Kind, dict[str, Writer]] = {
        report.kind: {
            **report_writers(report),
            **forecast_writers(held_out, report),
            **_calibration_writer(fitted.get(report.kind)),
        }
        for report, held_out in reports
    }
    if len(parts) == 1:
        (writers,) = parts.values()
        return write_files(folder, writers)
    cells = record_writers([record for report, _ in reports for record in report.records])
    paths = write_files(folder, cells)
    for kind, writers in parts.items():
        paths += write_files(folder / kind, {name: writer for name, writer in writers.items() if name not in cells})
    return paths
