"""How simulated runs, their parameters stacked along the first axis, take a step: update rule and clipping."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foretune.forecasting.schedule import Schedule

BETAS, EPSILON = (0.9, 0.999), 1e-8  # AdamW's in the Trainer


def optimizer_of(schedule: Schedule, model: nn.Module) -> torch.optim.Optimizer:
    """Make the schedule's optimizer: AdamW, fused as in the Trainer, which decays all parameters but biases.

    Stacked runs stay apart under any rule that treats each number by itself, such as AdamW, Lion or SGD; one that
    mixes the numbers of a tensor, such as Muon, would have to be told of the first axis.

    Args:
        schedule: Weight decay and peak learning rate.
        model: Parameters that require a gradient are trained; those named `bias` do not decay.

    Returns:
        The optimizer.
    """
    named = [(name.rpartition(".")[2], p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if name != "bias"], "weight_decay": schedule.weight_decay},
        {"params": [p for name, p in named if name == "bias"], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=BETAS, eps=EPSILON, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step.

    Args:
        optimizer: Optimizer.
        rate: Learning rate of all its groups.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_each(stacked: Sequence[tuple[nn.Parameter, Tensor]], count: int, max_norm: float) -> None:
    """Clip every run's gradient, that of all its parameters together, to a norm: min(1, max_norm / (‖∇‖ + 10⁻⁶)).

    As `torch.nn.utils.clip_grad_norm_` does to the one run of the Trainer.

    Args:
        stacked: Parameters with gradients, and which runs stand along the first axis of each.
        count: Number of runs.
        max_norm: Largest norm.
    """
    gradients = [(parameter.grad, runs) for parameter, runs in stacked if parameter.grad is not None]
    squares = gradients[0][0].new_zeros(count)
    for gradient, runs in gradients:
        squares.index_add_(0, runs, torch.linalg.vector_norm(gradient.flatten(1), dim=1).square())
    factors = (max_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient, runs in gradients:
        gradient.mul_(factors[runs].reshape(-1, *[1] * (gradient.ndim - 1)))
