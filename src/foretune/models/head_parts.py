"""What a sequence classifier has on top of its pretrained base: the parts that train and are saved as a whole.

A checkpoint of the base does not hold these layers, so transformers draws them at random. What is random and is not
saved with the adapter is drawn again when the adapter is loaded, and the fine-tune is lost. peft trains and saves
modules named `classifier` or `score`; the others have to be named in `modules_to_save`.
"""

import copy
from collections.abc import Iterator

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn

from foretune.errors import PlacementError
from foretune.models.output_layer import output_layer
from foretune.models.packed import holds_packed, is_packed

PEFT_BASE = "base_model.model."  # where peft puts the model
_POOLER = "pooler"


def head_parts(model: nn.Module) -> tuple[str, ...]:
    """Find the parts that train whole: all beside the pretrained base, and a pooler in it that was never trained.

    Args:
        model: transformers sequence classifier without adapters.

    Returns:
        Module paths in the order of the model, none below another.

    Raises:
        PlacementError: If a parameter lies on the classifier itself, where peft cannot save it.
    """
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    if not isinstance(base, nn.Module):  # not built as transformers builds classifiers: the names that peft knows
        named = [name for name, _ in model.named_modules() if _named_as_head(name)]
        return tuple(name for name in named if not any(name.startswith(f"{other}.") for other in named))
    own = next((name for name, _ in model.named_parameters(recurse=False)), None)
    if own is not None:
        raise PlacementError(f"parameter {own!r} lies on the classifier itself: peft cannot save it with an adapter")
    deviation = getattr(getattr(model, "config", None), "initializer_range", None)
    poolers = [f"{prefix}.{name}" for name, module in base.named_modules() if _new_pooler(name, module, deviation)]
    beside = [name for name, child in model.named_children() if child is not base and _has_parameters(child)]
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return tuple(sorted([*poolers, *beside], key=order.__getitem__))


def check_head_plain(model: nn.Module) -> None:
    """Refuse a head that is quantised: it trains.

    Args:
        model: transformers sequence classifier, with adapters or without.

    Raises:
        PlacementError: Naming the part, and how the model is loaded without that.
    """
    if not holds_packed(model):
        return
    # of a new head the library may have made the module, and nothing to pack
    quantised = {type(module) for module in model.modules() if any(map(is_packed, module.parameters(recurse=False)))}
    for part in head_parts(model):
        inner = model.get_submodule(part)
        packed = any(map(is_packed, inner.parameters()))
        if packed or any(type(module) in quantised - {nn.Linear} for module in inner.modules()):
            raise PlacementError(
                f"the head {part!r} is quantised, and it trains: load the model with modules_to_not_convert={[part]!r}"
                f" (of BitsAndBytesConfig llm_int8_skip_modules={[part]!r})"
            )


def in_head(name: str, parts: tuple[str, ...]) -> bool:
    """Tell whether a module trains as part of the head.

    Args:
        name: Module path.
        parts: From `head_parts`.

    Returns:
        Whether it is one of the parts, lies in one, or has a name that peft takes for a head's.
    """
    return _named_as_head(name) or any(name == part or name.startswith(f"{part}.") for part in parts)


def modules_to_save(model: nn.Module) -> list[str] | None:
    """Name the parts of the head for peft, without those that it finds by itself.

    Args:
        model: transformers sequence classifier without adapters.

    Returns:
        For `LoraConfig.modules_to_save`: the shortest end of each path that peft cannot take for another module's, and
        where there is none the path in the peft model. None where peft finds all parts.
    """
    names = [name for name, _ in model.named_modules() if name]
    wanted = [part for part in head_parts(model) if not part.endswith(tuple(SEQ_CLS_HEAD_NAMES))]
    return [_entry(part, names) for part in wanted] or None


def _entry(part: str, names: list[str]) -> str:
    pieces = part.split(".")
    for start in range(len(pieces) - 1, -1, -1):
        end = ".".join(pieces[start:])
        # peft compares ends of paths as text, and keeps adapters away from every path that holds the name
        others = [name for name in names if name != part and not name.startswith(f"{part}.")]
        if not any(name.endswith(end) or f".{end}." in f".{name}." for name in others):
            return end
    return PEFT_BASE + part


def with_head(model: nn.Module, config: PeftConfig) -> PeftConfig:
    """Let every part of the head train and be saved.

    Args:
        model: transformers sequence classifier without adapters.
        config: peft's configuration; not changed.

    Returns:
        A copy, with more `modules_to_save` where it is for sequence classification and of a method that has them.

    Raises:
        PlacementError: If `modules_to_save` names what the model lacks, or what is no part of the head, or a target
            module's name means a part of the head as well.
    """
    config = copy.deepcopy(config)
    if config.task_type != "SEQ_CLS" or not hasattr(config, "modules_to_save"):
        return config
    parts, names = head_parts(model), [name for name, _ in model.named_modules() if name]
    kept = []
    for entry in config.modules_to_save or []:
        meant = [name for name in names if f"{PEFT_BASE}{name}".endswith(entry)]
        if not meant and entry not in SEQ_CLS_HEAD_NAMES:  # these two peft adds to every configuration
            raise PlacementError(f"modules_to_save names {entry!r}, which the model lacks: leave it out")
        inside = [in_head(name, parts) for name in meant]
        if not all(inside) and entry.rsplit(".", 1)[-1] != "pooler":
            raise PlacementError(
                f"modules_to_save names {entry!r}: only the classifier's head may train as a whole, which is "
                f"{', '.join(parts)}"
            )
        kept += [] if all(inside) else [entry]  # what lies in the head is named below
    config.modules_to_save = [*kept, *(modules_to_save(model) or [])] or None
    _check_beside(model, config, parts)
    return config


def _check_beside(model: nn.Module, config: PeftConfig, parts: tuple[str, ...]) -> None:
    # peft keeps adapters away from the head by the names of `modules_to_save`, but not by whole paths
    if getattr(config, "target_modules", None) is None:
        return  # peft's own choice, or none
    saved = tuple(
        entry.removeprefix(PEFT_BASE) for entry in config.modules_to_save or () if entry.startswith(PEFT_BASE)
    )
    for name, module in model.named_modules():
        inside = isinstance(module, nn.Linear) and any(f"{name}.".startswith(f"{part}.") for part in saved)
        if inside and config.target_modules != "all-linear" and check_target_module_exists(config, name):
            raise PlacementError(
                f"a target module names the head's {name!r} too, which trains as a whole (the head is "
                f"{', '.join(parts)}): name the modules by their whole paths"
            )


def trained_head(model: nn.Module, adapter: str) -> tuple[dict[str, nn.Linear], tuple[str, ...]]:
    """Read the trained head off a peft model.

    Args:
        model: peft model.
        adapter: Name of its adapter.

    Returns:
        Linear modules of the head by name, and the names of its other modules with parameters.
    """
    head: dict[str, nn.Linear] = {}
    others = []
    base = model.get_base_model() if isinstance(model, PeftModel) else model  # methods differ in what lies above it
    for name, wrapper in base.named_modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or adapter not in wrapper.modules_to_save:
            continue
        trained = wrapper.modules_to_save[adapter]
        for inner, module in trained.named_modules():
            path = ".".join(filter(None, (name, inner)))
            if isinstance(module, nn.Linear):
                head[path] = module
            elif next(module.parameters(recurse=False), None) is not None:
                others.append(path)
    return head, tuple(others)


def check_saved(model: nn.Module) -> None:
    """Refuse to train a model of which something random would be lost with the run.

    Args:
        model: peft model.

    Raises:
        PlacementError: Naming the layer that neither trains nor is saved, and how it is.
    """
    base = model.get_base_model()  # type: ignore[operator]
    if output_layer(base) is not None:
        return  # it is the pretrained model's own
    for name, module in _unwrapped(base):
        if _looks_new(module, unknown=True):
            raise PlacementError(
                f"layer {name!r} is new and would be lost with the run, for it is not saved with the adapter: "
                f"use LoraConfig(task_type='SEQ_CLS', modules_to_save={[PEFT_BASE + name]!r})"
            )


def _unwrapped(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    saved = [name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    for part in head_parts(model):
        below = any(name == part or name.startswith(f"{part}.") for name in saved)
        if not below and not any(part.startswith(f"{name}.") for name in saved):
            yield part, model.get_submodule(part)


def _named_as_head(name: str) -> bool:
    """Whether peft trains the module by itself: it matches the ends of names."""
    return any(piece.endswith(tuple(SEQ_CLS_HEAD_NAMES)) for piece in name.split("."))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _new_pooler(name: str, module: nn.Module, deviation: float | None) -> bool:
    if name.rsplit(".", 1)[-1] != _POOLER or not _has_parameters(module) or not _looks_new(module, unknown=False):
        return False
    # a pooler that was distilled or cut out of a larger model can have biases of 0 and is not new (MiniLM's)
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1 and not parameter.is_meta]
    if any(map(is_packed, matrices)):  # it cannot train, and was there to be quantised
        return False
    return deviation is None or all(_as_drawn(matrix, deviation) for matrix in matrices)


def _as_drawn(matrix: nn.Parameter, deviation: float) -> bool:
    # within five standard errors of the standard deviation of that many normal numbers
    allowed = max(0.05, 5.0 / (2.0 * matrix.numel()) ** 0.5)
    return bool(abs(float(matrix.detach().double().std()) / deviation - 1.0) < allowed)


def _looks_new(module: nn.Module, *, unknown: bool) -> bool:
    # transformers starts biases at 0 and norms at 1, and no training leaves every one of them there; `unknown` is what
    # to say of a module without biases and norms
    vectors = [parameter for parameter in module.parameters() if parameter.ndim == 1 and not parameter.is_meta]
    if not vectors:
        return unknown and not any(parameter.is_meta for parameter in module.parameters())
    return all(bool((vector == 0).all()) or bool((vector == 1).all()) for vector in vectors)
