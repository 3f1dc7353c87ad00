"""dattri: the per-sample gradients of an attribution task, the matrices B as its layers."""

import torch
from dattri.task import AttributionTask
from torch.func import functional_call

from . import Run
from .problem import Problem, gram, margin


def attribution_task(problem: Problem) -> Run:
    """What its attributors call for the gradients of a batch."""

    def target(parameters: dict[str, torch.Tensor], data: tuple[torch.Tensor]) -> torch.Tensor:
        inputs = {"input_ids": data[0][None]}  # no mask, as in `func.margins`
        return margin(functional_call(problem.placed, parameters, (), inputs).logits)[0]

    names = list(problem.trained)
    task = AttributionTask(target, problem.placed, problem.placed.state_dict())
    gradients = task.get_grad_target_func(in_dims=(None, 0), layer_name=names, ckpt_idx=0)
    parameters, _ = task.get_param(ckpt_idx=0, layer_name=names)
    return lambda: gram([gradients(parameters, (problem.inputs["input_ids"],))])
