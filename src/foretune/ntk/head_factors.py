"""Gradients of the modules of a classifier's head, from their uses in a pass."""

import torch
from torch import nn

from foretune.ntk.capture import Uses
from foretune.ntk.features import HeadFactor


def head_factor(uses: Uses, n_outputs: int, *, bias: bool) -> HeadFactor:
    """Put the uses of a linear module together.

    Args:
        uses: Its inputs and gradients of n examples.
        n_outputs: Numbers k that were differentiated.
        bias: Whether it has a trained bias.

    Returns:
        g and h where each example has one position; else Σ_t g_t h_tᵀ, and Σ_t g_t of a bias.
    """
    h, g = uses.h, torch.stack([uses.g(output) for output in range(n_outputs)])
    if h.shape[1] <= 1:  # sums over at most one position: none of a module that does not run
        return HeadFactor(g=g.sum(2), h=h.sum(1), dense=None, bias=bias)
    dense = torch.einsum("kntq,ntp->knqp", g, h.to(g.dtype)).flatten(2)
    if bias:
        dense = torch.cat([dense, g.sum(2)], dim=2)
    return HeadFactor(g=None, h=None, dense=dense, bias=bias)


def has_bias(module: nn.Module) -> bool:
    """Tell whether a linear module has a bias.

    Args:
        module: The module.

    Returns:
        Whether it does.
    """
    return getattr(module, "bias", None) is not None
