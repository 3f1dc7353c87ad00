"""Adapters that were trained elsewhere, put into a placed model for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from foretune.errors import PlacementError


@contextmanager
def plugged_in(model: PeftModel, weights: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Let a placed model run with other adapters: the change of each module's weight is `scaled_b @ a`.

    Args:
        model: A peft model with one active LoRA adapter; it is as it was afterwards.
        weights: By name of the adapted module A, r × d_in, and s B, d_out × r, the scaling s multiplied in; r at most
            that of the model's own adapter. Modules that are not named change nothing.

    Yields:
        Nothing.

    Raises:
        PlacementError: If a module carries no adapter, or one of a lower rank.
    """
    adapter = str(model.active_adapter)
    layers = {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }
    unknown = next((name for name in weights if name not in layers), None)
    if unknown is not None:
        raise PlacementError(f"module {unknown!r} carries no adapter: place the model on it")
    before = {}
    try:
        for name, layer in layers.items():
            of_a, of_b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            before[name] = (of_a.detach().clone(), of_b.detach().clone())
            with torch.no_grad():
                of_b.zero_()
                if name in weights:
                    a, scaled_b = weights[name]
                    if len(a) > len(of_a):
                        raise PlacementError(f"module {name!r} has an adapter of rank {len(of_a)}, not {len(a)}")
                    of_a[: len(a)] = a
                    of_b[:, : len(a)] = scaled_b / layer.scaling[adapter]
        yield
    finally:
        with torch.no_grad():
            for name, (of_a, of_b) in before.items():
                layers[name].lora_A[adapter].weight.copy_(of_a)
                layers[name].lora_B[adapter].weight.copy_(of_b)
