"""The hash of a forecast: whoever holds its `result.json` can tell that what it says was not changed afterwards."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

HASH = "hash"
_PASSING = frozenset({"seconds", "versions"})  # how the forecast was computed, and not what it says


def content_hash(content: Mapping[str, Any]) -> str:
    """Hash what a forecast says and what it was made from, its time among that.

    SHA-256 over the JSON with sorted keys, no blanks and ASCII alone, without `hash` and, at any depth, `seconds` and
    `versions`. So it covers fingerprints of model and data, adapter, recipe, known rows, calibration and levels, and
    whatever a later version adds.

    Args:
        content: As in `result.json`.

    Returns:
        64 hexadecimal digits.
    """
    said = _lasting({name: value for name, value in content.items() if name != HASH})
    canonical = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def is_unaltered(content: Mapping[str, Any]) -> bool:
    """Compute the hash of a forecast again.

    Args:
        content: As in `result.json`.

    Returns:
        Whether it is the one that stands there.
    """
    try:
        return bool(content.get(HASH) == content_hash(content))
    except ValueError:  # a NaN, which no result.json holds
        return False


def _lasting(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _lasting(entry) for name, entry in value.items() if name not in _PASSING}
    return [_lasting(entry) for entry in value] if isinstance(value, list | tuple) else value
