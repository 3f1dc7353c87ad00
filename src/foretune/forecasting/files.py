"""The files of a forecast's run folder: result.json, curve.csv, curve.png, rows.csv, rows.png, config.yaml."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from peft import PeftConfig

from foretune.forecasting.calibration import CALIBRATION, Calibration
from foretune.forecasting.curve import write_curve
from foretune.forecasting.forecast import ForecastResult
from foretune.forecasting.rows import RowsCurve
from foretune.forecasting.rows_files import ROWS, rows_figure, write_rows
from foretune.forecasting.sequence_forecast import SequenceForecast
from foretune.models.adapter_file import save_adapter
from foretune.report.curve_figure import Caption, curve_figure
from foretune.report.curves import CURVE
from foretune.report.provenance import versions
from foretune.report.store import plain_text, write_json, write_run
from foretune.sequence_plan import LOSS_UNIT
from foretune.settings.commands import ADAPTER_FILE


def save_forecast(
    result: ForecastResult,
    folder: Path,
    flags: Mapping[str, Any] | None = None,
    *,
    adapter: PeftConfig | None = None,
    calibration: Calibration | None = None,
) -> None:
    """Write a run folder, whole or not at all.

    Args:
        result: The forecast.
        folder: New or empty folder.
        flags: Settings that replay it; None leaves `config.yaml` out (a forecast from Python objects).
        adapter: The adapter that was read from a file, written beside the settings; None if they describe it.
        calibration: The calibration that was given, written beside them; None if it is foretune's.
    """
    content, curve, rows = result.to_dict(), result.curve, result.rows
    writers: dict[str, Callable[[Path], None]] = {"result.json": lambda path: write_json(path, content)}
    if curve.points:
        caption = _caption(result)
        writers[CURVE] = lambda path: write_curve(curve, path)
        writers["curve.png"] = lambda path: curve_figure(curve.points, caption, path)
    if rows is not None:
        writers |= _of_rows(rows, result.plan.train_rows, _caption(result))
    if flags is not None:
        given = {**flags, **({} if calibration is None else {"calibration": CALIBRATION})}  # beside config.yaml
        writers |= _replay(given, adapter)
    elif adapter is not None:
        writers[ADAPTER_FILE] = lambda path: save_adapter(adapter, path)
    if calibration is not None:
        own = calibration.to_dict()
        writers[CALIBRATION] = lambda path: write_json(path, own)
    write_run(folder, writers)


def save_sequence_forecast(
    result: SequenceForecast,
    folder: Path,
    flags: Mapping[str, Any] | None = None,
    *,
    adapter: PeftConfig | None = None,
) -> None:
    """Write the run folder of a language model's forecast, whole or not at all.

    Its `curve.csv` holds the simulated course where no level is given.

    Args:
        result: The forecast.
        folder: New or empty folder.
        flags: Settings that replay it; None leaves `config.yaml` out.
        adapter: The adapter that was read from a file; None if the settings describe it.
    """
    content, rows = result.to_dict(), result.rows
    curve = replace(result.curve, points=result.curve.points or result.curve.simulated)
    what = "forecast for" if result.curve.points else "simulated run on"
    caption = Caption(f"{what} {result.plan.task.source}", LOSS_UNIT, curve.forecast.metric.label)
    writers: dict[str, Callable[[Path], None]] = {
        "result.json": lambda path: write_json(path, content),
        CURVE: lambda path: write_curve(curve, path),
        "curve.png": lambda path: curve_figure(curve.points, caption, path),
        **({} if flags is None else _replay(flags, adapter)),
    }
    if rows is not None:
        writers |= _of_rows(rows, result.plan.train_rows, caption)
    write_run(folder, writers)


def _of_rows(rows: RowsCurve, own: int, caption: Caption) -> dict[str, Callable[[Path], None]]:
    """The forecast over rows as CSV and, where there is a level, drawn."""
    writers: dict[str, Callable[[Path], None]] = {ROWS: lambda path: write_rows(rows, path)}
    if any(point.forecast.levels for point in rows.points):
        writers["rows.png"] = lambda path: rows_figure(rows, own, caption, path)
    return writers


def _replay(flags: Mapping[str, Any], adapter: PeftConfig | None) -> dict[str, Callable[[Path], None]]:
    """The settings, and the adapter's file where one was given."""
    header = f"# foretune {versions()['foretune']}. Replay: foretune forecast --config config.yaml --output NEW\n"
    text = header + yaml.safe_dump(dict(flags), sort_keys=False, allow_unicode=True)
    writers: dict[str, Callable[[Path], None]] = {"config.yaml": lambda path: plain_text(path, text)}
    if adapter is not None:
        writers[ADAPTER_FILE] = lambda path: save_adapter(adapter, path)
    return writers


def _caption(result: ForecastResult) -> Caption:
    objective = result.plan.task.objective
    return Caption(f"forecast for {result.plan.task.source}", objective.loss_unit, objective.metric.label)
