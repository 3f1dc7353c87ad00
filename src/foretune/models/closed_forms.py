"""Whether everything that trains in a peft model has a closed form, and which."""

from collections import Counter
from dataclasses import replace
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from foretune.models.adapted import Vector
from foretune.models.head_parts import PEFT_BASE
from foretune.models.lora import read_lora
from foretune.models.methods import read_bias, read_layer
from foretune.models.output_layer import output_layer
from foretune.models.reading import Reading
from foretune.models.tuner import is_plain_kind, tuner_layers

_HEAD = "modules_to_save"


def read_closed_forms(model: PeftModel, adapter: str) -> tuple[Reading, ...] | None:
    """Read every adapted module by its formula.

    Args:
        model: A peft model.
        adapter: Name of its active adapter.

    Returns:
        Modules in the order of the model; None where something trains that no formula covers: a layer without one,
        a parameter beside the adapter that is no plain bias, one that several modules share, or a part of an adapter
        alone.
    """
    config = model.active_peft_config
    readings = []
    for name, layer in tuner_layers(model):
        reading = _read(name, layer, adapter, config)
        if reading is None:
            return None
        readings.append(reading)
    headed = output_layer(model.get_base_model()) is None  # what a language model trains whole is no head
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad and not (headed and _HEAD in name)}
    covered = {id(p) for reading in readings for p in (*reading.trained, *reading.still)}
    more = _with_biases(model, readings, {name: p for name, p in wanted.items() if id(p) not in covered})
    if not more:
        return None
    trained = [parameter for reading in more for parameter in reading.trained]
    flags = {parameter.requires_grad for parameter in trained}
    # an adapter that was loaded for inference has no flag set: it is read as if it trained
    if len(flags) > 1 or _shared(model, trained):
        return None
    order = {module: place for place, module in enumerate(model.modules())}
    return tuple(sorted(more, key=lambda reading: order[reading.adapter.module]))


def _read(name: str, layer: BaseTunerLayer, adapter: str, config: Any) -> Reading | None:
    if is_plain_kind(config) and isinstance(config, LoraConfig):
        return read_lora(name, layer, adapter, config)
    return read_layer(name, layer, adapter)


def _with_biases(model: PeftModel, readings: list[Reading], beside: dict[str, nn.Parameter]) -> list[Reading] | None:
    """Add biases that train beside the adapter; None where something else does."""
    of_base = {id(_base(reading)): place for place, reading in enumerate(readings) if reading.plus_bias}
    found = list(readings)
    for name, parameter in beside.items():
        path, _, last = name.rpartition(".")
        if last != "bias":
            return None
        module = model.get_submodule(path)
        place = of_base.get(id(module))
        if place is not None:
            found[place] = _plus_bias(found[place], parameter)
            continue
        if any(module is inner for reading in readings for inner in reading.adapter.module.modules()):
            return None  # a part of an adapted module, which its output does not hold as it is
        adapted = read_bias(path.removeprefix(PEFT_BASE), module)
        if adapted is None:
            return None
        found.append(Reading(adapted, (parameter,)))
    return found


def _base(reading: Reading) -> nn.Module:
    module: Any = reading.adapter.module
    base: nn.Module = module.get_base_layer()
    return base


def _plus_bias(reading: Reading, bias: nn.Parameter) -> Reading:
    own = reading.adapter
    site = replace(own.site, others=own.site.others + len(bias))
    widened = replace(own, site=site, vectors=(*own.vectors, Vector("bias", len(bias))))
    return replace(reading, adapter=widened, trained=(*reading.trained, bias))


def _shared(model: nn.Module, trained: list[nn.Parameter]) -> bool:
    """Whether a parameter lies in several modules, whose gradients would have to be added up."""
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    return any(owners[id(parameter)] > 1 for parameter in trained)
