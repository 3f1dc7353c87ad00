"""Classifier heads at initialisation: random, averaged over random draws, or a cross-fitted linear probe.

The kernel of the adapters is quadratic in the weights of the head, so the head's initialisation is a source
of noise, and a policy that every result names.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foretune.errors import ConfigError


@dataclass(frozen=True)
class HeadWeights:
    """Weights of the linear modules of a head.

    Attributes:
        weights: Weight and bias (or None) of each module, by name.
    """

    weights: Mapping[str, tuple[Tensor, Tensor | None]]


def current_weights(modules: Mapping[str, nn.Linear]) -> HeadWeights:
    """Copy the weights of head modules.

    Args:
        modules: Linear modules by name.

    Returns:
        Copies.
    """
    return HeadWeights({name: _copies(module) for name, module in modules.items()})


def _copies(module: nn.Linear) -> tuple[Tensor, Tensor | None]:
    bias: Tensor | None = module.bias
    return module.weight.detach().clone(), None if bias is None else bias.detach().clone()


@contextmanager
def installed(modules: Mapping[str, nn.Linear], weights: HeadWeights) -> Iterator[None]:
    """Put weights into head modules for the time of a context, and the old ones back after it.

    Args:
        modules: Linear modules by name.
        weights: New weights of some or all of them.

    Yields:
        Nothing.
    """
    before = current_weights(modules)
    try:
        _install(modules, weights)
        yield
    finally:
        _install(modules, before)


def _install(modules: Mapping[str, nn.Linear], weights: HeadWeights) -> None:
    with torch.no_grad():
        for name, (weight, bias) in weights.weights.items():
            module = modules[name]
            module.weight.copy_(weight)
            if bias is not None:
                module.bias.copy_(bias)


def random_heads(
    model: nn.Module, modules: Mapping[str, nn.Linear], *, count: int, seed: int
) -> tuple[HeadWeights, ...]:
    """Draw heads as the model's own initialisation does; the first is the head that the model has.

    Args:
        model: transformers model whose `_init_weights` draws.
        modules: Linear modules of its head.
        count: Heads in all.
        seed: Seed of the further heads.

    Returns:
        Weights of `count` heads.

    Raises:
        ConfigError: If `count` is below 1.
    """
    if count < 1:
        raise ConfigError(f"{count} heads: at least 1 is needed")
    own = current_weights(modules)
    heads = [own]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            for _ in range(1, count):
                for module in modules.values():
                    device = next(module.parameters()).device
                    model._init_weights(module.to("cpu"))  # type: ignore[operator]  # the same on every device
                    module.to(device)
                heads.append(current_weights(modules))
        finally:
            _install(modules, own)
    return tuple(heads)
