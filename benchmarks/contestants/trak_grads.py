"""TRAK: its functional gradient computer takes gradients of all parameters and keeps those that are wanted."""

import torch
from torch.func import functional_call
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import AbstractModelOutput

from . import Run
from .problem import Problem, gram, margin


class Margin(AbstractModelOutput):
    """The margin of one sample."""

    def __init__(self) -> None:
        """Nothing to keep."""

    @staticmethod
    def get_output(model, weights, buffers, ids):
        """As the class above asks for it."""
        inputs = {"input_ids": ids[None]}  # no mask, as in `func.margins`
        return margin(functional_call(model, (weights, buffers), (), inputs).logits)[0]

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        """Not needed here."""
        raise NotImplementedError


def functional(problem: Problem) -> Run:
    """Per-sample gradients without the random projection, which would make the kernel an estimate."""
    computer = FunctionalGradientComputer(
        problem.placed, Margin(), grad_dim=0, dtype=torch.float32, device="cpu", grad_wrt=list(problem.trained)
    )
    return lambda: gram(list(computer.compute_per_sample_grad((problem.inputs["input_ids"],)).values()))
