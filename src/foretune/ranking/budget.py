"""Budgets: what an adapter may have in parameters or weigh in bytes, and which candidates fit."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from foretune.errors import ConfigError, shown
from foretune.models.sites import Site
from foretune.ranking.candidates import Candidate, label

BYTES_PER_PARAMETER = 4


_AMOUNT = re.compile(r"(\d{1,15}(?:_\d{1,15})*(?:\.\d{0,15})?(?:[eE]\+?\d{1,2})?)\s*([A-Za-z]*)")


_PARAMETERS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


_BYTES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


_FORMS = "use parameters as in 500000, 500k or 1.2M"


def n_parameters(candidate: Candidate, sites: Sequence[Site]) -> int:
    """Count the trainable parameters of the adapters, without the head.

    Args:
        candidate: Placement.
        sites: Every module that can be adapted; their own ranks do not count.

    Returns:
        Σ r · (d_in + d_out) over the candidate's modules.
    """
    return sum(candidate.rank * (sites[position].d_in + sites[position].d_out) for position in candidate.sites)


@dataclass(frozen=True)
class Budget:
    """How large an adapter may be.

    Attributes:
        parameters: Trainable parameters of the adapter, at most.
        text: As the user wrote it.
        bytes_per_parameter: Bytes of a parameter in the adapter's file.
    """

    parameters: int
    text: str
    bytes_per_parameter: int = BYTES_PER_PARAMETER


def parse_budget(text: str, *, bytes_per_parameter: int = BYTES_PER_PARAMETER) -> Budget:
    """Read a budget of trainable parameters or of bytes in the adapter's file.

    Bytes are parameters times `bytes_per_parameter`; the few kilobytes of the file's header do not count.

    Args:
        text: Parameters, such as `500000`, `500k` or `1.2M`, or a size, such as `500KB`, `2MB` (10⁶ bytes) or
            `1.5MiB` (2²⁰ bytes); upper and lower case are alike.
        bytes_per_parameter: 4 for float32, 2 for half precision.

    Returns:
        The budget, rounded down to whole parameters.

    Raises:
        ConfigError: If the text is neither, or leaves no parameter.

    Example:
        >>> parse_budget("1.2M").parameters, parse_budget("2MB").parameters
        (1200000, 500000)
    """
    if bytes_per_parameter < 1:
        raise ConfigError(f"bytes_per_parameter = {bytes_per_parameter}: must be at least 1")
    of_bytes = {unit: Fraction(size, bytes_per_parameter) for unit, size in _BYTES.items()}
    units: dict[str, int | Fraction] = {**_PARAMETERS, **of_bytes}
    forms = f"{_FORMS}, or the size of the file as in 500KB, 2MB or 1.5MiB"
    return Budget(_amount("budget", text, units, forms), text.strip(), bytes_per_parameter)


def parse_parameters(name: str, text: str) -> int:
    """Read a number of trainable parameters.

    Args:
        name: Name of the setting.
        text: Parameters, such as `500000`, `500k` or `1.2M`; upper and lower case are alike.

    Returns:
        Parameters, rounded down.

    Raises:
        ConfigError: If the text is none, or leaves no parameter.

    Example:
        >>> parse_parameters("equal_size", "1.2M")
        1200000
    """
    return _amount(name, text, _PARAMETERS, _FORMS)


def _amount(name: str, text: str, units: Mapping[str, int | Fraction], forms: str) -> int:
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{name} = {shown(text)}: {forms}")
    amount, unit = Fraction(match[1].replace("_", "")), match[2].lower()
    if unit not in units:
        raise ConfigError(f"{name} = {shown(text)} has the unit {shown(match[2])}: {forms}")
    parameters = int(amount * units[unit])
    if parameters < 1:
        raise ConfigError(f"{name} = {shown(text)} leaves no parameter: {forms}")
    return parameters


def fitting(candidates: Iterable[Candidate], sites: Sequence[Site], budget: Budget) -> tuple[Candidate, ...]:
    """Keep the candidates that a budget allows.

    Args:
        candidates: Placements.
        sites: Every module that can be adapted.
        budget: Budget.

    Returns:
        Those with at most `budget.parameters` parameters, in their order.

    Raises:
        ConfigError: If there is none, naming the smallest candidate.
    """
    every = tuple(candidates)
    kept = tuple(candidate for candidate in every if n_parameters(candidate, sites) <= budget.parameters)
    if not kept:
        raise ConfigError(misfit(every, sites, budget))
    return kept


def misfit(candidates: Sequence[Candidate], sites: Sequence[Site], budget: Budget) -> str:
    """Say of a budget that no candidate fits it.

    Args:
        candidates: Placements, none of which fits.
        sites: Every module that can be adapted.
        budget: Budget.

    Returns:
        The message of an error, naming the smallest candidate and its size.
    """
    if not candidates:
        return f"budget = {budget.text!r}: there is no candidate that could fit it, name modules and ranks"
    smallest = min(candidates, key=lambda candidate: n_parameters(candidate, sites))
    count = n_parameters(smallest, sites)
    size = count * budget.bytes_per_parameter / 1000
    return (
        f"budget = {budget.text!r} ({budget.parameters:,} parameters) fits no candidate: the smallest, "
        f"{label(smallest, sites)!r}, has {count:,} parameters ({size:,.1f} KB)"
    )
