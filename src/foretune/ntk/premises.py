"""What a pass over a model takes for granted, checked or made so."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foretune.errors import KernelError


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Switch every parameter's gradient off for a pass and restore the flags after it.

    Args:
        model: Any model.

    Yields:
        Nothing.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def check_eval_mode(model: nn.Module) -> None:
    """Refuse a model whose outputs would be random or mix examples.

    Args:
        model: Any model.

    Raises:
        KernelError: Naming the module that is in training mode.
    """
    training = {name: module for name, module in model.named_modules() if module.training}
    for name, module in training.items():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise KernelError(
                f"dropout {name!r} is on (p = {module.p}), its kernel would be random: call model.eval() first"
            )
    if training:  # attention may drop without a module for it, and batch norm mixes examples
        raise KernelError(f"module {next(iter(training))!r} is in training mode: call model.eval() first")


def check_logits(logits: Tensor, n: int, n_outputs: int) -> None:
    """Refuse what is no sequence classifier.

    Args:
        logits: Outputs of the model.
        n: Examples.
        n_outputs: Outputs.

    Raises:
        KernelError: If the logits are not n × C.
    """
    if logits.ndim != 2 or logits.shape != (n, n_outputs):
        raise KernelError(
            f"the model's logits have shape {tuple(logits.shape)}, expected {n} × {n_outputs}: "
            "only sequence classifiers are supported"
        )


def not_reached(name: str, *, used: bool) -> str:
    """Say of a module that it cannot be adapted.

    Args:
        name: Module.
        used: Whether it runs in the forward pass.

    Returns:
        The message of an error.
    """
    why = (
        f"the outputs do not depend on module {name!r}" if used else f"module {name!r} is not used in the forward pass"
    )
    return f"{why}: leave it out"


def hooked(output: Tensor) -> Tensor:
    """Make a module's output fit for a hook on its gradient.

    Args:
        output: Output of an adapted module.

    Returns:
        The output; where nothing below it is adapted, a copy above a new leaf, so that nothing is propagated below it;
        a copy of a view, for a hook on a view is lost when the model changes it in place (Longformer its queries).
    """
    if not output.requires_grad:
        return output.detach().requires_grad_().clone()
    return output.clone() if output._is_view() else output


def leaves_of(output: Tensor) -> list[Tensor]:
    """Find where a backward pass may end.

    Args:
        output: Where it starts.

    Returns:
        Every leaf of the graph: those that `hooked` made, and embeddings that require gradients for a reason of the
            user's (gradient checkpointing).
    """
    nodes: list[Any] = [output.grad_fn]
    leaves, seen = [], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), torch.Tensor):
            leaves.append(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return leaves


@contextmanager
def named_outputs(model: nn.Module) -> Iterator[None]:
    """Let a model give objects with names for the time of a context, whatever its configurations say.

    Args:
        model: transformers model, which may be set to give tuples, as for TorchScript.

    Yields:
        Nothing.
    """
    wanted = {"return_dict": True, "torchscript": False}
    configs = {id(config): config for config in (getattr(module, "config", None) for module in model.modules())}
    changed = [
        (config, name, getattr(config, name))
        for config in configs.values()
        for name, value in wanted.items()
        if getattr(config, name, value) is not value
    ]
    try:
        for config, name, _ in changed:
            setattr(config, name, wanted[name])
        yield
    finally:
        for config, name, before in changed:
            setattr(config, name, before)
