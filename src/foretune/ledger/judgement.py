"""A forecast and the run that it was of become a line of the ledger."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from math import isfinite
from typing import Any

from foretune.forecasting.seal import HASH, is_unaltered
from foretune.ledger.entries import Entry, State, Told
from foretune.settings.groups import RUN_SETTINGS
from foretune.tasks.metrics import main_metric

# Settings that make it another run; the others say how it is computed, reported or evaluated.
RECIPE = (*RUN_SETTINGS, "seed")
ADAPTER = ("r", "alpha", "rslora", "init")


@dataclass(frozen=True)
class Times:
    """When a run was.

    Attributes:
        began: ISO 8601 in UTC.
        ended: The same.
    """

    began: str
    ended: str


def entry_of(forecast: Mapping[str, Any], tuned: Mapping[str, Any], times: Times) -> Entry:
    """Compare a forecast with the run that came of it.

    Args:
        forecast: `result.json` of the forecast.
        tuned: `result.json` of the fine-tune.
        times: When that was.

    Returns:
        The line. Its state is the first that holds of: `altered` (the hash is not that of the content), `late` (made
        after the run had begun), `other run` (model, data, adapter, rows, recipe or steps differ), `withheld` (no
        level); else `ok`. What the run was, is taken from the run.
    """
    data, kind = tuned["details"]["data"], tuned["details"]["data"]["task"]
    metric, final = main_metric(kind).name, tuned["final"]
    end = _part(forecast, "end")
    state, why = _judge(forecast, tuned, times)
    return Entry(
        made=str(forecast.get("made", "")),
        began=times.began,
        ended=times.ended,
        command="tune",
        model=tuned["model"],
        dataset=tuned["dataset"],
        task=kind,
        adapter=adapter_in_short(tuned["placement"]),
        rows=data["train_rows"],
        known_rows=_count(forecast.get("samples")),
        spend=_number(forecast.get("spend")),
        metric=metric,
        main=_told(end, metric, final[f"eval_{metric}"]),
        eval_loss=_told(end, "eval_loss", final["eval_loss"]),
        hash=str(forecast.get(HASH, "")),
        run=run_hash(tuned),
        state=state,
        why=why,
    )


def _judge(forecast: Mapping[str, Any], tuned: Mapping[str, Any], times: Times) -> tuple[State, str]:
    if not is_unaltered(forecast):
        return "altered", ""
    if datetime.fromisoformat(forecast["made"]) > datetime.fromisoformat(times.began):
        return "late", ""
    differing = differences(forecast, tuned)
    if differing:
        return "other run", ", ".join(differing)
    return ("withheld", "") if forecast["end"] is None else ("ok", "")


def differences(forecast: Mapping[str, Any], tuned: Mapping[str, Any]) -> tuple[str, ...]:
    """Name what a forecast and a run do not have in common.

    Args:
        forecast: `result.json` of the forecast.
        tuned: `result.json` of the fine-tune.

    Returns:
        `model`, `data`, names of settings, `rows`, `steps`; none if the forecast is of this run.
    """
    ours, theirs = forecast["settings"], tuned["settings"]
    placed, placement = forecast["placement"], tuned["placement"]
    facts = forecast["details"]
    # a forecast leaves out what no output depends on; a run carries it along
    idle = set(tuned["placement"]["modules"]) - set(placed["modules"])
    same = {
        "model": forecast["weights"] == tuned["details"]["weights"],
        "data": facts["data"]["fingerprint"] == tuned["details"]["data"]["fingerprint"],
        "rows": forecast["train_rows"] == tuned["details"]["data"]["train_rows"],
        "modules": set(placed["modules"]) <= set(placement["modules"]) and idle <= set(facts["adapter"]["left_out"]),
        **{name: placed[name] == placement[name] for name in ADAPTER},
        **{name: ours[name] == theirs[name] for name in RECIPE},
    }
    follows = {  # from what is named above, as a rule
        "parameters": bool(idle) or placed["trainable_parameters"] == placement["trainable_parameters"],
        "steps": forecast["steps"] == tuned["steps"],
    }
    named = [name for name, alike in same.items() if not alike]
    return tuple(named or [name for name, alike in follows.items() if not alike])


def run_hash(tuned: Mapping[str, Any]) -> str:
    """Name a run by what it was: the same model, data, adapter, recipe and steps give the same name.

    Args:
        tuned: `result.json` of a fine-tune.

    Returns:
        20 hexadecimal digits of a SHA-256.
    """
    placement, details = tuned["placement"], tuned["details"]
    content = {
        "weights": details["weights"],
        "data": details["data"]["fingerprint"],
        "placement": {name: _plain(placement[name]) for name in ("modules", "trainable_parameters", *ADAPTER)},
        "recipe": {name: _plain(tuned["settings"][name]) for name in (*RECIPE, "bf16")},
        "rows": [details["data"]["train_rows"], details["data"]["eval_rows"]],
        "steps": tuned["steps"],
    }
    return digest(content)


def _plain(value: Any) -> Any:
    """One spelling for 8 and 8.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def digest(content: Mapping[str, Any]) -> str:
    """Hash plain values.

    Args:
        content: JSON-ready values.

    Returns:
        20 hexadecimal digits of a SHA-256.
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()[:20]


def adapter_in_short(placement: Mapping[str, Any]) -> str:
    """Describe an adapter in a cell.

    Args:
        placement: As in `result.json`.

    Returns:
        Modules, layers, rank and α; the method where it has neither.
    """
    targets, layers = placement["target_modules"], placement["layers"]
    modules = ", ".join(targets) if len(targets) <= 6 else f"{len(targets)} modules"
    where = f" of layers {', '.join(map(str, layers))}" if layers else ""
    if placement["r"] is None or placement["alpha"] is None:
        return f"{placement['method']}, {modules}{where}"
    return f"{modules}{where}, r = {placement['r']}, α = {placement['alpha']:g}"


def _told(end: Mapping[str, Any], name: str, real: Any) -> Told:
    values = _part(end, name)
    forecast, low, high = (_number(values.get(part)) for part in ("value", "low", "high"))
    return Told(forecast, low, high, _number(real))


def _part(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A forecast that was altered may hold anything."""
    value = content.get(name)
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    return float(value) if known else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
