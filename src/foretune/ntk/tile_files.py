"""Files of finished work that a later run may go on from: written whole, with what they are of and a checksum.

A file is believed only if its key, a digest of all that its numbers follow from, is the one that is asked for, and its
numbers have the checksum that was written with them. Everything else counts as not there.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from foretune.report.store import write_whole

_KEY, _SUM, _FACTS = "key", "sha256", "facts"


def digest(*parts: str | bytes) -> str:
    """Hash texts and bytes, each with its length.

    Args:
        *parts: What to hash, in order.

    Returns:
        SHA-256 in 64 hexadecimal digits.
    """
    found = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        found.update(len(content).to_bytes(8, "big") + content)
    return found.hexdigest()


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors with their names, types and shapes.

    Args:
        tensors: Tensors by name.

    Returns:
        SHA-256 in 64 hexadecimal digits.
    """
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def write_checked(path: Path, tensors: Mapping[str, Tensor], key: str, facts: Mapping[str, Any] | None = None) -> None:
    """Write tensors, whole or not at all.

    Args:
        path: File.
        tensors: Tensors by name.
        key: Digest of all that they follow from.
        facts: JSON-ready values to keep with them.

    Raises:
        StoreError: If the disk refuses.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    written = json.dumps(dict(facts or {}), sort_keys=True)
    metadata = {_KEY: key, _SUM: digest(tensor_digest(held), written), _FACTS: written}
    write_whole(path, lambda place: save_file(held, place, metadata=metadata), durable=False)


def read_checked(path: Path, key: str, *, check: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read what `write_checked` wrote; the tensors are mapped from the file, not copied.

    Args:
        path: File.
        key: Of what is wanted.
        check: Whether to compare the checksum; not needed again of a file that this process wrote or has checked.

    Returns:
        Tensors by name and the facts; None if the file is not there, is of something else, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get(_KEY) != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        facts = json.loads(metadata[_FACTS])
    except (OSError, SafetensorError, ValueError, KeyError):
        return None
    if check and metadata.get(_SUM) != digest(tensor_digest(tensors), metadata[_FACTS]):
        return None
    return tensors, facts
