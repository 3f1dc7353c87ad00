"""Tensors that simulated runs train, side by side."""

from dataclasses import dataclass

import torch
from torch import Tensor

from foretune.forecasting.head_layer import ACTIVATIONS, HeadLayer


@dataclass
class Trained:
    """One trained tensor of several runs: value, AdamW's two moments, and which runs it belongs to."""

    value: Tensor  # runs first
    runs: Tensor
    decayed: bool
    origin: Tensor | None  # what the value is the change of, None where it is the whole
    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, value: Tensor, runs: Tensor, *, decayed: bool = True, origin: Tensor | None = None) -> "Trained":
        """Start a tensor with moments of zero.

        Args:
            value: Values, runs first.
            runs: The runs that they belong to.
            decayed: Whether weight decay shrinks it.
            origin: What the value is the change of, None where it is the whole.

        Returns:
            The tensor.
        """
        return cls(value, runs, decayed, origin, torch.zeros_like(value), torch.zeros_like(value))


@dataclass
class TrainedLayer:
    """The head's hidden layer in every run: weight runs × p × d, bias runs × p."""

    weight: Trained
    bias: Trained
    activation: str

    @classmethod
    def of(cls, layer: HeadLayer, like: Tensor, runs: Tensor) -> "TrainedLayer":
        """Start the layer in every run.

        Args:
            layer: The layer before training.
            like: A tensor of the type and device to compute in.
            runs: The runs.

        Returns:
            The layer.
        """
        weight, bias = layer.weight.to(like), layer.bias.to(like)
        return cls(
            Trained.of(weight.repeat(len(runs), 1, 1), runs),
            Trained.of(bias.repeat(len(runs), 1), runs, decayed=False),
            layer.activation,
        )

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Compute W h + c and σ of it.

        Args:
            h: Inputs, examples × d.

        Returns:
            Both, examples × runs × p.
        """
        pre = torch.einsum("nd,apd->nap", h, self.weight.value) + self.bias.value
        return pre, ACTIVATIONS[self.activation][0](pre)

    def gradients(self, to_phi: Tensor, h: Tensor, pre: Tensor) -> list[Tensor]:
        """Differentiate.

        Args:
            to_phi: ∂loss/∂φ, examples × runs × p.
            h: Inputs.
            pre: W h + c.

        Returns:
            Gradients of W and c.
        """
        to_pre = to_phi * ACTIVATIONS[self.activation][1](pre)
        return [torch.einsum("nap,nd->apd", to_pre, h), to_pre.sum(0)]
