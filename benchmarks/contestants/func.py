"""The two ways of torch.func."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, jvp, vmap

from . import Run
from .problem import Problem, margin


def margins(problem: Problem) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """The margins of a batch as a function of the matrices B, as all of torch.func wants it."""

    def call(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
        # no mask: transformers asks whether it hides anything, which vmap refuses, and here it hides nothing
        return margin(functional_call(problem.placed, parameters, (), {"input_ids": ids}).logits)

    return call


def jacobian_contraction(problem: Problem) -> Run:
    """PyTorch's tutorial "Neural Tangent Kernels": the Jacobian of every sample, then its contraction."""
    call = margins(problem)
    parameters = {name: p.detach() for name, p in problem.trained.items()}

    def single(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
        return call(parameters, ids[None])

    def run() -> Tensor:
        jacobian = vmap(jacrev(single), (None, 0))(parameters, problem.inputs["input_ids"])
        flat = [j.flatten(2).double() for j in jacobian.values()]
        return torch.stack([torch.einsum("Naf,Mbf->NMab", j, j) for j in flat]).sum(0)[:, :, 0, 0]

    return run


def jvp_rows(problem: Problem) -> Run:
    """As in LM-Kernel-FT: the gradient of one sample is pushed forward through all others, a row of the kernel."""
    call = margins(problem)
    parameters = {name: p.detach() for name, p in problem.trained.items()}
    ids = problem.inputs["input_ids"]

    def row(i: int) -> Tensor:
        gradient = jacrev(lambda p: call(p, ids[i : i + 1])[0])(parameters)
        return jvp(lambda p: call(p, ids), (parameters,), (gradient,))[1]

    return lambda: torch.stack([row(i) for i in range(problem.n)]).double()
