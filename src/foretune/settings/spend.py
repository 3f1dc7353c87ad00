"""Share of one full run that may be spent."""

import re

from foretune.errors import ConfigError, shown

_SHARE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15})(?:[eE][+-]?[0-9]{1,2})?")


def parse_spend(text: str) -> float:
    """Read what share of the cost of one full run may be spent.

    Args:
        text: `2%`, `5 %` or `0.02`; `0` for nothing.

    Returns:
        The share, from 0 to 1.

    Raises:
        ConfigError: If it is none, or more than one run.

    Example:
        >>> parse_spend("2%"), parse_spend("0.02"), parse_spend("0")
        (0.02, 0.02, 0.0)
    """
    number = text.strip()
    percent = number.endswith("%")
    number = number.removesuffix("%").rstrip()
    if not _SHARE.fullmatch(number):
        raise ConfigError(f"spend = {shown(text)}: give a share of one full run, such as 2% or 0.02, or 0 for none")
    share = float(number) / (100 if percent else 1)
    if share > 1:
        meant = f", or {number}% if that is meant" if not percent and float(number) <= 100 else ""
        raise ConfigError(f"spend = {shown(text)}: more than one full run; give at most 100%{meant}")
    return share
