"""Placement: peft puts the user's LoRA configuration onto a model, and its sites are read off.

Nothing here computes a gradient; `read_adapters` turns a peft model into the plain tensors that the tangent
pass works on.
"""

import copy
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from foretune.errors import PlacementError, few, reason
from foretune.models.adapted import AdaptedModel, Adapter
from foretune.models.head_parts import PEFT_BASE, head_parts, in_head, modules_to_save, trained_head, with_head
from foretune.models.linear_modules import beside_experts, fused_experts, linear_in_head, linear_names
from foretune.models.output_layer import CLASSIFIER, output_layer, task_type
from foretune.models.sites import Site, split_name
from foretune.settings.groups import AdapterConfig

_RANDOM_INITS = (True, "gaussian")  # B = 0 and A drawn at random: peft can draw A again


def lora_config(model: nn.Module, adapter: AdapterConfig) -> LoraConfig:
    """Translate the command's settings into peft's configuration for the kind of the model.

    Args:
        model: The model it is meant for: a sequence classifier, or a language model, where no modules mean all linear
            ones.
        adapter: Settings.

    Returns:
        peft's configuration.
    """
    task = task_type(model)
    adapter = adapter if task == CLASSIFIER else for_language(adapter)
    targets: list[str] | str | None = None if adapter.target_modules is None else list(adapter.target_modules)
    layers = None if adapter.layers is None else list(adapter.layers)
    excluded: list[str] | str = []
    if targets == ["all-linear"]:
        targets = "all-linear"
        excluded = linear_in_head(model) if task == CLASSIFIER else []  # the output layer peft leaves out by itself
        names = beside_experts(model)
        if layers is not None:  # peft takes the shorthand for all layers only
            _check_layers(model, layers)
            targets, layers = [name for name in names if split_name(name)[0] in layers], None
        elif fused_experts(model):
            targets = list(names)
    return LoraConfig(
        task_type=task,
        target_modules=targets,
        exclude_modules=excluded or None,  # the shorthand takes in DistilBERT's pre_classifier, which trains whole
        layers_to_transform=layers,
        modules_to_save=modules_to_save(model) if task == CLASSIFIER else None,
        r=adapter.r,
        lora_alpha=adapter.alpha,  # peft says int and computes with floats
        use_rslora=adapter.rslora,
        init_lora_weights=True if adapter.init == "default" else adapter.init,
    )


def for_language(adapter: AdapterConfig) -> AdapterConfig:
    """Give settings the modules that a language model's adapter has by default.

    Args:
        adapter: Settings.

    Returns:
        The same, with `all-linear` where they name no modules.
    """
    return replace(adapter, target_modules=("all-linear",)) if adapter.target_modules is None else adapter


def adapted_names(model: nn.Module, config: LoraConfig) -> tuple[str, ...]:
    """List the modules that a configuration adapts, by trying it on a copy.

    Args:
        model: A transformers classifier, with adapters or without; not changed.
        config: peft's configuration.

    Returns:
        Module paths in the order of the model.

    Raises:
        PlacementError: If the configuration does not fit the model, or the model carries adapters.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if any(isinstance(module, LoraLayer) for module in base.modules()):
        raise PlacementError("the model carries adapters already: give the model without them")
    return tuple(name for name, _ in _lora_layers(place(base, config, seed=0)))


def check_config(model: nn.Module, config: LoraConfig) -> None:
    """Refuse a configuration that cannot fit, with the names that exist.

    Args:
        model: The model it is meant for.
        config: peft's configuration.

    Raises:
        PlacementError: If the rank is below 1, a target module or layer matches nothing, or a variant of
            LoRA is asked for whose tangent features are not those of plain LoRA.
    """
    if config.r < 1 or any(rank < 1 for rank in (config.rank_pattern or {}).values()):
        raise PlacementError(f"rank r = {config.r}, pattern {config.rank_pattern}: every rank must be at least 1")
    if output_layer(model) is not None:
        _check_language(model, config)
    for option in ("use_dora", "lora_bias", "target_parameters", "trainable_token_indices"):
        if getattr(config, option, None):
            raise PlacementError(f"LoRA option {option}={getattr(config, option)!r} is not supported: leave it out")
    if config.bias != "none":
        raise PlacementError(f"bias={config.bias!r} trains biases beside the adapter: use bias='none'")
    names = linear_names(model)
    wanted = config.layers_to_transform
    _check_layers(model, [wanted] if isinstance(wanted, int) else wanted or [])
    if not names:
        raise PlacementError(f"{type(model).__name__} has no linear modules beside its head: LoRA has none to adapt")
    targets = config.target_modules
    kinds = sorted({name.rsplit(".", 1)[-1] for name in names})
    family = str(getattr(getattr(model, "config", None), "model_type", ""))
    if targets is None and family not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        raise PlacementError(
            f"peft has no default modules for {family or type(model).__name__!r}: name some with --target-modules "
            f"(target_modules), or all-linear; the model has {', '.join(kinds)}"
        )
    if isinstance(targets, str) or targets is None:
        return  # a regular expression, 'all-linear' or peft's own default: peft resolves it
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            near = get_close_matches(target, kinds, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise PlacementError(f"target module {target!r} matches nothing{hint}: the model has {', '.join(kinds)}")


def _check_language(model: nn.Module, config: LoraConfig) -> None:
    own = task_type(model)
    if config.task_type not in (None, own):
        other = "classifiers" if config.task_type == CLASSIFIER else "another kind of model"
        what = "a language model" if other == "classifiers" else f"one of {own}"
        raise PlacementError(
            f"task_type={str(config.task_type)!r} is for {other}, {type(model).__name__} is {what}: use {own!r}"
        )
    if config.modules_to_save:
        raise PlacementError(
            f"modules_to_save names {few(sorted(config.modules_to_save))}: of a language model the adapter "
            "alone trains, leave it out"
        )


def _check_layers(model: nn.Module, wanted: Sequence[int]) -> None:
    layers = sorted({layer for layer, _ in map(split_name, linear_names(model)) if layer is not None})
    for layer in wanted:
        if layer not in layers:
            raise PlacementError(
                f"layer {layer} is out of range: the model has {len(layers)} layers"
                + (f", {layers[0]} to {layers[-1]}" if layers else "")
            )


def place(model: nn.Module, config: LoraConfig, *, seed: int, inplace: bool = False) -> PeftModel:
    """Put adapters on a model with peft, each random A seeded by the seed and its module's name alone.

    So a module has the same A in every placement that holds it, and kernels of placements add exactly.

    Args:
        model: A transformers classifier without adapters.
        config: peft's configuration; not changed.
        seed: Seed of the random A.
        inplace: Whether peft may put the adapters into `model` itself instead of a copy.

    Returns:
        The peft model, in eval mode.

    Raises:
        PlacementError: If the configuration does not fit the model.
    """
    check_config(model, config)
    config = with_head(model, config)
    if not inplace:
        model = copy.deepcopy(model)
    with warnings.catch_warnings(), torch.random.fork_rng():
        # peft sets fan_in_fan_out right by itself, and asks transformers 5 for a property that it deprecates
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        torch.manual_seed(seed)
        try:
            placed = get_peft_model(model, config)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise PlacementError(f"peft refuses the configuration: {reason(error)}") from error
        _check_output(placed)
        if config.init_lora_weights in _RANDOM_INITS:
            for name, layer in _lora_layers(placed):
                _reset(layer, placed.active_adapter, config.init_lora_weights, seed, name, draw=0)
    placed.eval()
    return placed


def _check_output(placed: PeftModel) -> None:
    last = output_layer(placed.get_base_model())
    if any(name == last for name, _ in _lora_layers(placed)):
        raise PlacementError(
            f"the target modules take in {last!r}, which gives the logits of the next token: leave it out"
        )


def _lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    return [
        (name.removeprefix(PEFT_BASE), module)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]


def _reset(layer: LoraLayer, adapter: str, init: Any, seed: int, name: str, *, draw: int) -> None:
    digest = hashlib.sha256(f"{seed}/{draw}/{name}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "big"))
    a = layer.lora_A[adapter]
    device = a.weight.device
    a.to("cpu")  # the same A on every device
    layer.reset_lora_parameters(adapter, init)
    a.to(device)


def _draw_rows(layer: LoraLayer, adapter: str, init: Any, name: str, draws: int, seed: int) -> Tensor:
    """Let peft draw A again and again; the adapter's own A stays the first and stays in place."""
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    own_a = a.detach().clone()
    rows = [own_a]
    with torch.random.fork_rng(), torch.no_grad():
        try:
            for draw in range(1, draws):
                _reset(layer, adapter, init, seed, name, draw=draw)
                rows.append(a.detach().clone())
        finally:
            a.copy_(own_a)
            b.zero_()
    return torch.cat(rows)


def _site(name: str, layer: LoraLayer, adapter: str, init: Any) -> Site:
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
    )


def _check_layer(name: str, layer: LoraLayer, adapter: str) -> None:
    kind = type(layer).__name__
    if not (adapter in layer.lora_A and isinstance(layer.lora_A[adapter], nn.Linear)):
        raise PlacementError(f"module {name!r} carries LoRA of kind {kind}: only linear modules are supported")
    if kind == "MultiheadAttention" or adapter in layer.lora_variant or layer.lora_bias[adapter]:
        raise PlacementError(f"module {name!r} carries a variant of LoRA ({kind}) that is not supported")
    if layer.merged or layer.disable_adapters:
        raise PlacementError(f"the adapter of module {name!r} is merged or disabled: unmerge and enable it")


def head_modules(model: PeftModel) -> Mapping[str, nn.Linear]:
    """Find the linear modules of the classifier head, trained or not.

    Args:
        model: A peft model of a sequence classifier.

    Returns:
        Modules by name in the order of the model; the last one gives the logits.

    Raises:
        PlacementError: If there is none.
    """
    head, _ = trained_head(model, str(model.active_adapter))
    if not head:
        base = model.get_base_model()
        parts = head_parts(base)
        head = {
            name: module
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and in_head(name, parts) and "original_module" not in name
        }
    if not head:
        raise PlacementError("the model has no linear classifier head: use the head policy 'random'")
    return head


def read_adapters(model: PeftModel, *, draws: int = 1, seed: int = 0) -> AdaptedModel:
    """Read the sites of a peft model: its own A first, then further draws of A where they are random.

    Args:
        model: A peft model with one active LoRA adapter; left as it is.
        draws: Draws of A in all. Where B ≠ 0 or A is not random (PiSSA, OLoRA, a trained adapter, …)
            there is one, whatever is asked for.
        seed: Seed of the further draws.

    Returns:
        What the tangent pass needs.

    Raises:
        PlacementError: If the adapters are not plain LoRA on linear modules, or other parameters train.
    """
    if not isinstance(model, PeftModel) or not isinstance(model.active_peft_config, LoraConfig):
        raise PlacementError("expected a peft model with a LoRA adapter: use peft.get_peft_model or foretune.place")
    adapter, config = model.active_adapter, model.active_peft_config
    if not isinstance(adapter, str):
        raise PlacementError(f"several adapters are active ({adapter}): activate one")
    layers = _lora_layers(model)
    if not layers:
        raise PlacementError("the model carries no adapter")
    for name, layer in layers:
        _check_layer(name, layer, adapter)
    _check_trained(model)
    own_b = [layer.lora_B[adapter].weight.detach() for _, layer in layers]
    zero_b = [not bool(b.any()) for b in own_b]
    random_a = all(zero_b) and config.init_lora_weights in _RANDOM_INITS
    draws = draws if random_a else 1
    init = config.init_lora_weights
    adapters = tuple(
        Adapter(
            site=_site(name, layer, adapter, init),
            module=layer,
            rows=_draw_rows(layer, adapter, init, name, draws, seed)
            if random_a
            else layer.lora_A[adapter].weight.detach(),
            b=None if zero else b,
        )
        for (name, layer), b, zero in zip(layers, own_b, zero_b, strict=True)
    )
    idle = [layer for (_, layer), zero in zip(layers, zero_b, strict=True) if zero]
    head, others = trained_head(model, adapter)
    return AdaptedModel(model, adapters, draws, {} if others else head, lambda: _switched_off(idle))


@contextmanager
def _switched_off(layers: Sequence[LoraLayer]) -> Iterator[None]:
    """Skip adapters with B = 0 in the forward pass: they add exact zeros."""
    flags = [[(p, p.requires_grad) for p in layer.parameters()] for layer in layers]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, of_layer in zip(layers, flags, strict=True):
            layer.enable_adapters(True)
            for parameter, flag in of_layer:
                parameter.requires_grad_(flag)


def is_base(name: str) -> bool:
    """Tell the parameters of the pretrained model from those of adapters and trained head.

    Args:
        name: Name of a parameter in a peft model.

    Returns:
        Whether the base model has it without peft.
    """
    return "lora_" not in name and "modules_to_save" not in name


def _check_trained(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and is_base(name):
            raise PlacementError(
                f"parameter {name.removeprefix(PEFT_BASE)!r} trains but belongs to neither adapter nor head: freeze it"
            )
