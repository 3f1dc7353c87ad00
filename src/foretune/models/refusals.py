"""Configurations that cannot fit a model, refused before peft is asked, with the names that exist."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from peft import LoraConfig, PeftConfig, PeftType
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from foretune.errors import PlacementError, few
from foretune.models.head_parts import head_parts, in_head
from foretune.models.linear_modules import linear_names
from foretune.models.lora import RANDOM_INITS
from foretune.models.output_layer import CLASSIFIER, output_layer, task_type
from foretune.models.packed import is_packed
from foretune.models.sites import split_name
from foretune.models.tuner import is_plain_kind, method_name

_TABLES = (nn.Embedding, nn.Conv1d, nn.Conv2d)  # LoRA knows them beside linear modules


def check_config(model: nn.Module, config: PeftConfig) -> None:
    """Refuse a configuration that cannot fit, with the names that exist.

    Args:
        model: The model it is meant for.
        config: peft's configuration.

    Raises:
        PlacementError: If a rank is below 1, a target module or layer matches nothing, or the task is another.
    """
    if output_layer(model) is not None:
        _check_language(model, config)
    wanted = getattr(config, "layers_to_transform", None)
    check_layers_exist(model, [wanted] if isinstance(wanted, int) else wanted or [])
    if is_plain_kind(config):
        _check_lora(model, config)
        return
    targets = getattr(config, "target_modules", None)
    if targets is not None and not isinstance(targets, str):
        # a name may mean a part that is no module, such as a list of layers: any end of a path will do
        _check_targets(targets, [name for name, _ in model.named_modules() if name], _kinds(linear_names(model)))


def _check_lora(model: nn.Module, config: LoraConfig) -> None:
    if config.r < 1 or any(rank < 1 for rank in (config.rank_pattern or {}).values()):
        raise PlacementError(f"rank r = {config.r}, pattern {config.rank_pattern}: every rank must be at least 1")
    if config.init_lora_weights not in RANDOM_INITS and any(p.is_meta or is_packed(p) for p in model.parameters()):
        raise PlacementError(
            f"init_lora_weights={config.init_lora_weights!r} needs the weights at hand, and some are quantised or "
            "offloaded: use True or 'gaussian'"
        )
    names = linear_names(model)
    if not names:
        raise PlacementError(f"{type(model).__name__} has no linear modules beside its head: LoRA has none to adapt")
    targets, kinds = config.target_modules, _kinds(names)
    family = str(getattr(getattr(model, "config", None), "model_type", ""))
    if targets is None and config.target_parameters:
        return
    if targets is None and family not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        raise PlacementError(
            f"peft has no default modules for {family or type(model).__name__!r}: name some with --target-modules "
            f"(target_modules), or all-linear; the model has {', '.join(kinds)}"
        )
    if isinstance(targets, str) or targets is None:
        return  # a regular expression, 'all-linear' or peft's own default: peft resolves it
    parts = head_parts(model)
    tables = [
        name for name, module in model.named_modules() if isinstance(module, _TABLES) and not in_head(name, parts)
    ]
    _check_targets(targets, [*names, *tables], kinds)


def _kinds(names: Iterable[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def _check_targets(targets: Iterable[str], names: Sequence[str], kinds: Sequence[str]) -> None:
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            near = get_close_matches(target, kinds, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise PlacementError(f"target module {target!r} matches nothing{hint}: the model has {', '.join(kinds)}")


def _check_language(model: nn.Module, config: PeftConfig) -> None:
    own = task_type(model)
    if config.task_type not in (None, own):
        other = "classifiers" if config.task_type == CLASSIFIER else "another kind of model"
        what = "a language model" if other == "classifiers" else f"one of {own}"
        raise PlacementError(
            f"task_type={str(config.task_type)!r} is for {other}, {type(model).__name__} is {what}: use {own!r}"
        )
    saved = getattr(config, "modules_to_save", None)
    if saved:
        raise PlacementError(
            f"modules_to_save names {few(sorted(saved))}: of a language model the adapter alone trains, leave it out"
        )


def check_layers_exist(model: nn.Module, wanted: Sequence[int]) -> None:
    """Refuse numbers of layers that the model lacks.

    Args:
        model: transformers model.
        wanted: Numbers.

    Raises:
        PlacementError: Naming the first one.
    """
    layers = sorted({layer for layer, _ in map(split_name, linear_names(model)) if layer is not None})
    for layer in wanted:
        if layer not in layers:
            raise PlacementError(
                f"layer {layer} is out of range: the model has {len(layers)} layers"
                + (f", {layers[0]} to {layers[-1]}" if layers else "")
            )


def refused(model: nn.Module, config: PeftConfig) -> str:
    """Begin the sentence on what peft refuses.

    Args:
        model: The model that it is meant for.
        config: peft's configuration.

    Returns:
        Method and model.
    """
    return f"peft refuses the configuration of {method_name(config)} on {type(model).__name__}"


def check_loss(model: nn.Module) -> None:
    """Refuse an adapter that trains on another loss than that of the texts.

    Args:
        model: A peft model, or any.

    Raises:
        PlacementError: Naming the method.
    """
    if getattr(getattr(model, "active_peft_config", None), "peft_type", None) == PeftType.CPT:
        raise PlacementError(
            "CPT trains on a loss of its own, in which the tokens of its context count: the kernel of the texts' loss "
            "would not be its own, use prompt tuning"
        )
