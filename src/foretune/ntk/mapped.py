"""Tensors in files that are mapped into memory: what does not fit, read as if it did.

The files have no name, so that the disk is free again when the last tensor is gone, however the process ends.
"""

import mmap
import os
import tempfile
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from foretune.report.folders import disk

_ALIGNED = 64  # bytes
_REMEDY = "name a folder with room in TMPDIR, or raise --memory"


class Mapped:
    """Hands out tensors that lie in files among the system's temporary ones.

    Args:
        segment: Bytes that a file has at least; tensors are put into one until it is full.
        beside: Another, whose memory is given back together with that of this one.
    """

    def __init__(self, segment: int, beside: "Mapped | None" = None) -> None:
        self._segment, self._beside = segment, beside
        self._maps: list[mmap.mmap] = []
        self._free = 0  # of the last file

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Make a tensor.

        Args:
            shape: Its shape.
            dtype: Type of its numbers.

        Returns:
            It, with any content.

        Raises:
            StoreError: If the disk refuses.
        """
        count = prod(shape)
        size = -(-count * dtype.itemsize // _ALIGNED) * _ALIGNED
        if not count:
            return torch.empty(tuple(shape), dtype=dtype)
        if size > self._free:
            self._free = max(size, self._segment)
            self._maps.append(_file(self._free))
        offset = len(self._maps[-1]) - self._free
        self._free -= size
        return torch.frombuffer(self._maps[-1], dtype=dtype, count=count, offset=offset).view(tuple(shape))

    def kept(self, tensor: Tensor) -> Tensor:
        """Copy a tensor into a file.

        Args:
            tensor: Tensor.

        Returns:
            The copy.

        Raises:
            StoreError: If the disk refuses.
        """
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def let_go(self) -> None:
        """Give the memory of what was read or written back; what is needed again comes from the files."""
        for held in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                held.madvise(mmap.MADV_DONTNEED)
        if self._beside is not None:
            self._beside.let_go()

    def alone(self) -> "Mapped":
        """Leave the other one.

        Returns:
            This.
        """
        self._beside = None
        return self


def _file(size: int) -> mmap.mmap:
    with disk(f"cannot write to {tempfile.gettempdir()!r}", _REMEDY), tempfile.TemporaryFile() as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # a disk that is full says so here, and not when it is mapped
        else:
            file.truncate(size)
        return mmap.mmap(file.fileno(), size)
