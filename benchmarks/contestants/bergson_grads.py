"""bergson: a collector with forward and backward hooks on the modules that hold the matrices B."""

import torch
from bergson.collector.gradient_collectors import TraceCollector

from . import Run
from .problem import Problem, gram, margin


def trace_collector(problem: Problem) -> Run:
    """Gradients as they come, kept in memory."""
    targets = {name.removesuffix(".weight") for name in problem.trained}

    def run() -> torch.Tensor:
        collector = TraceCollector(
            model=problem.placed, target_modules=targets, device=torch.device("cpu"), dtype=torch.float32
        )
        with collector:
            margin(problem.placed(**problem.inputs).logits).sum().backward()
        problem.placed.zero_grad(set_to_none=True)
        return gram([torch.cat(parts) for parts in collector.mod_grads.values()])

    return run
