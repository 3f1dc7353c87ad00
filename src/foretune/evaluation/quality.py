"""Tables and figure of a study's forecasts: how good they are, beside every metric of their kind."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from foretune.evaluation.correlations import StudyReport, finding_in_words
from foretune.evaluation.early_stop import SHARES
from foretune.evaluation.held_out import OUTPUTS, Foresight, Quality, cases_of, level_error, qualities
from foretune.evaluation.predictors import AREAS, BASELINES, CONTROLS, FORECASTS, FORESIGHT, INITIAL, Quantity
from foretune.evaluation.records import Record
from foretune.evaluation.regret import rule_of
from foretune.forecasting.calibration_fit import fit_calibration
from foretune.report.figures import COLOURS, MARKERS, save_figure
from foretune.report.store import write_json, write_whole
from foretune.report.tables import Table
from foretune.report.texts import for_figure

PERCENT = 100.0
# What a quantity needs, by the names of a cell's clock. `baselines` timed all metrics of others together, the quick
# score too, so that it is a bound for each of them.
FREE = ("adapter_parameters",)
OF_FEATURES = ("log_me", "h_score", "nleep", "trans_rate", "gbc", "parc")
OF_PROBE = ("probe_accuracy", "probe_loss")
OF_PASS = ("quick_score", "gradient_norm", "page")
OF_WEIGHTS = ("plop", "kappa_tune")  # and of 64 texts' forward passes, which `baselines` holds
SIMULATED = tuple(
    f"{way}_{name}" for way in ("predicted", "simulated") for name in ("accuracy", "eval_loss", "train_loss")
)


def quality_table(foresight: Foresight) -> Table:
    """Lay out how good the forecasts were.

    Args:
        foresight: Forecasts of a study.

    Returns:
        A row for each outcome; accuracies in points.
    """
    rows = [_quality_row(quality) for quality in qualities(foresight)]
    n_sets = len({record.family for record in foresight.records if record.key in foresight.forecasts})
    caption = (
        f"Forecast against the finished run, each of {n_sets} data sets by a calibration fitted on the others. "
        "Accuracy in points, losses in nats. Noise: what one run's seed changes, which bounds the error from below."
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


def _quality_row(quality: Quality) -> tuple[str, ...]:
    unit = PERCENT if quality.outcome == "accuracy" else 1.0
    digits = 1 if quality.outcome == "accuracy" else 3

    def number(value: float, *, sign: bool = False) -> str:
        return "–" if not isfinite(value) else f"{unit * value:{'+' if sign else ''}.{digits}f}"

    return (
        quality.outcome.replace("_", " "),
        str(quality.cells),
        _rho(quality.spearman),
        _rho(quality.spearman_within),
        number(quality.error),
        number(quality.simulated_error),
        number(quality.noise),
        number(quality.bias, sign=True),
        f"{quality.covered:.0%}",
        number(quality.width),
    )


def _rho(value: float) -> str:
    return f"{value:+.2f}" if isfinite(value) else "–"


def rivals_table(report: StudyReport) -> Table:
    """Lay the forecast beside every other quantity: order, level and choice.

    Args:
        report: Report whose records hold the forecasts.

    Returns:
        A row for each quantity that the cells have.
    """
    lost = {choice.rule: choice for choice in report.choices}
    rows = []
    for quantity in (*FORESIGHT, *INITIAL, *BASELINES, *CONTROLS):
        found = [report.finding(quantity.name, "accuracy", "spearman", scope) for scope in ("all", "within")]
        if all(held is None for held in found):
            continue
        error = _error(report.records, quantity)
        choice = lost.get(rule_of(quantity))
        rows.append(
            (
                quantity.label,
                *("–" if held is None else finding_in_words(held) for held in found),
                "–" if error is None else f"{PERCENT * error:.1f}",
                "–" if choice is None else f"{PERCENT * choice.regret:.1f}",
                cost_in_words(report.records, quantity),
            )
        )
    for rule in ("random placement", "best on the other data sets"):
        if rule in lost:
            rows.append((rule, "–", "–", "–", f"{PERCENT * lost[rule].regret:.1f}", "0"))
    caption = (
        "Accuracy after fine-tuning against what was known before. ρ: Spearman with 95% bootstrap interval, in "
        "parentheses where not established. error: mean absolute error in points of the forecast; for all else, of the "
        "accuracy that a line in it, fitted on the other data sets, gives. lost: points of accuracy lost by choosing "
        "the placement by it. cost: seconds as a share of fine-tuning all placements that it ranks, as measured; ≤ "
        "where a bound is known alone: the metrics of others and the quick score were timed together, and the forward "
        "passes that features and probe need are counted as 1/(C + 1) and 1/C of the pass, as if a way back took no "
        "longer than a way forward."
    )
    return Table(caption, ("known before", "ρ, all cells", "ρ within a data set", "error", "lost", "cost"), tuple(rows))


def _error(records: Sequence[Record], quantity: Quantity) -> float | None:
    """The forecast's own error, as it is calibrated on the other data sets; that of a line for all else."""
    if quantity.name != FORECASTS["accuracy"]:
        return level_error(records, quantity.name, logarithmic=quantity.logarithmic)
    pairs = [(record.quantities.get(quantity.name), record.outcomes["accuracy"]) for record in records]
    errors = [abs(forecast - real) for forecast, real in pairs if forecast is not None and real is not None]
    return float(np.mean(errors)) if len(errors) == len(pairs) else None


def cost_in_words(records: Sequence[Record], quantity: Quantity) -> str:
    """Say what a quantity costs beside the fine-tunes that it orders.

    Args:
        records: Cells.
        quantity: Quantity.

    Returns:
        Share in percent, with ≤ before it where it is a bound; a dash where no cell tells.
    """
    if quantity.name in FREE:
        return "0"
    for share in SHARES:
        if quantity.name.startswith(f"early_{round(PERCENT * share)}_"):
            return f"{share:.0%}"
    timed = [(_spent(record, quantity), record.seconds.get("fine_tune")) for record in records]
    known = [(spent, run) for spent, run in timed if spent is not None and run]
    if not known:
        return "–"
    spent, run = map(sum, zip(*known, strict=True))
    bound = quantity.name in (*OF_FEATURES, *OF_PROBE, *OF_PASS, *OF_WEIGHTS)
    return f"{'≤ ' if bound else ''}{spent / run:.1%}"


def _spent(record: Record, quantity: Quantity) -> float | None:
    """Seconds that a quantity costs a cell, or at most costs; None where nothing that was timed tells.

    The pass goes forward over the n samples, and forward and, for each of k = C − 1 outputs, backward over them and the
    m rows to predict: 2n + m + k (n + m) passes of one way, if back is as long as forward; it is longer. Features of
    the samples are n of them, at most 1/(k + 2), those of a probe and what it predicts n + m, at most 1/(k + 1).

    Args:
        record: Cell.
        quantity: Quantity.

    Returns:
        Seconds or None.
    """
    classes, name = float(record.facts["classes"] or 2.0), quantity.name
    if name in OF_FEATURES:
        parts = {"survey": 1.0 / (classes + 1.0), "baselines": 1.0}
    elif name in OF_PROBE:
        parts = {"survey": 1.0 / classes}
    elif name in OF_PASS:
        parts = {"survey": 1.0, "baselines": 1.0}
    elif name in OF_WEIGHTS:
        parts = {"baselines": 1.0}
    elif name in SIMULATED:
        parts = {"survey": 1.0, "simulate": 1.0}
    elif quantity in INITIAL:
        parts = {"kernel": 1.0, "spectrum": 1.0, "forecast": 1.0}
    else:
        return None
    seconds = {clock: record.seconds.get(clock) for clock in parts}
    if any(value is None for value in seconds.values()):
        return None
    return sum(share * float(seconds[clock] or 0.0) for clock, share in parts.items())


def area_table(records: Sequence[Record]) -> Table:
    """Lay out how far the simulated curves are from the real ones.

    Args:
        records: Cells.

    Returns:
        A row for each data set and one for all; empty where no cell has curves.
    """
    names = (("train_area", AREAS[0]), ("eval_area", AREAS[1]))
    errors: dict[str, list[list[float]]] = {}
    for record in records:
        pair = [_relative(record.quantities.get(simulated), record.outcomes.get(real)) for real, simulated in names]
        if None not in pair:
            errors.setdefault(record.dataset, []).append([float(value or 0.0) for value in pair])
    rows = [
        (name, str(len(held)), *(f"{value:.0%}" for value in np.mean(held, axis=0)))
        for name, held in sorted(errors.items())
    ]
    if rows:
        every = [pair for held in errors.values() for pair in held]
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


def forecast_figure(foresight: Foresight) -> Figure:
    """Draw forecast against real accuracy and evaluation loss, with the 90% intervals.

    Args:
        foresight: Forecasts of a study.

    Returns:
        The figure.
    """
    held = [record for record in foresight.records if record.key in foresight.forecasts]
    figure = Figure(figsize=(9.2, 4.4), layout="constrained")
    panels = figure.subplots(1, 2)
    datasets = sorted({record.dataset for record in held})
    families = sorted({record.family for record in held})
    for axes, outcome, unit in zip(panels, ("accuracy", "eval_loss"), (PERCENT, 1.0), strict=True):
        for index, dataset in enumerate(datasets):
            cells = [record for record in held if record.dataset == dataset]
            middle = [foresight.forecasts[record.key][outcome] for record in cells]
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
    panels[0].set(xlabel="forecast accuracy (%)", ylabel="accuracy after fine-tuning (%)")
    panels[1].set(xlabel="forecast evaluation loss (nats)", ylabel="evaluation loss after fine-tuning (nats)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=max(1, min(len(datasets), 6)), frameon=False, fontsize=8
    )
    return figure


def forecasts_table(foresight: Foresight) -> Table:
    """List every forecast with its interval beside the outcome, for other programs.

    Args:
        foresight: Forecasts of a study.

    Returns:
        The table.
    """
    outcomes = ("accuracy", "eval_loss", "train_loss")
    header = ["key", "model", "dataset", "placement", "r", "seed"]
    header += [f"{name}{end}" for name in outcomes for end in ("_forecast", "_low", "_high", "_real")]
    rows = []
    for record in foresight.records:
        forecast = foresight.forecasts.get(record.key)
        if forecast is None:
            continue
        cells = [record.key, record.model, record.dataset, record.placement, str(record.r), str(record.seed)]
        for name in outcomes:
            interval = forecast[name]
            values = [interval.value, interval.low, interval.high, float(record.outcomes[name] or 0.0)]
            cells += [f"{value:.6g}" for value in values]
        rows.append(tuple(cells))
    return Table("Forecasts.", tuple(header), tuple(rows), right_from=4)


def save_forecasts(foresight: Foresight, report: StudyReport, folder: Path) -> list[Path]:
    """Write the tables and the figure of the forecasts, and a calibration fitted on all data sets for other data.

    Args:
        foresight: Forecasts of a study.
        report: Report of the same cells.
        folder: Existing folder.

    Returns:
        The files; none without forecasts.
    """
    if not foresight.forecasts:
        return []
    paths = quality_table(foresight).save(folder, "forecast-quality")
    paths += rivals_table(report).save(folder, "rivals")
    paths += area_table(foresight.records).save(folder, "curves-error")
    paths.append(folder / "forecasts.csv")
    write_whole(paths[-1], forecasts_table(foresight).write_csv)
    paths.append(folder / "calibration.json")
    calibration = fit_calibration(cases_of(foresight.records), OUTPUTS, folder.absolute().parent.name).to_dict()
    write_whole(paths[-1], lambda path: write_json(path, calibration))
    return paths + save_figure(forecast_figure(foresight), folder, "forecast")
