"""foretune's own path."""

from dataclasses import replace

import torch

from foretune.models.adapted import Batch, Layout
from foretune.models.placement import read_adapters
from foretune.ntk.jacobian import tangent_features
from foretune.ntk.kernel import tangent_kernel
from foretune.tasks.outputs import output_reduction

from . import Run
from .problem import Problem

BATCH = 32


def _run(problem: Problem, draws: int) -> Run:
    # commands look once for what is special about a model, and find nothing here; without it, as many texts as tokens
    # would be taken one by one
    adapted = replace(read_adapters(problem.placed, draws=draws), layout=Layout())
    reduction = output_reduction("margin", 2)
    batches = [
        Batch(rows, {name: tensor[rows] for name, tensor in problem.inputs.items()})
        for rows in torch.arange(problem.n).split(BATCH)
    ]

    def run() -> torch.Tensor:
        features = tangent_features(adapted, batches, reduction, n=problem.n)
        return torch.from_numpy(tangent_kernel(features).matrices()[0])  # the adapters' own A

    return run


def one_draw(problem: Problem) -> Run:
    """The adapters' own A."""
    return _run(problem, 1)


def five_draws(problem: Problem) -> Run:
    """Five kernels instead of one: the adapters' own A and four others."""
    return _run(problem, 5)
