"""Placement: peft puts the user's configuration onto a model, and its sites are read off.

Nothing here computes a gradient; `read_adapters` turns a peft model into the plain tensors that the tangent
pass works on.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from foretune.errors import PlacementError, border
from foretune.models.adapted import AdaptedModel
from foretune.models.closed_forms import read_closed_forms
from foretune.models.dispatched import bring_adapters, check_head_here
from foretune.models.groups import base_of, read_groups
from foretune.models.head_parts import head_parts, in_head, modules_to_save, trained_head, with_head
from foretune.models.linear_modules import beside_experts, fused_experts, linear_in_head
from foretune.models.lora import RANDOM_INITS, draw_a, draw_rows, lora_layers
from foretune.models.output_layer import CLASSIFIER, output_layer, task_type
from foretune.models.packed import copied
from foretune.models.reading import switched_off
from foretune.models.refusals import check_config, check_layers_exist, refused
from foretune.models.sites import split_name
from foretune.models.tuner import check_layers, is_plain_kind, tuner_layers
from foretune.settings.groups import AdapterConfig


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
            check_layers_exist(model, layers)
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
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise PlacementError("the model carries adapters already: give the model without them")
    return tuple(name for name, _ in tuner_layers(place(base, config, seed=0)))


def place(model: nn.Module, config: PeftConfig, *, seed: int, inplace: bool = False) -> PeftModel:
    """Put adapters on a model with peft, each random A of LoRA seeded by the seed and its module's name alone.

    So a module has the same A in every placement that holds it, and kernels of placements add exactly. What other
    methods draw at random hangs on the seed, and on the order in which peft draws it.

    Args:
        model: A transformers classifier or language model without adapters.
        config: peft's configuration of any method; not changed.
        seed: Seed of what is drawn at random.
        inplace: Whether peft may put the adapters into `model` itself instead of a copy.

    Returns:
        The peft model, in eval mode.

    Raises:
        PlacementError: If the configuration does not fit the model.
    """
    check_config(model, config)
    config = with_head(model, config)
    if config.task_type == CLASSIFIER:
        check_head_here(model, head_parts(model))
    if not inplace:
        model = copied(model)
    with warnings.catch_warnings(), torch.random.fork_rng():
        # peft sets fan_in_fan_out right by itself, and asks transformers 5 for a property that it deprecates
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        warnings.filterwarnings("ignore", message=".*merging LoRA weights.*")
        if not is_plain_kind(config):  # on merging, and on how an adapter is saved
            warnings.filterwarnings("ignore", module=r"peft\.")
        torch.manual_seed(seed)
        with border(PlacementError, refused(model, config)):
            placed = get_peft_model(model, config)
        _check_output(placed)
        bring_adapters(placed, str(placed.active_adapter))
        for name, parameter in placed.named_parameters():
            if ".ranknum." in name:  # a number of AdaLoRA's, which peft means to freeze and on a GPU does not
                parameter.requires_grad_(False)
        if is_plain_kind(config) and config.init_lora_weights in RANDOM_INITS:
            for name, layer in lora_layers(placed, str(placed.active_adapter)):
                draw_a(layer, str(placed.active_adapter), config.init_lora_weights, seed, name, draw=0)
    placed.eval()
    return placed


def _check_output(placed: PeftModel) -> None:
    last = output_layer(placed.get_base_model())
    if any(name == last for name, _ in tuner_layers(placed)):
        raise PlacementError(
            f"the target modules take in {last!r}, which gives the logits of the next token: leave it out"
        )


def head_modules(model: PeftModel) -> Mapping[str, nn.Linear]:
    """Find the linear modules of the classifier head, trained or not.

    Args:
        model: A peft model of a sequence classifier.

    Returns:
        Modules by name in the order of the model; the last one gives the logits.

    Raises:
        PlacementError: If there is none.
    """
    head, _ = trained_head(model, str(getattr(model, "active_adapter", "")))
    if not head:
        base = base_of(model)
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
    """Read what trains in a peft model: by closed forms where all of it has one (docs/methods.md), else as it is.

    Of LoRA the first A is the adapter's own, and further draws of A follow where it is random.

    Args:
        model: A peft model with one active adapter, or a plain model whose chosen layers train whole; left as it is.
        draws: Draws of A in all. Of another method than LoRA, and where B ≠ 0 or A is not random (PiSSA, OLoRA, a
            trained adapter, …), there is one, whatever is asked for.
        seed: Seed of the further draws.

    Returns:
        What the tangent pass needs.

    Raises:
        PlacementError: If it is no peft model, several adapters are active, or one is merged or disabled.
    """
    if not isinstance(model, PeftModel) and all(parameter.requires_grad for parameter in model.parameters()):
        raise PlacementError(
            "expected a peft model with an adapter: use peft.get_peft_model or foretune.place; for a full fine-tune of "
            "some layers, choose them with foretune.models.groups.train_only"
        )
    if not isinstance(model, PeftModel):
        return read_groups(model)
    adapter, config = model.active_adapter, model.active_peft_config
    if not isinstance(adapter, str):
        raise PlacementError(f"several adapters are active ({adapter}): activate one")
    check_layers(model, adapter)
    readings = read_closed_forms(model, adapter)
    if readings is None:
        return read_groups(model)
    random_a = all(reading.random_a or not reading.adapter.site.rank for reading in readings)
    draws = draws if random_a and any(reading.random_a for reading in readings) else 1
    adapters = tuple(
        replace(reading.adapter, rows=draw_rows(reading, adapter, config, draws, seed))
        if draws > 1 and reading.random_a
        else reading.adapter
        for reading in readings
    )
    idle = [reading.adapter.module for reading in readings if reading.idle]
    head, others = trained_head(model, adapter)
    return AdaptedModel(model, adapters, draws, {} if others else head, lambda: switched_off(idle))
