"""The linear modules of a model: what an adapter can sit on."""

import re

from torch import nn

from foretune.models.head_parts import head_parts, in_head
from foretune.models.output_layer import output_layer

_EXPERT = frozenset({"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"})  # peft's names of their parts


def linear_names(model: nn.Module) -> tuple[str, ...]:
    """List the modules that a LoRA configuration can name: linear layers outside embeddings and head.

    The layer of a language model that gives the logits of the next token counts as its head.

    Args:
        model: A transformers classifier or language model without adapters.

    Returns:
        Module paths in the order of the model.
    """
    parts, last = head_parts(model), output_layer(model)
    return tuple(
        name
        for name, module in model.named_modules()
        if _is_linear(module) and name != last and not in_head(name, parts)
    )


def _is_linear(module: nn.Module) -> bool:
    kind = type(module).__name__  # some mixtures of experts derive a router with outputs of its own from nn.Linear
    return (isinstance(module, nn.Linear) and not kind.endswith("Router")) or kind == "Conv1D"


def fused_experts(model: nn.Module) -> tuple[str, ...]:
    """List the mixtures of experts whose weights lie in one tensor.

    Args:
        model: transformers model.

    Returns:
        Module paths.
    """
    return tuple(name for name, module in model.named_modules() if type(module).__name__.endswith("Experts"))


def beside_experts(model: nn.Module) -> tuple[str, ...]:
    """List the linear modules that peft does not take for a part of fused experts, by the end of their names.

    Args:
        model: A transformers classifier without adapters.

    Returns:
        `linear_names`, without a few of them in a model with such experts.
    """
    names = linear_names(model)
    return tuple(name for name in names if name.rsplit(".", 1)[-1] not in _EXPERT) if fused_experts(model) else names


def linear_in_head(model: nn.Module) -> list[str] | str:
    """Name the linear modules of a classifier's head for peft to leave out.

    Args:
        model: A transformers classifier without adapters.

    Returns:
        Their names, or a pattern where a name is the end of others.
    """
    parts, names = head_parts(model), linear_names(model)
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and in_head(name, parts)]
    if any(name.endswith(f".{other}") for other in head for name in names):
        return "|".join(map(re.escape, head))
    return head
