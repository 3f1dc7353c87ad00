"""Opacus: hooks of its own on linear layers leave per-sample gradients in `grad_sample`."""

import copy

from opacus import GradSampleModule

from . import Run
from .problem import Problem, gram, margin


def grad_sample(problem: Problem) -> Run:
    """Wrap a copy of the model; it adds hooks for good."""
    wrapped = GradSampleModule(copy.deepcopy(problem.placed), loss_reduction="sum", strict=False)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    for module in wrapped.modules():  # its hooks work in training mode only; the rest stays as it is, without dropout
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module.training = True

    def run():
        wrapped.zero_grad(set_to_none=True)
        for parameter in trained:
            parameter.grad_sample = None
        margin(wrapped(**problem.inputs).logits).sum().backward()
        return gram([parameter.grad_sample for parameter in trained])

    return run
