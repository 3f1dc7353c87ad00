"""What one writes first: a backward pass for each sample."""

import torch

from . import Run
from .problem import Problem, gram, margin


def loop(problem: Problem) -> Run:
    """Sample by sample, gradients of the matrices B."""
    trained = list(problem.trained.values())

    def run() -> torch.Tensor:
        rows = []
        for i in range(problem.n):
            logits = problem.placed(**{name: tensor[i : i + 1] for name, tensor in problem.inputs.items()}).logits
            rows.append(torch.autograd.grad(margin(logits).sum(), trained))
        return gram([torch.stack(column) for column in zip(*rows, strict=True)])

    return run
