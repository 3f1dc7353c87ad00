"""Ways to the same kernel, each in a file of its own, which is imported when it is asked for; `ALL` names them."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from torch import Tensor

from .problem import Problem

Run = Callable[[], Tensor | None]


@dataclass(frozen=True)
class Contestant:
    """One row of the table.

    Attributes:
        label: What it is.
        where: Module and function that prepares it: takes the problem, gives the call that is timed.
        package: What has to be installed, for the version in the table; empty for torch alone.
        attention: Attention that it can run; fused attention has no forward-mode derivative and no batching rule.
        samples: The most samples that it is asked for in `peers.py`, where more would take hours; None for all.
    """

    label: str
    where: str
    package: str = ""
    attention: str = "sdpa"
    samples: int | None = None

    def prepare(self, problem: Problem) -> Run:
        """Import it and make its call.

        Args:
            problem: Model and texts.

        Returns:
            What computes the n × n kernel, or None for a plain pass.
        """
        module, function = self.where.split(":")
        call: Run = getattr(import_module(f"contestants.{module}"), function)(problem)
        return call


ALL = {
    "forward": Contestant("plain forward", "plain:forward"),
    "plain": Contestant("plain forward and backward", "plain:forward_backward"),
    "foretune": Contestant("foretune, 1 draw of A", "ours:one_draw"),
    "foretune-5": Contestant("foretune, 5 draws of A", "ours:five_draws"),
    "loop": Contestant("autograd.grad, sample by sample", "loop:loop"),
    "func": Contestant("torch.func: vmap of jacrev, contracted", "func:jacobian_contraction", attention="eager"),
    "jvp": Contestant("torch.func: a jvp for each sample", "func:jvp_rows", attention="eager", samples=4),
    "opacus": Contestant("Opacus GradSampleModule", "opacus_grads:grad_sample", "opacus"),
    "bergson": Contestant("bergson TraceCollector", "bergson_grads:trace_collector", "bergson"),
    "dattri": Contestant("dattri AttributionTask", "dattri_grads:attribution_task", "dattri", attention="eager"),
    "trak": Contestant("TRAK gradient computer", "trak_grads:functional", "traker", attention="eager", samples=4),
    "curvlinops": Contestant(
        "curvlinops Jacobian operators", "curvlinops_operator:jacobians", "curvlinops-for-pytorch", "eager", samples=4
    ),
}
