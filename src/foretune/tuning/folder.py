"""The run folder of a fine-tune: it grows while the run goes on, and `result.json` comes last."""

import csv
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig

from foretune.config import ADAPTER_FILE
from foretune.errors import StoreError
from foretune.forecasting.curve import CURVE, read_curve
from foretune.provenance import versions
from foretune.ranking.adapter_file import adapter_from_file, same_adapter, save_adapter
from foretune.store import RESULT, check_free, make_folder, write_json, write_text, write_whole
from foretune.tuning.curves import Epoch, History, Step
from foretune.tuning.figure import loss_figure
from foretune.tuning.fit import CHECKPOINTS
from foretune.tuning.outcome import TuneResult

CONFIG = "config.yaml"
HISTORY, STEPS = "history.csv", "steps.csv"
FORECAST = "forecast.csv"  # copy of a score's curve


def claim(folder: Path, flags: dict[str, Any], adapter: LoraConfig | None = None) -> bool:
    """Take a folder for a run, or find that a run with the same settings was cut off there.

    Args:
        folder: New or empty folder, or that of the run.
        flags: Settings of the run.
        adapter: The adapter that was read from a file, None if the settings describe it.

    Returns:
        Whether a run goes on.

    Raises:
        StoreError: If the folder holds a finished run, one with other settings, or anything else.
    """
    config = folder / CONFIG
    if (folder / RESULT).exists() or not config.is_file():
        check_free(folder)
        return False
    held = yaml.safe_load(config.read_text(encoding="utf-8"))
    if not isinstance(held, dict):
        raise StoreError(f"output folder {str(folder)!r} holds a {CONFIG} of something else: name another")
    for name in flags.keys() | held.keys():
        if held.get(name) != flags.get(name):
            raise StoreError(
                f"output folder {str(folder)!r} holds an unfinished run with {name} = {held.get(name)!r} instead of "
                f"{flags.get(name)!r}: name another folder, or give the same settings to go on"
            )
    kept = folder / ADAPTER_FILE
    if adapter is not None and kept.exists() and not same_adapter(adapter_from_file(kept), adapter):
        raise StoreError(
            f"output folder {str(folder)!r} holds an unfinished run with another {ADAPTER_FILE}: name another folder, "
            f"or go on with --adapter-config {str(kept)!r}"
        )
    return True


def open_folder(folder: Path, flags: dict[str, Any], adapter: LoraConfig | None = None) -> None:
    """Write the settings of a run that begins; a run that goes on has them.

    Args:
        folder: Folder, claimed.
        flags: Settings of the run.
        adapter: The adapter that was read from a file, written beside the settings; None if they describe it.
    """
    config = folder / CONFIG
    if not config.exists():
        header = f"# foretune {versions()['foretune']}. Replay: foretune tune --config {CONFIG} --output NEW_FOLDER\n"
        text = header + yaml.safe_dump(flags, sort_keys=False, allow_unicode=True)
        make_folder(folder)
        write_text(config, text)
    if adapter is not None and not (folder / ADAPTER_FILE).exists():
        write_whole(folder / ADAPTER_FILE, lambda path: save_adapter(adapter, path))


def keep_forecast(curve: Path, folder: Path) -> None:
    """Copy the curve that a score forecast into the run's folder, where the figure of the losses takes it from.

    Args:
        curve: `curve.csv`, or the folder of the score.
        folder: Folder of the run, opened.
    """
    source = curve / CURVE if curve.is_dir() else curve
    read_curve(source)  # refuses what is no curve
    text = source.read_text(encoding="utf-8")
    write_text(folder / FORECAST, text)


def write_history(history: History, folder: Path) -> None:
    """Write `history.csv` and `steps.csv` as far as they go.

    Args:
        history: Course of the run so far.
        folder: Folder of the run.
    """
    write_whole(folder / STEPS, lambda path: _write_csv(path, Step, history.steps))
    write_whole(folder / HISTORY, lambda path: _write_csv(path, Epoch, history.epochs))


def close_folder(result: TuneResult, folder: Path) -> None:
    """Write the trained adapter, the figure and, last, `result.json`; then drop the checkpoints.

    Args:
        result: The finished fine-tune.
        folder: Folder of the run.

    Raises:
        StoreError: If the disk refuses.
    """
    adapter, temporary = folder / "adapter", folder / ".adapter"
    content = result.to_dict()
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(adapter, ignore_errors=True)  # of a run that was cut off right here
        result.plan.placed.save_pretrained(str(temporary))
        result.plan.classifier.tokenizer.save_pretrained(str(temporary))
        temporary.replace(adapter)
    except OSError as error:
        raise StoreError(f"cannot write the adapter to {str(adapter)!r}: {error.strerror or error}") from error
    write_history(result.history, folder)
    last = result.last
    title = f"{content['dataset']}: accuracy {last.eval_accuracy:.1%}, eval loss {last.eval_loss:.4f}"
    forecast = read_curve(folder / FORECAST) if (folder / FORECAST).is_file() else ()
    write_whole(folder / "loss.png", lambda path: loss_figure(result.history, title, path, forecast=forecast))
    write_whole(folder / RESULT, lambda path: write_json(path, content))
    for checkpoint in folder.glob(CHECKPOINTS):
        shutil.rmtree(checkpoint, ignore_errors=True)


def _write_csv(path: Path, kind: type[Step] | type[Epoch], records: Sequence[Step] | Sequence[Epoch]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in dataclasses.fields(kind))
        writer.writerows(dataclasses.astuple(record) for record in records)
