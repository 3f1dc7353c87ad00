"""What peft puts into a model: its layers, the names of its parameters, and what a method is called."""

from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from foretune.errors import PlacementError
from foretune.models.head_parts import PEFT_BASE

_NAMES = {
    "ADALORA": "AdaLoRA",
    "IA3": "(IA)³",
    "LN_TUNING": "LN tuning",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "LORA": "LoRA",
    "PREFIX_TUNING": "prefix tuning",
    "PROMPT_TUNING": "prompt tuning",
    "P_TUNING": "P-tuning",
    "VERA": "VeRA",
}
_OTHERS = ("modules_to_save", "prompt_encoder", "adaption_prompt", "adaption_gate", "ranknum")  # parts of names


def method_name(config: PeftConfig) -> str:
    """Say which method a configuration is of.

    Args:
        config: peft's configuration.

    Returns:
        The name that people use, peft's where there is no other; DoRA, which peft takes for an option of LoRA, has its
        own.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    return "DoRA" if kind == "LORA" and getattr(config, "use_dora", False) else _NAMES.get(kind, kind)


def is_plain_kind(config: PeftConfig) -> bool:
    """Tell LoRA from other methods, of which some derive from its configuration.

    Args:
        config: peft's configuration.

    Returns:
        Whether its type is LoRA's own.
    """
    return str(getattr(config.peft_type, "value", config.peft_type)) == "LORA"


def tuner_layers(model: nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    """List the layers that peft has put into a model.

    Args:
        model: A peft model, or any.

    Returns:
        Names in the base model, and layers.
    """
    return [
        (name.removeprefix(PEFT_BASE), module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]


def check_layers(model: PeftModel, adapter: str) -> None:
    """Refuse adapters that do not do what they have learned, or of which several do.

    Args:
        model: A peft model.
        adapter: Name of the active adapter.

    Raises:
        PlacementError: Naming the module.
    """
    for name, layer in tuner_layers(model):
        if layer.merged or layer.disable_adapters:
            raise PlacementError(f"the adapter of module {name!r} is merged or disabled: unmerge and enable it")
        if list(layer.active_adapters) != [adapter]:
            raise PlacementError(f"module {name!r} runs adapters {list(layer.active_adapters)}: activate {adapter!r}")


def is_base(name: str) -> bool:
    """Tell the parameters of the pretrained model from those of adapters and trained head.

    Args:
        name: Name of a parameter in a peft model.

    Returns:
        Whether the base model has it without peft.

    Example:
        >>> is_base("base_model.model.bert.pooler.dense.bias")
        True
        >>> is_base("base_model.model.bert.encoder.layer.0.output.dense.ia3_l.default")
        False
    """
    prefixes = tuple(PEFT_TYPE_TO_PREFIX_MAPPING.values())
    return not any(piece in _OTHERS or piece.startswith(prefixes) for piece in name.split("."))


def virtual_tokens(model: nn.Module) -> int:
    """Count the tokens that an adapter puts before every text.

    Args:
        model: A peft model, or any.

    Returns:
        Tokens; 0 of methods that have none.
    """
    return int(getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0)


def logits_of_texts(model: nn.Module, logits: Tensor, length: int) -> Tensor:
    """Leave out the logits at virtual tokens, which peft puts before the texts and which no label is held against.

    Args:
        model: A peft model, or any.
        logits: n × positions × vocabulary.
        length: Positions T of the labels.

    Returns:
        n × T × vocabulary where virtual tokens stand before T others; else the logits as they are, as of prefixes,
        which give none.
    """
    virtual = virtual_tokens(model)
    return logits[:, virtual:] if virtual and logits.ndim == 3 and logits.shape[1] == virtual + length else logits
