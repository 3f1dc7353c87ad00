"""A trained hidden layer of the classifier's head, φ = σ(W h + c), and which σ a model applies.

Its weights start at random and small, and a run moves them by more than their size within some dozen steps: unlike the
pretrained weights they are simulated as they are, not to first order.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# σ by name; the first that fits is taken
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "identity": lambda x: x,
}
WIDE = 3.0  # standard deviation of W h + c at which every σ shows its shape


@dataclass(frozen=True)
class HeadLayer:
    """The hidden layer before training.

    Attributes:
        weight: W, p × d.
        bias: c of p; zeros for a layer without one, which then gets one.
        activation: σ, a name of `ACTIVATIONS`.
    """

    weight: Tensor
    bias: Tensor
    activation: str


def find_activation(run: Callable[[], None], hidden: nn.Linear, output: nn.Linear) -> str | None:
    """Find σ by looking: the inputs of the output layer as a function of the outputs of the hidden one.

    The hidden layer's weights are scaled for one of two passes, since at their start every σ is nearly linear, and put
    back as they were.

    Args:
        run: Runs the model on some examples, without dropout.
        hidden: The hidden layer.
        output: The output layer.

    Returns:
        A name of `ACTIVATIONS`; None if it is none of them, or if the layer is not applied once to each example.
    """
    recorded: dict[str, Tensor] = {}
    handles = [
        hidden.register_forward_hook(lambda _module, _inputs, result: recorded.update(pre=result)),
        output.register_forward_hook(lambda _module, inputs, _result: recorded.update(phi=inputs[0])),
    ]
    weights = [parameter for parameter in (hidden.weight, hidden.bias) if parameter is not None]
    before = [parameter.detach().clone() for parameter in weights]
    try:
        with torch.no_grad():
            run()
            spread = float(recorded["pre"].float().std())
            if not spread > 0.0 or recorded["pre"].ndim != 2:
                return None
            for parameter in weights:
                parameter.mul_(WIDE / spread)
            run()
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for parameter, value in zip(weights, before, strict=True):
                parameter.copy_(value)
    pre, phi = recorded["pre"].float(), recorded["phi"].float()
    if pre.shape != phi.shape:
        return None
    for name, function in ACTIVATIONS.items():
        if torch.allclose(function(pre), phi, rtol=1e-2, atol=1e-2):
            return name
    return None
