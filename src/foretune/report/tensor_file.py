"""Safetensors files of arrays that are too large to be copied: written a few rows at a time."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TYPES = {"<f8": "F64", "<i8": "I64", "<f4": "F32", "|b1": "BOOL"}
_ROWS = 1 << 24  # bytes that are copied at once


def write_tensors(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write arrays as `safetensors.numpy.save_file` does, without a copy of any of them.

    Args:
        path: File.
        arrays: float64, float32, int64 or bool arrays by name; may be mapped from files.
        metadata: Texts by name.

    Raises:
        KeyError: If an array is of another type.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": _TYPES[array.dtype.newbyteorder("<").str],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    written = json.dumps(header, separators=(",", ":")).encode()
    written += b" " * (-len(written) % 8)
    with path.open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        for array in arrays.values():
            flat = array.reshape(-1)
            step = max(1, _ROWS // max(1, array.itemsize))
            for start in range(0, len(flat), step):
                part = flat[start : start + step]
                file.write(np.ascontiguousarray(part, dtype=part.dtype.newbyteorder("<")).tobytes())
