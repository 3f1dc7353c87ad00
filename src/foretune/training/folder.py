"""The run folder of a fine-tune: it grows while the run goes on, and `result.json` comes last."""

import csv
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

import yaml
from peft import PeftConfig

from foretune.errors import ConfigError, ForetuneError, StoreError, border, reason
from foretune.models.adapter_file import adapter_from_file, same_adapter, save_adapter
from foretune.report.curve_figure import Caption, loss_figure
from foretune.report.curves import CURVE, CurvePoint, History, Step, epoch_columns, read_curve
from foretune.report.folders import LOCK, disk, remove
from foretune.report.provenance import now, versions
from foretune.report.store import (
    RESULT,
    check_free,
    make_folder,
    read_json,
    read_yaml,
    settle,
    temporary_of,
    write_json,
    write_text,
    write_whole,
)
from foretune.settings.commands import ADAPTER_FILE
from foretune.training.checkpoints import checkpoints
from foretune.training.tune import TuneResult

CONFIG = "config.yaml"
HISTORY, STEPS = "history.csv", "steps.csv"
DRAWN = "forecast"  # the flag that a figure is drawn by, which the run itself does not hang on
FORECAST, STATEMENT = "forecast.csv", "forecast.json"  # copies of a forecast: its curve, and its result.json
FIGURE, ADAPTER, NEW_ADAPTER = "loss.png", "adapter", ".adapter"
TRACKED = "runs"  # TensorBoard's
BEGUN = (CONFIG, ADAPTER_FILE, FORECAST, STATEMENT)  # what a run begins with
FILES = (*BEGUN, HISTORY, STEPS, FIGURE, RESULT)


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A forecast that a run is made beside.

    Attributes:
        text: The file of its curve; empty where its level was withheld, so that there is none.
        points: The curve's points.
        statement: Its `result.json`, which shows when it was made and that it was not altered; None of a curve alone.
    """

    text: str
    points: tuple[CurvePoint, ...]
    statement: Mapping[str, Any] | None = None


def claim(folder: Path, flags: dict[str, Any], adapter: PeftConfig | None = None) -> bool:
    """Take a folder for a run, or find that a run with the same settings was cut off there.

    Nothing is written; of a finished run what it did not come to remove is removed.

    Args:
        folder: New or empty folder, or that of the run.
        flags: Settings of the run.
        adapter: The adapter that was read from a file, None if the settings describe it.

    Returns:
        Whether a run goes on.

    Raises:
        StoreError: If the folder holds a finished run, one with other settings, or anything else; or if one of the
            run's own files is a link, through which something else would be written.
    """
    named = f"output folder {str(folder)!r}"
    with disk(f"cannot read {named}"):
        ours = _ours(folder)
        for path in ours:
            if path.is_symlink():
                raise StoreError(f"{named} holds a link {path.name!r} to {os.readlink(path)!r}: remove it")
        finished, config = (folder / RESULT).exists(), folder / CONFIG
        if finished and config.is_file():
            sweep(folder, finished=True)
    if finished or not config.is_file():
        check_free(folder, leftovers=[path.name for path in ours if _is_temporary(path)])
        return False
    remedy = "name another folder, or remove it"
    with border(StoreError, f"{named} holds an unfinished run whose {CONFIG} cannot be read", remedy=remedy):
        former = read_yaml(config)
    if not isinstance(former, dict):
        raise StoreError(f"{named} holds a {CONFIG} of something else: name another")
    for name in flags.keys() | former.keys():
        if name != DRAWN and former.get(name) != flags.get(name):
            there, here = (reason(ValueError(repr(values.get(name)))) for values in (former, flags))
            raise StoreError(
                f"{named} holds an unfinished run with {name} = {there} instead of {here}: name another folder, or "
                "give the same settings to go on"
            )
    kept = folder / ADAPTER_FILE
    if adapter is not None and kept.exists() and not _same(kept, adapter):
        raise StoreError(
            f"{named} holds an unfinished run with another {ADAPTER_FILE}: name another folder, "
            f"or go on with --adapter-config {str(kept)!r}"
        )
    return True


def _same(kept: Path, adapter: PeftConfig) -> bool:
    return same_adapter(adapter_from_file(kept, task_type=str(adapter.task_type)), adapter)


def _ours(folder: Path) -> list[Path]:
    """What a run writes, of that which is in a folder."""
    if not folder.is_dir():
        return []
    names = {*FILES, ADAPTER, NEW_ADAPTER, TRACKED, LOCK}
    of_run = [path for path in folder.iterdir() if path.name in names or _is_temporary(path)]
    return [*of_run, *checkpoints(folder)]


def _is_temporary(path: Path) -> bool:
    temporary = temporary_of(path.name)
    return path.name == NEW_ADAPTER or (temporary is not None and temporary["name"] in FILES)


def sweep(folder: Path, *, finished: bool) -> None:
    """Remove what a killed run left half written.

    Args:
        folder: Folder of the run, which no other process works on.
        finished: Whether the run is done, so that its checkpoints are of no more use.
    """
    for path in _ours(folder):
        if _is_temporary(path) or (finished and path.name.startswith("checkpoint-")):
            remove(path)


def open_folder(
    folder: Path, flags: dict[str, Any], adapter: PeftConfig | None = None, *, forecast: Forecast | None = None
) -> None:
    """Write the settings of a run that begins; a run that goes on has them.

    Args:
        folder: Folder, claimed.
        flags: Settings of the run.
        adapter: The adapter that was read from a file, written beside the settings; None if they describe it.
        forecast: The forecast, kept beside them; None leaves what is there.

    Raises:
        StoreError: If the disk refuses.
    """
    config = folder / CONFIG
    make_folder(folder)
    with disk(f"cannot write to {str(folder)!r}"):
        sweep(folder, finished=False)
    start = start_of(folder) if config.exists() else now()
    if not config.exists():
        header = f"# foretune {versions()['foretune']}. Replay: foretune tune --config {CONFIG} --output NEW_FOLDER\n"
        kept = {} if forecast is None else {DRAWN: FORECAST if forecast.text else STATEMENT}
        given = {**flags, **kept}  # beside it, wherever that lies
        write_text(config, header + yaml.safe_dump(given, sort_keys=False, allow_unicode=True))
    if adapter is not None and not (folder / ADAPTER_FILE).exists():
        write_whole(folder / ADAPTER_FILE, lambda path: save_adapter(adapter, path))
    if forecast is not None and forecast.text:
        write_text(folder / FORECAST, forecast.text)
    if forecast is not None and forecast.statement is not None:
        copy = {"began": start, "forecast": forecast.statement}
        write_whole(folder / STATEMENT, lambda path: write_json(path, copy))


def start_of(folder: Path) -> str:
    """Find out when the run in a folder began.

    Args:
        folder: Folder of a run.

    Returns:
        UTC in ISO 8601: as noted with its forecast, or else when its settings were written.

    Raises:
        StoreError: If the disk refuses.
    """
    if (folder / STATEMENT).is_file():
        with suppress(StoreError, KeyError, ValueError):
            return datetime.fromisoformat(str(read_json(folder / STATEMENT)["began"])).isoformat(timespec="seconds")
    with disk(f"cannot read {str(folder)!r}"):
        written = (folder / CONFIG).stat().st_mtime
    return datetime.fromtimestamp(written, UTC).isoformat(timespec="seconds")


@contextmanager
def begun(
    folder: Path, flags: dict[str, Any], adapter: PeftConfig | None = None, *, forecast: Forecast | None = None
) -> Iterator[None]:
    """Open a folder, as `open_folder` does, and leave nothing in it if the run is refused before its first record.

    Args:
        folder: Folder, claimed.
        flags: Settings of the run.
        adapter: The adapter that was read from a file; None if the settings describe it.
        forecast: The forecast.

    Yields:
        Nothing.

    Raises:
        ForetuneError: As it came.
    """
    goes_on = (folder / CONFIG).exists()
    try:
        open_folder(folder, flags, adapter, forecast=forecast)
        yield
    except ForetuneError:
        if not goes_on and not any((folder / name).exists() for name in (HISTORY, STEPS, RESULT)):
            with disk(f"cannot write to {str(folder)!r}"):
                sweep(folder, finished=True)
                for name in (*BEGUN, TRACKED):
                    remove(folder / name)
        raise


def read_forecast(folder: Path, given: Path | None) -> Forecast | None:
    """Read a forecast: its curve, and what it says of itself.

    Args:
        folder: Folder of the run, which may keep it from before.
        given: The folder of the forecast, its `curve.csv` alone, or what another run kept of it; None for what this
            run keeps.

    Returns:
        The forecast, None if there is none.

    Raises:
        ConfigError: If it cannot be read, or has no curve though its level was not withheld.
    """
    source = given.expanduser() if given is not None else folder / FORECAST
    if given is None and not source.is_file():
        source = folder / STATEMENT
        if not source.is_file():
            return None
    remedy = "make it with foretune forecast --output"
    with border(ConfigError, f"cannot read the forecast curve {str(source)!r}", remedy=remedy):
        if source.is_dir():
            curve, statement = source / CURVE, _statement(source / RESULT)
        elif source.suffix == ".json":
            curve, statement = None, _statement(source)
        else:
            curve = source
            statement = _statement(source.with_name(STATEMENT)) if source.name == FORECAST else None
        if statement is not None and statement.get("end", ()) is None and (curve is None or not curve.exists()):
            return Forecast("", (), statement)  # withheld
        if curve is None:
            raise ConfigError(f"{str(source)!r} is no forecast: name its folder, or {remedy}")
        text, points = curve.read_text(encoding="utf-8"), read_curve(curve)
    numbers = [value for point in points for value in dataclasses.astuple(point) if value is not None]
    if not numbers or not all(map(isfinite, numbers)):
        raise ConfigError(f"the forecast curve {str(curve)!r} holds no points, or no numbers: {remedy}")
    return Forecast(text, points, statement)


def _statement(path: Path) -> Mapping[str, Any] | None:
    """A forecast's `result.json`, or a run's copy of it; None where there is none, or it carries no time and hash."""
    if not path.is_file():
        return None
    content = read_json(path)
    said = content.get("forecast", content) if path.name != RESULT else content
    return said if isinstance(said, dict) and {"made", "hash"} <= said.keys() else None


def write_history(history: History, folder: Path) -> None:
    """Write `history.csv` and `steps.csv` as far as they go.

    Args:
        history: Course of the run so far.
        folder: Folder of the run.
    """
    # while the run goes on the next record is soon to come: no need to wait for the disk
    columns = [field.name for field in dataclasses.fields(Step)]
    steps = [dataclasses.astuple(step) for step in history.steps]
    write_whole(folder / STEPS, lambda path: _write_csv(path, columns, steps), durable=False)
    names = epoch_columns(history.metrics)
    epochs = [tuple(epoch.to_dict().values()) for epoch in history.epochs]
    write_whole(folder / HISTORY, lambda path: _write_csv(path, names, epochs), durable=False)


def close_folder(result: TuneResult, folder: Path, *, forecast: Forecast | None = None) -> None:
    """Write the trained adapter, the figure and, last, `result.json`; then drop the checkpoints.

    Args:
        result: The finished fine-tune.
        folder: Folder of the run.
        forecast: What the figure shows beside the run; None for nothing.

    Raises:
        StoreError: If the disk refuses.
    """
    content = result.to_dict()
    adapter, new = folder / ADAPTER, folder / NEW_ADAPTER
    with disk(f"cannot write the adapter to {str(adapter)!r}"):
        remove(new)
        new.mkdir()
        result.plan.placed.save_pretrained(str(new))
        result.plan.tokenizer.save_pretrained(str(new))
        mode = new.stat().st_mode & 0o666
        for path in new.rglob("*"):
            if path.is_file():
                settle(path, mode)
        remove(adapter)  # of a run that was cut off right here
        new.replace(adapter)
    write_history(result.history, folder)
    last, metric = result.last, result.plan.metrics[0]
    words = f"{metric.label} {metric.written(last.main)}, eval loss {last.eval_loss:.4f}"
    caption = Caption(f"{content['dataset']}: {words}", result.plan.loss_unit, metric.label)
    points = () if forecast is None else forecast.points
    write_whole(folder / FIGURE, lambda path: loss_figure(result.history, caption, path, forecast=points))
    write_whole(folder / RESULT, lambda path: write_json(path, content))
    with disk(f"cannot remove the checkpoints in {str(folder)!r}"):
        sweep(folder, finished=True)


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
