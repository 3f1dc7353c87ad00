"""What a pass over a model takes for granted, checked or made so."""

from collections.abc import Iterator
from contextlib import contextmanager

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


def check_logits(logits: Tensor, n: int, n_classes: int) -> None:
    """Refuse what is no sequence classifier.

    Args:
        logits: Outputs of the model.
        n: Examples.
        n_classes: Classes.

    Raises:
        KernelError: If the logits are not n × C.
    """
    if logits.ndim != 2 or logits.shape != (n, n_classes):
        raise KernelError(
            f"the model's logits have shape {tuple(logits.shape)}, expected {n} × {n_classes}: "
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
    why = f"the outputs do not depend on module {name!r}" if used else f"module {name!r} is not used in the forward pass"
    return f"{why}: leave it out"
