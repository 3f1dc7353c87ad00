"""Plain passes: what everything is measured in."""

import torch
from torch import nn

from . import Run
from .problem import Problem, margin


def forward(problem: Problem) -> Run:
    """The model without adapters, no gradient."""

    def run() -> None:
        with torch.no_grad():
            problem.base(**problem.inputs)

    return run


def forward_backward(problem: Problem) -> Run:
    """The cheapest backward pass: frozen weights, no adapters, back to the output of the embeddings."""
    body = problem.base.base_model
    embeddings: nn.Module = getattr(body, "embeddings", None) or body.get_input_embeddings()

    def run() -> None:
        held: list[torch.Tensor] = []
        handle = embeddings.register_forward_hook(
            lambda _, __, output: held.append(output.detach().requires_grad_()) or held[-1]
        )
        try:
            torch.autograd.grad(margin(problem.base(**problem.inputs).logits).sum(), held)
        finally:
            handle.remove()

    return run
