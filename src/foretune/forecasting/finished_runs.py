"""Finished runs that a calibration is fitted on, those behind the calibration that comes with foretune among them."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from foretune.errors import ConfigError
from foretune.forecasting.calibration_fit import Case
from foretune.forecasting.risk import RateCase

SCHEMA = 1
FINISHED_RUNS = "finished_runs.json"  # beside the calibration that comes with foretune
DIGITS = 6  # of a number, as in the tables of a study


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        key: Content key of its cell.
        case: What its level is learnt from; None where it was not simulated, or collapsed.
        rate: What the risk of a collapse is learnt from; None where that is not known.
    """

    key: str
    case: Case | None
    rate: RateCase | None


def shipped_runs() -> tuple[FinishedRun, ...]:
    """Read the runs behind the calibration that comes with foretune.

    Returns:
        The runs.
    """
    return runs_from(json.loads((files("foretune.forecasting") / FINISHED_RUNS).read_text(encoding="utf-8")))


def runs_from(content: Any) -> tuple[FinishedRun, ...]:
    """Undo `in_lines`.

    Args:
        content: Its JSON values.

    Returns:
        The runs.

    Raises:
        ConfigError: If these are none, or of another version.
    """
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ConfigError(f"finished runs of another schema than {SCHEMA}: fit the calibration again")
    try:
        return TypeAdapter(tuple[FinishedRun, ...]).validate_json(json.dumps(content.get("runs")), strict=True)
    except ValidationError as error:
        raise ConfigError(f"these are no finished runs: {error.errors()[0]['msg']}") from error


def in_lines(runs: Iterable[FinishedRun]) -> str:
    """Write finished runs as JSON, a line for each.

    Args:
        runs: Runs.

    Returns:
        The text, numbers with six digits.
    """
    lines = ",\n".join(json.dumps(_rounded(asdict(run)), allow_nan=False) for run in runs)
    return f'{{"schema": {SCHEMA}, "runs": [\n{lines}\n]}}\n'


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
