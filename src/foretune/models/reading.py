"""What is read off one adapted module: its formula, and the parameters that the formula covers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from foretune.models.adapted import Adapter, Vector
from foretune.models.sites import Site, split_name


@dataclass(frozen=True)
class Reading:
    """One adapted module.

    Attributes:
        adapter: Its formula.
        trained: Parameters that its features are gradients of.
        still: Parameters whose gradients are 0 as they stand, such as A where B = 0.
        idle: Whether it adds exact zeros to the forward pass, so that it may be skipped there.
        random_a: Whether A is as peft draws it, so that it can be drawn again.
        plus_bias: Whether the base module's bias is added to y as it is.
    """

    adapter: Adapter
    trained: tuple[nn.Parameter, ...]
    still: tuple[nn.Parameter, ...] = ()
    idle: bool = False
    random_a: bool = False
    plus_bias: bool = False


def vectors_alone(
    name: str,
    module: nn.Module,
    vectors: Sequence[Vector],
    *,
    widths: tuple[int, int],
    like: Tensor,
    beside: int = 0,
) -> Adapter:
    """Make the adapter of a module that has vectors, and neither A nor B.

    Args:
        name: Of the module.
        module: Whose input is h and whose output is y.
        vectors: What it trains.
        widths: Of h and of y.
        like: A tensor of its type and device.
        beside: Trained numbers whose gradients are 0 as they stand.

    Returns:
        An adapter of rank 0.
    """
    layer, kind = split_name(name)
    d_in, d_out = widths
    numbers = sum(vector.numbers for vector in vectors) + beside
    site = Site(name, layer, kind, d_in, d_out, rank=0, scaling=1.0, others=numbers)
    rows = torch.empty(0, d_in, dtype=like.dtype, device=like.device)
    return Adapter(site, module, rows, None, tuple(vectors))


@contextmanager
def switched_off(layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    """Skip adapters in the forward pass that add exact zeros.

    Args:
        layers: peft's layers.

    Yields:
        Nothing.
    """
    flags = [[(p, p.requires_grad) for p in layer.parameters()] for layer in layers]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, of_layer in zip(layers, flags, strict=True):
            layer.enable_adapters(True)
            for parameter, flag in of_layer:
                parameter.requires_grad_(flag)
