"""The layers of LoRA and of DoRA at its start, and the draws of their A.

LoRA has y = W h + b + s·B A h. DoRA has y = (m / ‖W + s·B A‖) ⊙ (W h + s·B A h) + b, the norm taken of each row and, as
peft codes it, without a gradient. At its start B = 0 and m = ‖W‖, so that

    ∂z/∂B = s Σ_t g_t (A h_t)ᵀ, as of LoRA        ∂z/∂m = Σ_t g_t ⊙ (y_t − b) / m
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from foretune.models.adapted import Adapter, Vector
from foretune.models.reading import Reading
from foretune.models.sites import Site, split_name
from foretune.models.tuner import tuner_layers

RANDOM_INITS = (True, "gaussian")  # B = 0 and A drawn at random: peft can draw A again
_DORA = "DoraLinearVariant"
_OF_PARTS = ("MultiheadAttention", "ParamWrapper")  # have A and B of what is not their own input and output
_NORM_ROUNDING = 1e-6  # relative: a norm kept in float32, and a model in float64


def lora_layers(model: nn.Module, adapter: str) -> list[tuple[str, LoraLayer]]:
    """List the layers that have linear A and B, and no variant beside DoRA.

    Args:
        model: A peft model.
        adapter: Name of its adapter.

    Returns:
        Names in the base model, and layers.
    """
    return [(name, layer) for name, layer in tuner_layers(model) if _has_a(layer, adapter)]


def _has_a(layer: nn.Module, adapter: str) -> bool:
    if not isinstance(layer, LoraLayer) or type(layer).__name__ in _OF_PARTS or adapter not in layer.lora_A:
        return False
    plain = isinstance(layer.lora_A[adapter], nn.Linear) and isinstance(layer.lora_B[adapter], nn.Linear)
    return plain and (adapter not in layer.lora_variant or _is_dora(layer, adapter))


def _is_dora(layer: LoraLayer, adapter: str) -> bool:
    return adapter in layer.lora_variant and type(layer.lora_variant[adapter]).__name__ == _DORA


def draw_a(layer: LoraLayer, adapter: str, init: Any, seed: int, name: str, *, draw: int) -> None:
    """Let peft draw A, seeded by the seed, the draw and the module's name alone; B becomes 0.

    Args:
        layer: peft's layer.
        adapter: Name of the adapter.
        init: peft's name of the initialisation.
        seed: Seed.
        name: Of the module.
        draw: Number of the draw, 0 of the adapter's own.
    """
    digest = hashlib.sha256(f"{seed}/{draw}/{name}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))
    a = layer.lora_A[adapter]
    device = a.weight.device
    a.to("cpu")  # the same A on every device
    layer.reset_lora_parameters(adapter, init)
    a.to(device)


def draw_rows(reading: Reading, adapter: str, config: LoraConfig, draws: int, seed: int) -> Tensor:
    """Let peft draw A again and again; the adapter's own A stays the first and stays in place.

    Args:
        reading: A module whose A is random.
        adapter: Name of the adapter.
        config: peft's configuration.
        draws: Draws in all.
        seed: Seed.

    Returns:
        (draws · r) × d_in rows, draw-major.
    """
    layer: Any = reading.adapter.module
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    own_a = a.detach().clone()
    rows = [own_a]
    with torch.random.fork_rng(), torch.no_grad():
        try:
            for draw in range(1, draws):
                draw_a(layer, adapter, config.init_lora_weights, seed, reading.adapter.site.name, draw=draw)
                rows.append(a.detach().clone())
        finally:
            a.copy_(own_a)
            b.zero_()
    return torch.cat(rows)


def read_lora(name: str, layer: LoraLayer, adapter: str, config: LoraConfig) -> Reading | None:
    """Read a layer of LoRA, or of DoRA at its start.

    Args:
        name: Of the module.
        layer: peft's layer.
        adapter: Name of the adapter.
        config: peft's configuration.

    Returns:
        Its formula; None where there is none.
    """
    if not _has_a(layer, adapter):
        return None
    init = config.init_lora_weights
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    new = not bool(b.detach().any())
    vectors: list[Vector] = []
    parameters = []
    if _is_dora(layer, adapter):
        magnitude = layer.lora_magnitude_vector[adapter].weight
        if not new or not _at_norm(layer, adapter):
            return None
        vectors.append(Vector("lora_magnitude_vector", len(magnitude), factor=_over(magnitude, layer)))
        parameters.append(magnitude)
    bias = layer.lora_B[adapter].bias
    if bias is not None:
        vectors.append(Vector("lora_B.bias", len(bias), project=_scaled(float(layer.scaling[adapter]))))
        parameters.append(bias)
    site = _site(name, layer, adapter, init, others=sum(vector.numbers for vector in vectors))
    kept = None if new else b.detach()
    zero = new and (bias is None or not bool(bias.detach().any()))
    return Reading(
        Adapter(site, layer, a.detach(), kept, tuple(vectors)),
        trained=(b, *parameters, *(() if new else (a,))),
        still=(a,) if new else (),
        idle=zero,
        random_a=zero and init in RANDOM_INITS,
        plus_bias=True,
    )


def _site(name: str, layer: LoraLayer, adapter: str, init: Any, others: int) -> Site:
    number, kind = split_name(name)
    exponent = (1.0 if layer.use_rslora[adapter] else 2.0) + (2.0 if init == "gaussian" else 0.0)
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return Site(
        name=name,
        layer=number,
        kind=kind,
        d_in=int(a.shape[1]),
        d_out=int(b.shape[0]),
        rank=int(a.shape[0]),
        scaling=float(layer.scaling[adapter]),
        rank_exponent=exponent,
        others=others,
    )


def _at_norm(layer: LoraLayer, adapter: str) -> bool:
    """Whether the magnitudes are the norms of the rows of W, as at the start, and none of them is 0."""
    dora = layer.lora_magnitude_vector[adapter]
    weight = dequantize_module_weight(layer.get_base_layer()).detach()
    norm = dora.get_weight_norm(weight, torch.zeros((), dtype=weight.dtype, device=weight.device), 1.0)
    rounding = max(_NORM_ROUNDING, 4.0 * torch.finfo(weight.dtype).eps)
    near = torch.allclose(dora.weight.detach().double(), norm.double(), rtol=rounding, atol=0.0)
    return near and bool((norm != 0).all())


def _over(magnitude: nn.Parameter, layer: LoraLayer) -> Callable[[Tensor, Tensor], Tensor]:
    bias = getattr(layer.get_base_layer(), "bias", None)

    def factor(_: Tensor, y: Tensor) -> Tensor:
        return (y if bias is None else y - bias.detach()) / magnitude.detach()

    return factor


def _scaled(scaling: float) -> Callable[[Tensor], Tensor]:
    return lambda g: g * scaling
