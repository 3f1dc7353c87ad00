"""Amounts of memory."""

import re

from foretune.errors import ConfigError, shown

_BYTES = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_AMOUNT = re.compile(r"([0-9]{1,9}(?:\.[0-9]{0,9})?)\s*([A-Za-z]{2,3})")


def parse_bytes(name: str, text: str) -> int:
    """Read an amount of memory.

    Args:
        name: Setting, for the message.
        text: `2GB`, `500 MB`, `1.5GiB`.

    Returns:
        Bytes, at least one.

    Raises:
        ConfigError: If it is none.

    Example:
        >>> parse_bytes("memory", "2GB"), parse_bytes("memory", "1.5 GiB")
        (2000000000, 1610612736)
    """
    found = _AMOUNT.fullmatch(text.strip())
    unit = None if found is None else _BYTES.get(found[2].lower())
    if found is None or unit is None or float(found[1]) * unit < 1:
        raise ConfigError(f"{name} = {shown(text)}: give an amount of memory, such as 2GB or 500MB")
    return int(float(found[1]) * unit)
