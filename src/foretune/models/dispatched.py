"""Models whose layers accelerate has spread over several devices, or keeps on the CPU or the disk until they run.

Its hooks bring weights and inputs together; what is offloaded stands in the model as parameters without numbers.
"""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from foretune.errors import PlacementError

_CPU = torch.device("cpu")


def is_dispatched(model: Any) -> bool:
    """Tell whether accelerate has placed the layers of a model, which must stay where they are.

    Args:
        model: transformers or peft model.

    Returns:
        Whether it has a map of devices.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(base, "hf_device_map", None) is not None


def inputs_device(model: nn.Module) -> torch.device:
    """Find where the inputs of a model go.

    Args:
        model: Any model.

    Returns:
        Device of its first parameter that has numbers; the CPU where all are offloaded.
    """
    return next((parameter.device for parameter in model.parameters() if not parameter.is_meta), _CPU)


def check_head_here(model: nn.Module, parts: tuple[str, ...]) -> None:
    """Refuse a head that is offloaded: it trains, and its numbers are read.

    Args:
        model: transformers classifier without adapters.
        parts: Module paths of its head.

    Raises:
        PlacementError: Naming the part, and what to do.
    """
    for part in parts:
        if any(parameter.is_meta for parameter in model.get_submodule(part).parameters()):
            raise PlacementError(
                f"the head {part!r} is offloaded, and it trains: load the model with a device_map that keeps {part!r} "
                "on a device"
            )


def bring_adapters(model: nn.Module, adapter: str) -> None:
    """Give adapters beside offloaded weights numbers of their own, on the device that their module runs on.

    peft makes them where the weight is, which is nowhere; A is empty afterwards and has to be drawn, B is 0.

    Args:
        model: peft model; changed in place.
        adapter: Name of its adapter.

    Raises:
        PlacementError: If it is another method than LoRA, and beside offloaded weights.
    """
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.lora_A:
            continue
        device = _runs_on(layer.get_base_layer())
        for matrix in (layer.lora_A[adapter], layer.lora_B[adapter]):
            if isinstance(matrix, nn.Linear) and matrix.weight.is_meta:
                nn.init.zeros_(matrix.to_empty(device=device).weight)
    lost = next((name for name, p in model.named_parameters() if p.requires_grad and p.is_meta), None)
    if lost is not None:
        raise PlacementError(
            f"parameter {lost!r} lies beside weights that are offloaded, where only plain LoRA is placed: load the "
            "model with a device_map that keeps its modules on a device"
        )


def _runs_on(module: Any) -> torch.device:
    hook = getattr(module, "_hf_hook", None)
    for one in (hook, *getattr(hook, "hooks", ())):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return _CPU
