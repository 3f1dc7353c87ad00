"""The file of a calibration: read with suspicion."""

import json
from collections.abc import Mapping
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from foretune.errors import ConfigError, border
from foretune.forecasting.calibration import LEAST_GROUPS, SCHEMA, Calibration
from foretune.forecasting.line import Line
from foretune.forecasting.outcomes import Outcome, outcomes_of
from foretune.forecasting.terms import TERMS
from foretune.forecasting.with_trials import TRIAL_TERMS

T = TypeVar("T")


def shipped_calibration() -> Calibration:
    """Read the calibration that comes with foretune.

    Returns:
        The calibration.
    """
    text = (files("foretune.forecasting") / "calibration.json").read_text(encoding="utf-8")
    return calibration_from(json.loads(text))


def read_calibration(path: Path | None = None) -> Calibration:
    """Read a calibration.

    Args:
        path: `calibration.json` of a study's report; None for the one that comes with foretune.

    Returns:
        The calibration.

    Raises:
        ConfigError: If it cannot be read.
    """
    if path is None:
        return shipped_calibration()
    path = path.expanduser()
    remedy = "foretune study report writes one"
    with border(ConfigError, f"cannot read calibration {str(path)!r}", remedy=remedy):
        content = json.loads(path.read_text(encoding="utf-8"))
    try:
        return calibration_from(content)
    except ConfigError as error:
        raise ConfigError(f"calibration {str(path)!r}: {error}; {remedy}") from error


def calibration_from(content: Any) -> Calibration:
    """Read a calibration.

    Args:
        content: As `Calibration.to_dict` gives it.

    Returns:
        The calibration.

    Raises:
        ConfigError: If it is none, or one of another version.
    """
    if not isinstance(content, Mapping) or "schema" not in content or "terms" not in content:
        raise ConfigError("this is no calibration")
    said = (content["schema"], content["terms"], content.get("trial_terms"))
    if said != (SCHEMA, list(TERMS), list(TRIAL_TERMS)):
        raise ConfigError(f"calibration of schema {content['schema']!r}, not {SCHEMA}: fit it again")
    fields = {name: value for name, value in content.items() if name not in ("schema", "terms", "trial_terms")}
    calibration = strictly(Calibration, fields, "calibration")
    needed = outcomes_of(calibration.kind)
    if set(calibration.lines) != set(needed):
        raise ConfigError(f"calibration of {', '.join(sorted(calibration.lines))}: needs {', '.join(needed)}")
    if calibration.trial_lines and set(calibration.trial_lines) != set(needed):
        raise ConfigError(f"calibration of trials of {', '.join(sorted(calibration.trial_lines))}: fit it again")
    if bool(calibration.trial_lines) != (calibration.trial_domain is not None):
        raise ConfigError("calibration of trials without its domain, or a domain without it: fit it again")
    for other in (calibration.trial_domain, calibration.further, calibration.further_trials):
        if other is not None and other.kind != calibration.kind:
            raise ConfigError(f"calibration of trials or further runs of {other.kind}: fit it again")
    _check_lines(calibration.lines, len(TERMS))
    _check_lines(calibration.trial_lines, len(TRIAL_TERMS))
    further = (calibration.further, calibration.further_trials)
    for part in (calibration.domain, calibration.trial_domain, calibration.risk, *further):
        if part is not None:
            part.check()
    return calibration


def _check_lines(lines: Mapping[Outcome, Line], terms: int) -> None:
    for name, line in lines.items():
        numbers = (
            *line.coefficients,
            *line.limits,
            line.penalty,
            line.spread,
            line.within,
            line.growth,
            line.variety,
            line.degrees,
        )
        whole = len(line.coefficients) == terms and all(map(isfinite, numbers))
        if not whole or line.groups < LEAST_GROUPS or min(line.spread, line.within, line.growth, line.variety) < 0:
            raise ConfigError(f"calibration with {name} {line}: fit it again")


def strictly(kind: type[T], fields: Any, what: str) -> T:
    """Make a dataclass of JSON values that are exactly what it takes.

    Args:
        kind: The class.
        fields: Values by name.
        what: What it is called in a message.

    Returns:
        The object.

    Raises:
        ConfigError: Naming the first value that does not fit.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(json.dumps(fields), strict=True)
    except (ValidationError, ValueError, TypeError) as error:
        found = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, found["loc"]))
        raise ConfigError(f"this is no {what}: {where} {found['msg']}") from error
