"""curvlinops: the Jacobian as a linear operator, K = J Jᵀ applied to the unit matrix."""

import torch
from curvlinops import JacobianLinearOperator, TransposedJacobianLinearOperator
from torch import nn

from . import Run
from .problem import Problem, margin


class Margins(nn.Module):
    """Model of one argument and n × 1 outputs, as the operators want it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.model = problem.placed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Margins of unpadded texts."""
        return margin(self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)[:, None]


def jacobians(problem: Problem) -> Run:
    """One operator for each side; both run the whole batch once for each column."""
    data = [(problem.inputs["input_ids"], torch.zeros(problem.n, 1))]
    trained = list(problem.trained.values())
    model = Margins(problem).eval()

    def run() -> torch.Tensor:
        left = JacobianLinearOperator(model, trained, data, check_deterministic=False)
        right = TransposedJacobianLinearOperator(model, trained, data, check_deterministic=False)
        return (left @ (right @ torch.eye(problem.n))).double()

    return run
