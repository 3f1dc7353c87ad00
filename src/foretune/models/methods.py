"""The closed forms of methods beside LoRA: what a module trains multiplies single numbers of every position.

As peft codes them, ⊙ for products number by number, with the gradients that follow, g_t = ∂z/∂y_t:

| method | y | gradients |
|---|---|---|
| (IA)³ | l ⊙ (W h + b) | ∂z/∂l = Σ g ⊙ y / l |
| (IA)³ of feed-forward modules | W (l ⊙ h) + b | ∂z/∂l = Σ (Wᵀ g) ⊙ h |
| LN tuning | γ ⊙ v(h) + u(h) [+ β] | ∂z/∂γ = Σ g ⊙ v(h), ∂z/∂β = Σ g |
| VeRA | W h + b + Λ_b ⊙ B (Λ_d ⊙ A h) | ∂z/∂Λ_b = Σ g ⊙ B (Λ_d ⊙ A h), ∂z/∂Λ_d = Σ (Bᵀ (Λ_b ⊙ g)) ⊙ A h |
| AdaLoRA | W h + b + s B (E ⊙ A h) | ∂z/∂E = s Σ (Bᵀ g) ⊙ A h, of A and B as of LoRA with E ⊙ A and B ⊙ Eᵀ |
| BEFT, biases | W h + b | ∂z/∂b = Σ g |

Only peft's own classes of these layers are read, and what they wrap must not be quantised where W itself is needed:
another class may compute something else.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from foretune.models.adapted import Adapter, Vector
from foretune.models.reading import Reading, vectors_alone
from foretune.models.sites import Site, split_name

_BIASED = (nn.Linear, Conv1D, nn.LayerNorm)


def read_layer(name: str, layer: BaseTunerLayer, adapter: str) -> Reading | None:
    """Read a layer of another method than LoRA.

    Args:
        name: Of the module.
        layer: peft's layer.
        adapter: Name of the adapter.

    Returns:
        Its formula; None where there is none.
    """
    read = _READERS.get(f"{type(layer).__module__}.{type(layer).__qualname__}")
    return None if read is None else read(name, layer, adapter)


def read_bias(name: str, module: nn.Module) -> Adapter | None:
    """Read the bias of a module that carries no adapter.

    Args:
        name: Of the module.
        module: Any module with a bias.

    Returns:
        Its formula; None where it is no module of which a bias is known to be added at the end.
    """
    if type(module) not in _BIASED:
        return None
    bias: Any = module.bias
    d_out = len(bias)
    d_in = int(module.in_features) if isinstance(module, nn.Linear) else d_out
    d_in = int(module.weight.shape[0]) if isinstance(module, Conv1D) else d_in
    return vectors_alone(name, module, [Vector("bias", d_out)], widths=(d_in, d_out), like=bias)


def _ia3(name: str, layer: Any, adapter: str) -> Reading | None:
    base, scales = layer.get_base_layer(), layer.ia3_l[adapter]
    if type(base) not in (nn.Linear, Conv1D):
        return None
    widths, own = (int(layer.in_features), int(layer.out_features)), scales.detach().flatten()
    if layer.is_feedforward:
        weight: Tensor = base.weight.T if isinstance(base, Conv1D) else base.weight

        def project(g: Tensor) -> Tensor:
            return g @ weight.detach().to(g.dtype)

        vector = Vector("ia3_l", widths[0], factor=lambda h, _: h, project=project)
    elif bool((own == 0).any()):
        return None
    else:
        vector = Vector("ia3_l", widths[1], factor=lambda _, y: y / own)
    return Reading(vectors_alone(name, layer, [vector], widths=widths, like=base.weight), (scales,))


def _norm(name: str, layer: Any, adapter: str) -> Reading | None:
    """A copy of a norm, or of any module that is linear in a weight of its width, as is tried on some numbers."""
    norm = layer.ln_tuning_layers[adapter]
    own = dict(norm.named_parameters())
    weight, bias = own.get("weight"), own.get("bias")
    if weight is None or weight.ndim != 1 or set(own) - {"weight", "bias"}:
        return None
    ones, zeros = torch.ones_like(weight), torch.zeros_like(weight)

    def run(h: Tensor, of_weight: Tensor, of_bias: Tensor) -> Tensor:
        given = {"weight": of_weight} if bias is None else {"weight": of_weight, "bias": of_bias}
        out: Tensor = functional_call(norm, given, (h,))
        return out

    def factor(h: Tensor, _: Tensor) -> Tensor:
        return run(h, ones, zeros) - run(h, zeros, zeros)

    if not _linear_in_weight(run, weight, biased=bias is not None):
        return None
    width = len(weight)
    vectors = [Vector("weight", width, factor=factor)]
    trained = [weight]
    if bias is not None:
        vectors.append(Vector("bias", width))
        trained.append(bias)
    return Reading(vectors_alone(name, layer, vectors, widths=(width, width), like=weight), tuple(trained))


def _linear_in_weight(run: Callable[..., Tensor], weight: Tensor, *, biased: bool) -> bool:
    """Whether y = weight ⊙ v(h) + u(h) + bias, tried in float32 at least, with numbers of no pattern."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    draws = torch.rand(6, len(weight), dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    draws = draws.to(weight.device, dtype)
    h, w, b = draws[None, :4], draws[4], draws[5]
    ones, zeros, near = torch.ones_like(w), torch.zeros_like(w), 64.0 * torch.finfo(dtype).eps
    with torch.no_grad():
        try:
            found, at_1, at_0 = run(h, w, b), run(h, ones, zeros), run(h, zeros, zeros)
            added = run(h, zeros, b) - at_0
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
    if found.shape != h.shape or (biased and not torch.allclose(added, b.expand_as(added), rtol=near)):
        return False
    return torch.allclose(found, w * (at_1 - at_0) + at_0 + added, rtol=near, atol=near)


def _vera(name: str, layer: Any, adapter: str) -> Reading | None:
    of_b, of_d = layer.vera_lambda_b[adapter], layer.vera_lambda_d[adapter]
    if layer.quantization_backend is not None:
        return None
    widths, rank = (int(layer.in_features), int(layer.out_features)), len(of_d)
    a = layer.vera_A[adapter][:, : widths[0]].detach().to(of_d)
    b = layer.vera_B[adapter][: widths[1]].detach().to(of_d)
    scale_b, scale_d = of_b.detach(), of_d.detach()
    vectors = [
        Vector("vera_lambda_b", widths[1], factor=lambda h, _: (h.to(a.dtype) @ a.T * scale_d) @ b.T),
        Vector(
            "vera_lambda_d",
            rank,
            factor=lambda h, _: h.to(a.dtype) @ a.T,
            project=lambda g: (g.to(b.dtype) * scale_b) @ b,
        ),
    ]
    idle = not bool(scale_b.any())
    adapted = vectors_alone(name, layer, vectors, widths=widths, like=of_d)
    return Reading(adapted, (of_b, of_d), idle=idle, plus_bias=True)


def _adalora(name: str, layer: Any, adapter: str) -> Reading | None:
    of_a, of_b, of_e = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_E[adapter]
    n_ranks = layer.ranknum[adapter]
    a, b, e = of_a.detach(), of_b.detach(), of_e.detach()
    rank = len(e)
    if not rank:
        return None
    scaling = float(layer.scaling[adapter]) / (float(n_ranks.detach()) + 1e-5)
    widths = (int(a.shape[1]), int(b.shape[0]))
    vector = Vector(
        "lora_E",
        rank,
        factor=lambda h, _: h.to(a.dtype) @ a.T,
        project=lambda g: g.to(b.dtype) @ b * scaling,
    )
    if not bool(e.any()):  # its start: neither A nor B has a gradient
        adapted = vectors_alone(name, layer, [vector], widths=widths, like=a, beside=a.numel() + b.numel())
        return Reading(adapted, (of_e,), still=(of_a, of_b, n_ranks), idle=True, plus_bias=True)
    number, kind = split_name(name)
    site = Site(name, number, kind, *widths, rank=rank, scaling=scaling, others=rank)
    return Reading(Adapter(site, layer, a * e, b * e.T, (vector,)), (of_a, of_b, of_e), plus_bias=True)


def _beft(name: str, layer: Any, adapter: str) -> Reading:
    bias = layer.beft_bias[adapter]
    widths = (int(layer.in_features), int(layer.out_features))
    vector = Vector("beft_bias", widths[1])
    return Reading(vectors_alone(name, layer, [vector], widths=widths, like=bias), (bias,), plus_bias=True)


_READERS: dict[str, Callable[[str, Any, str], Reading | None]] = {
    "peft.tuners.ia3.layer.Linear": _ia3,
    "peft.tuners.ln_tuning.layer.LNTuningLayer": _norm,
    "peft.tuners.vera.layer.Linear": _vera,
    "peft.tuners.adalora.layer.SVDLinear": _adalora,
    "peft.tuners.beft.layer.Linear": _beft,
}
