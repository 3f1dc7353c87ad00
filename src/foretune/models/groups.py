"""Trained parameters of any form: of every method of peft, or of layers of a plain model that train whole.

A group holds the parameters of one module, or those that the same modules share. Nothing here asks how a method makes
its outputs; `foretune.ntk.general` differentiates them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from foretune.errors import PlacementError, few
from foretune.models.adapted import AdaptedModel, Group
from foretune.models.head_parts import PEFT_BASE, head_parts, in_head, trained_head
from foretune.models.output_layer import output_layer
from foretune.models.sites import Site, split_name

_REPEATED = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)


def read_groups(model: nn.Module) -> AdaptedModel:
    """Read all that trains in a model, whatever its form.

    Args:
        model: A peft model with one active adapter of any method, or a plain transformers model in which what is to
            train has `requires_grad`; left as it is.

    Returns:
        Groups of parameters, each parameter in one, in the order of the model; what trains of the classifier's head is
        in `head` where that is linear modules, and nowhere else.

    Raises:
        PlacementError: If nothing trains, several adapters are active, or a module of the head trains in part.
    """
    head, in_the_head = _head(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in in_the_head}
    if not trained:
        raise PlacementError(
            "nothing trains beside the head: load the adapter with is_trainable=True, or choose layers with train_only"
        )
    for name, parameter in trained.items():
        _check_numbers(name, parameter)
    users = _users(model, trained)
    members: dict[tuple[str, ...], dict[str, nn.Parameter]] = {}
    for name, parameter in trained.items():
        members.setdefault(tuple(users[id(parameter)]) or (_owner(name),), {})[name] = parameter
    groups = []
    for names, parameters in members.items():
        modules = {name: module for p in parameters.values() for name, module in users[id(p)].items()}
        place = names[0] if len(names) == 1 else _shared_name(next(iter(parameters)), names)
        groups.append(Group(_site(place, parameters, shared=len(names) > 1), parameters, modules))
    return AdaptedModel(model, (), 1, head, lambda: _prompts_apart(model), groups=tuple(groups))


def base_of(model: Any) -> Any:
    """Give the transformers model of a peft model.

    Args:
        model: A peft model, or a plain one.

    Returns:
        The model without the adapter's frame; a plain model as it is.
    """
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def _prompts_apart(model: Any) -> Iterator[None]:
    """Let every example have virtual tokens of its own, where peft makes them once and repeats them."""
    config = model.active_peft_config if isinstance(model, PeftModel) else None
    if config is None or config.peft_type not in _REPEATED or config.inference_mode:
        yield
        return
    adapter = model.active_adapter

    def get_prompt(batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        tokens, encoder = model.prompt_tokens[adapter], model.prompt_encoder[adapter]
        return encoder(tokens.expand(batch_size, -1).to(encoder.embedding.weight.device))

    model.get_prompt = get_prompt  # of the instance, before the class's
    try:
        yield
    finally:
        del model.get_prompt


def train_only(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Let named layers train whole and nothing else, for a full fine-tune of a part of a model.

    Args:
        model: A plain transformers model; the `requires_grad` of its parameters is set.
        names: Ends of the paths of modules or parameters, as in peft's `target_modules`: `layer.11`, `LayerNorm`,
            `query.bias`, `classifier`.

    Returns:
        The names of the parameters that train, in the order of the model.

    Raises:
        PlacementError: If a name matches nothing with parameters, or parameters that hold no floating-point numbers.
    """
    if isinstance(names, str):
        raise PlacementError(f"names = {names!r}: give a list of names")
    of_modules = {name: module for name, module in model.named_modules() if name}
    own = dict(model.named_parameters())
    chosen: set[int] = set()
    for wanted in names:
        found = [p for name, p in own.items() if _ends(name, wanted)]
        found += [p for name, module in of_modules.items() if _ends(name, wanted) for p in module.parameters()]
        if not found:
            ends = {".".join(name.split(".")[-pieces:]) for name in (*of_modules, *own) for pieces in (1, 2)}
            near = get_close_matches(wanted, sorted(ends), n=3)
            kinds = sorted({name.rsplit(".", 2)[-2] for name in own if "." in name})
            hint = f"did you mean {few(near)}?" if near else f"the model has {few(kinds)}"
            raise PlacementError(f"layer {wanted!r} matches nothing that has parameters: {hint}")
        chosen |= {id(parameter) for parameter in found}
    for name, parameter in own.items():
        if id(parameter) in chosen:
            _check_numbers(name, parameter)
    for parameter in own.values():
        parameter.requires_grad_(id(parameter) in chosen)
    return tuple(name for name, parameter in own.items() if id(parameter) in chosen)


def _ends(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _check_numbers(name: str, parameter: nn.Parameter) -> None:
    plain = type(parameter.data) is torch.Tensor or type(parameter) is nn.Parameter
    if not plain or not parameter.is_floating_point():
        kind = type(parameter).__name__ if not plain else str(parameter.dtype).removeprefix("torch.")
        raise PlacementError(
            f"parameter {_path(name)!r} trains and is stored as {kind}: only floating-point numbers have gradients, "
            "freeze it or load the model without quantisation"
        )


def _path(name: str) -> str:
    return name.removeprefix(PEFT_BASE).removeprefix("base_model.")


def _owner(name: str) -> str:
    return _path(name.rpartition(".")[0])


def _shared_name(name: str, users: Sequence[str]) -> str:
    """Of parameters that several modules share: where the first of them stands, and never the name of a module."""
    place = _path(name).removesuffix(".weight").removesuffix(".default")
    return f"{place}.shared" if place in users else place


def _site(name: str, parameters: Mapping[str, nn.Parameter], *, shared: bool) -> Site:
    layer, kind = split_name(name)
    numbers = sum(parameter.numel() for parameter in parameters.values())
    return Site(name, None if shared else layer, kind, d_in=0, d_out=0, rank=0, scaling=1.0, others=numbers)


def _head(model: nn.Module) -> tuple[dict[str, nn.Linear], set[int]]:
    """Linear modules of the trained head, none where it trains others too, and all parameters of the head."""
    if isinstance(model, PeftModel):
        adapter = model.active_adapter
        if not isinstance(adapter, str):
            raise PlacementError(f"several adapters are active ({adapter}): activate one")
        if output_layer(model.get_base_model()) is not None:  # what a language model trains whole is no head
            return {}, set()
        head, others = trained_head(model, adapter)
        saved = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
        head = {name.removeprefix("base_model."): module for name, module in head.items()}  # of a model without tuners
        return {} if others else head, {id(p) for wrapper in saved for p in wrapper.parameters()}
    linear: dict[str, nn.Linear] = {}
    if output_layer(model) is not None:
        return linear, set()
    parts, own, all_linear = head_parts(model), set[int](), True
    for name, module in model.named_modules():
        parameters = list(module.parameters(recurse=False))
        trains = [parameter.requires_grad for parameter in parameters]
        if not any(trains) or not in_head(name, parts):
            continue
        if not all(trains):
            raise PlacementError(f"module {name!r} of the head trains in part: let its weight and bias train, or none")
        own |= {id(parameter) for parameter in parameters}
        all_linear &= isinstance(module, nn.Linear)
        if isinstance(module, nn.Linear):
            linear[name] = module
    return linear if all_linear else {}, own


def _users(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> dict[int, dict[str, nn.Module]]:
    """For each parameter the modules that hold it, by name."""
    wanted = {id(parameter) for parameter in trained.values()}
    users: dict[int, dict[str, nn.Module]] = {parameter: {} for parameter in wanted}
    for name, module, parameters in _units(model):
        for parameter in parameters:
            if id(parameter) in wanted:
                users[id(parameter)][name] = module
    in_units = {parameter for parameter, found in users.items() if found}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in wanted - in_units:
                users[id(parameter)][_path(name)] = module
    return users


def _units(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[nn.Parameter]]]:
    """Modules that peft puts in place of others or before them: each uses all parameters below it as one."""
    prompts = getattr(model, "prompt_encoder", None)
    if isinstance(model, PeftModel) and isinstance(prompts, nn.Module):
        for name, module in prompts.named_children():
            # peft keeps one encoder for each adapter
            yield (
                "prompt_encoder" if name == model.active_adapter else f"prompt_encoder.{name}",
                module,
                list(module.parameters()),
            )
    outer = ""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not (outer and name.startswith(outer)):
            outer = f"{name}."
            yield _path(name), module, list(module.parameters())
