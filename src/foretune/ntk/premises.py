"""What a pass over a model takes for granted, checked or made so."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foretune.errors import KernelError
from foretune.models.adapted import AdaptedModel
from foretune.models.packed import is_packed


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


@contextmanager
def passing_gradients(model: nn.Module) -> Iterator[None]:
    """Refuse, for the time of a context, quantised modules that cut the way of the gradients to their inputs.

    Args:
        model: Any model.

    Yields:
        Nothing.

    Raises:
        KernelError: Naming the module.
    """

    def check(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def after(_: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            gave = any(isinstance(part, Tensor) and part.requires_grad for part in args)
            if gave and torch.is_grad_enabled() and isinstance(result, Tensor) and not result.requires_grad:
                raise KernelError(
                    f"the quantised module {name!r} hands no gradient on to its inputs, and every kernel needs it: "
                    "quantise with another library or type"
                )

        return after

    handles = [
        module.register_forward_hook(check(name))
        for name, module in model.named_modules()
        if any(map(is_packed, module.parameters(recurse=False)))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def check_new_adapters(adapted: AdaptedModel) -> None:
    """Refuse what is not simulated: other adapters than plain LoRA, and those that have trained, with B ≠ 0.

    Args:
        adapted: Model with its adapters.

    Raises:
        KernelError: Naming the first module whose adapter is another, or has B ≠ 0.
    """
    remedy = "use foretune score for the kernel of this adapter, or foretune tune to run it"
    if adapted.groups:
        names = next(iter(adapted.groups)).parameters
        raise KernelError(f"forecasts simulate plain LoRA: parameter {next(iter(names), '')!r} is none of it, {remedy}")
    other = next((one for one in adapted.adapters if one.vectors or not one.site.rank), None)
    if other is not None:
        what = ", ".join(vector.name for vector in other.vectors)
        raise KernelError(f"forecasts simulate plain LoRA: module {other.site.name!r} trains {what}, {remedy}")
    trained = next((adapter.site.name for adapter in adapted.adapters if adapter.b is not None), None)
    if trained is not None:
        raise KernelError(f"the adapter of module {trained!r} has B ≠ 0: forecasts start from a new adapter")


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


def check_finite(what: str, tensor: Tensor) -> None:
    """Refuse numbers that nothing can be made of.

    Args:
        what: What they are, for the message.
        tensor: Numbers.

    Raises:
        KernelError: If one of them is not finite.
    """
    # one pass: what is not finite stays so in a sum; a sum may also overflow by itself, and then each is looked at
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    if not bool(torch.isfinite(total)) and not bool(torch.isfinite(tensor).all()):
        raise KernelError(f"{what} are not finite: check its weights, or use dtype float32")


def sample_order(rows: Tensor, n: int) -> Tensor:
    """Find the order that brings the examples of batches into that of the sample.

    Args:
        rows: Positions of the examples, batch after batch.
        n: Number of examples in the sample.

    Returns:
        For each position of the sample, the place of its example among `rows`.

    Raises:
        KernelError: If there are none, or the positions are not 0 … n-1, once each.
    """
    if not len(rows):
        raise KernelError("no examples to take the kernel of")
    if len(rows) != n or not torch.equal(torch.sort(rows).values, torch.arange(n, device=rows.device)):
        raise KernelError(f"the batches must hold every position 0 … {n - 1} exactly once")
    return torch.argsort(rows)


def on_gradient(output: Tensor, receive: Callable[[Tensor], None]) -> Tensor:
    """Have the gradient of a module's output handed out, whatever the model does to the output in place.

    Args:
        output: Output of an adapted module.
        receive: Called with its gradient in every backward pass that reaches it.

    Returns:
        The output; where nothing below it is adapted, a copy above a new leaf, so that nothing is propagated below it.
    """
    if not output.requires_grad:
        output = output.detach().requires_grad_().clone()
    base = output._base if output._is_view() else None
    if base is None:
        output.register_hook(receive)  # that of the tensor as it is now
        return output
    # a hook on a view is lost when the model changes it in place (Longformer its queries), one on its base is not
    node, shape = base.grad_fn, output.shape
    if node is not None and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous():
        node.register_prehook(lambda gradients: receive(gradients[0].reshape(shape)))
        return output
    output = output.clone()
    output.register_hook(receive)
    return output


def leaves_of(output: Tensor) -> list[Tensor]:
    """Find where a backward pass may end.

    Args:
        output: Where it starts.

    Returns:
        Every leaf of the graph: those that `on_gradient` made, and embeddings that require gradients for a reason of
            the user's (gradient checkpointing).
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
