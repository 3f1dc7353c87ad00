"""Values that hold tensors, on their way from one process to another: the tensors as bytes, one after the other."""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**28  # bytes that are moved at once
Move = Callable[[Tensor], object]  # sends the bytes of a tensor on the CPU, or fills it


@dataclass(frozen=True)
class _Shape:
    """What a tensor is but for its numbers; `on_cpu` says whether it lay there."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    on_cpu: bool


class _Pickler(pickle.Pickler):
    """Pickle all but the tensors, each of which stands there by its number, however often it occurs."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._number: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self._number:
            self._number[id(obj)] = len(self.tensors)
            self.tensors.append(obj)  # kept alive, so that its id is its own
        return self._number[id(obj)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]


def post(value: object, move: Move) -> None:
    """Send a value; tensors keep their bits.

    Args:
        value: Anything that can be pickled, with tensors in it.
        move: Sends a tensor of bytes.
    """
    body = io.BytesIO()
    pickler = _Pickler(body)
    pickler.dump(value)
    shapes = [_Shape(one.dtype, tuple(one.shape), one.device.type == "cpu") for one in pickler.tensors]
    head = torch.frombuffer(bytearray(pickle.dumps((body.getvalue(), shapes))), dtype=torch.uint8)
    move(torch.tensor([len(head)]))
    _in_chunks(head, move)
    for tensor in pickler.tensors:
        _in_chunks(_bytes_of(tensor.detach().cpu().contiguous()), move)


def fetch(move: Move, device: torch.device | None) -> Any:
    """Take a value that `post` sends.

    Args:
        move: Fills a tensor of bytes.
        device: Where tensors go that did not lie on a CPU; None leaves them on the CPU.

    Returns:
        The value.
    """
    length = torch.empty(1, dtype=torch.long)
    move(length)
    head = torch.empty(int(length), dtype=torch.uint8)
    _in_chunks(head, move)
    body, shapes = pickle.loads(head.numpy().tobytes())
    tensors = []
    for shape in shapes:
        tensor = torch.empty(shape.shape, dtype=shape.dtype)
        _in_chunks(_bytes_of(tensor), move)
        tensors.append(tensor if shape.on_cpu or device is None else tensor.to(device))
    return _Unpickler(io.BytesIO(body), tensors).load()


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _in_chunks(flat: Tensor, move: Move) -> None:
    for chunk in flat.split(CHUNK):
        if len(chunk):
            move(chunk)
