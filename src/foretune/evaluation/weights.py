"""PLoP and KappaTune: scores of single modules, from forward passes or from the weights alone.

Both papers adapt the modules (PLoP: the kinds of modules, each by its mean over layers) with the lowest scores.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from foretune.errors import ConfigError


def plop_scores(
    adapted_modules: Mapping[str, nn.Module],
    forward: Callable[[], object],
    *,
    kept: Callable[[], Tensor | None] = lambda: None,
) -> dict[str, float]:
    """PLoP's normalised feature norm: how much longer a module's outputs are than those of random inputs.

    Mean over the inputs x_t ≠ 0 of ‖W x_t‖/(‖x_t‖ ‖W‖_F/√p) with p inputs. The denominator is √(E‖W x̃‖²) for x̃
    Gaussian of the norm of x_t, exactly, so nothing is drawn; the authors' E‖W x̃‖ is smaller by a relative
    Var‖W x̃‖/(2 E‖W x̃‖²) or so, a fraction of a percent for wide full-rank weights and at most 1 − √(2/π) = 20% for
    rank 1. Above 1 a module is aligned with its inputs, and counts as having learnt the task: the lowest scores mark
    where to adapt (the authors' control PLoP⁻¹ takes the highest, and does worse).

    Args:
        adapted_modules: Linear modules by name (peft's base layer, or transformers' Conv1D, will do). W x is read off
            as the module's output less its bias.
        forward: Runs the model on the texts; what it returns is not looked at.
        kept: Asked in each pass for the mask of positions that count, the attention mask, texts first; it applies to
            modules with as many input vectors as it has entries (also if these have the positions first), of others
            all count. Where there is none, padding counts too.

    Returns:
        Score by name; NaN for a module whose weights or inputs are all 0.

    Raises:
        ConfigError: If `forward` did not call a module.

    References:
        Hayou, Ghosh and Yu 2025, arXiv 2506.20629.
    """
    sums: dict[str, tuple[float, int]] = {}

    def record(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach().flatten(0, -2)
        bias = getattr(module, "bias", None)
        y = (output.detach() if bias is None else output.detach() - bias.detach()).flatten(0, -2)
        counted = _counted(inputs[0].shape[:-1], kept())
        if counted is not None:
            x, y = x[counted.to(x.device)], y[counted.to(y.device)]
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
        nonzero = norms > 0
        ratios = torch.linalg.vector_norm(y, dim=1, dtype=torch.float64)[nonzero] / norms[nonzero]
        total, count = sums.get(name, (0.0, 0))
        weight_norm = float(torch.linalg.vector_norm(_weight(module), dtype=torch.float64))
        unit = x.shape[1] ** 0.5 / weight_norm if weight_norm > 0 else float("nan")
        sums[name] = (total + unit * float(ratios.sum()), count + int(nonzero.sum()))

    handles = [module.register_forward_hook(partial(record, name)) for name, module in adapted_modules.items()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in adapted_modules if name not in sums]
    if missing:
        raise ConfigError(f"module {missing[0]!r} was not called in the forward passes: leave it out")
    return {name: sums[name][0] / sums[name][1] if sums[name][1] else float("nan") for name in adapted_modules}


def _counted(positions: torch.Size, mask: Tensor | None) -> Tensor | None:
    """Which input vectors of a module count, in their order; None for all, as where the mask is of other positions."""
    if mask is None or mask.numel() != positions.numel():
        return None
    swapped = positions == mask.T.shape != mask.shape
    return (mask.T if swapped else mask).flatten().bool()


def kappa_tune_scores(modules: Mapping[str, nn.Module]) -> dict[str, float]:
    """KappaTune's condition number σ_max/(σ_min + 1e-8) of the weights; the lowest mark where to adapt.

    As `peft.helpers.KappaTuneSelector` has it, which gives out an order of names only and computes in float32; here
    the singular values are float64.

    Args:
        modules: Linear modules by name, with weights that are not quantised.

    Returns:
        Condition number by name, at least 0 (all-zero weights).

    References:
        Ludwig 2025, arXiv 2506.16289.
    """
    scores = {}
    for name, module in modules.items():
        values = torch.linalg.svdvals(_weight(module).double())
        scores[name] = float(values[0] / (values[-1] + 1e-8))
    return scores


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()
