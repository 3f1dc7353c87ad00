"""The files of a score's run folder: result.json, kernel.safetensors, config.yaml, spectrum.png."""

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from peft import PeftConfig
from safetensors.numpy import save_file

from foretune.models.adapter_file import save_adapter
from foretune.ntk.large_spectrum import DENSE
from foretune.report.store import to_json, write_json, write_run
from foretune.report.tensor_file import write_tensors
from foretune.scoring.report import notes
from foretune.scoring.score import ScoreResult
from foretune.scoring.sequence_report import sequence_notes
from foretune.scoring.sequence_score import SequenceScore
from foretune.settings.commands import ADAPTER_FILE, Configuration, ScoreSettings


def score_content(result: ScoreResult | SequenceScore) -> dict[str, Any]:
    """Lay a score out as in `result.json`, with what its numbers do not show.

    Args:
        result: The score.

    Returns:
        JSON-ready values.
    """
    content = result.to_dict()
    said = sequence_notes(content) if isinstance(result, SequenceScore) else notes(content)
    return content | {"notes": said}


def save_score(
    result: ScoreResult | SequenceScore,
    folder: Path,
    config: Configuration[ScoreSettings] | None = None,
    adapter: PeftConfig | None = None,
) -> None:
    """Write a run folder, whole or not at all.

    Args:
        result: The score.
        folder: New or empty folder.
        config: Settings that replay the run; None leaves `config.yaml` out (a score from Python objects).
        adapter: The adapter that was read from a file, written beside the settings; None if they describe it.
    """
    from foretune.scoring.figure import spectrum_figure

    content = score_content(result)
    writers = {
        "kernel.safetensors": lambda path: _save_kernel(result, path),
        "spectrum.png": lambda path: spectrum_figure(result, path),
        "result.json": lambda path: write_json(path, content),
    }
    if config is not None:
        flags = config.to_dict()
        writers["config.yaml"] = lambda path: _save_config(flags, content["versions"]["foretune"], path)
    if adapter is not None:
        writers[ADAPTER_FILE] = lambda path: save_adapter(adapter, path)
    write_run(folder, writers)


def _save_config(flags: dict[str, Any], version: str, path: Path) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    header = f"# foretune {version}, {now}. Replay: foretune score --config config.yaml --output NEW_FOLDER\n"
    path.write_text(header + yaml.safe_dump(flags, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _save_kernel(result: ScoreResult | SequenceScore, path: Path) -> None:
    """`K` is the kernel of the adapter's own A; everything is float64 or int64."""
    if isinstance(result, SequenceScore):
        _save_sequence_kernel(result, path)
        return
    m = result.measurement
    named = {
        "K": m.k_train_train[0],
        "K_draws": m.k_train_train,
        "K_head": m.head_train_train,
        "labels": m.y_train,
        "indices": m.train_indices,
        "f_0": m.f_train_0,
        "K_eval": m.k_eval_train,
        "labels_eval": m.y_eval,
        "indices_eval": m.eval_indices,
        "f_0_eval": m.f_eval_0,
    }
    arrays = {name: np.ascontiguousarray(array) for name, array in named.items() if array is not None}
    facts = {
        "output": result.plan.reduction.name,
        "rows_per_example": result.plan.reduction.rows_per_example,
        "sites": [site.name for site in result.plan.adapted.sites],
        "eval_held_out": result.plan.sample.held_out,
        "epsilon": m.epsilon,
    }
    metadata = {"foretune": to_json(facts)}
    if len(arrays["K"]) > DENSE:  # safetensors would copy all of them
        write_tensors(path, arrays, metadata)
    else:
        save_file(arrays, path, metadata=metadata)


def _save_sequence_kernel(result: SequenceScore, path: Path) -> None:
    m = result.measurement
    named = {
        "K": m.kernel.matrices[0],
        "K_draws": m.kernel.matrices,
        "indices": m.indices,
        "targets": m.targets,
        "losses": m.losses,
    }
    facts = {
        "output": m.kernel.name,
        "rows_per_example": m.kernel.rows_per_sequence,
        "sites": [site.name for site in result.plan.placed.adapted.sites],
        "epsilon": m.kernel.epsilon,
    }
    arrays = {name: np.ascontiguousarray(array) for name, array in named.items()}
    save_file(arrays, path, metadata={"foretune": to_json(facts)})
