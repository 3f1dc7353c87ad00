"""Weights that are kept in 8 or 4 bits, told by their tensors whatever library made them, and models of such weights.

bitsandbytes keeps integers in a parameter, with what unpacks them beside it; torchao and optimum-quanto a tensor that
says it were of floats and holds integers and scales inside. The type in which such a model computes, the number of its
weights and their bytes cannot be read off its first parameter.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from foretune.errors import ModelError

PACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes: may order 4 bits anew for a kernel that has no gradient


def is_packed(tensor: Tensor) -> bool:
    """Tell whether a parameter is quantised.

    Args:
        tensor: Parameter of a model.

    Returns:
        Whether it holds integers, outright or inside.
    """
    return not tensor.is_floating_point() or _has_parts(tensor)


def _has_parts(tensor: Tensor) -> bool:
    return bool(is_traceable_wrapper_subclass(tensor))


def holds_packed(model: nn.Module) -> bool:
    """Tell whether a model is quantised.

    Args:
        model: Any model.

    Returns:
        Whether one of its parameters is.
    """
    return any(is_packed(parameter) for parameter in model.parameters())


def computing_dtype(model: nn.Module) -> torch.dtype:
    """Find the type that a model computes in.

    Args:
        model: Any model.

    Returns:
        That of its first parameter that is not quantised; float32 where all are.
    """
    plain = (parameter.dtype for parameter in model.parameters() if not is_packed(parameter))
    return next(plain, torch.float32)


def n_weights(parameter: Tensor) -> int:
    """Count the numbers that a parameter stands for.

    Args:
        parameter: Packed or not.

    Returns:
        Numbers; of two that share a byte, two.
    """
    unpacked = getattr(getattr(parameter, "quant_state", None), "shape", None)  # bitsandbytes, 4 bits
    return int(parameter.numel()) if unpacked is None else int(torch.Size(unpacked).numel())


def n_bytes(parameter: Any) -> int:
    """Count the bytes that a parameter takes.

    Args:
        parameter: Packed or not.

    Returns:
        Bytes, those of scales inside the tensor with them.
    """
    if _has_parts(parameter):
        names, _ = parameter.__tensor_flatten__()
        return sum(n_bytes(getattr(parameter, name)) for name in names)
    return int(parameter.numel()) * int(parameter.element_size())


def unpacked(parameter: Tensor) -> Tensor | None:
    """Make plain numbers of a parameter.

    Args:
        parameter: Packed or not.

    Returns:
        Floats, or integers as they are kept; None where they, or what unpacks them, lie elsewhere.
    """
    if parameter.is_meta or getattr(parameter, "quant_state", None) is not None:
        return None  # not here; bitsandbytes orders 4 bits anew in a pass
    try:
        return parameter.dequantize() if _has_parts(parameter) else parameter.detach()
    except (AttributeError, NotImplementedError, RuntimeError):
        return None


def alias(tensor: Tensor) -> Tensor:
    """Make a tensor for a copy of a model that shares the weights.

    Args:
        tensor: Parameter or buffer.

    Returns:
        The tensor itself; of a parameter that has a state of its own, which a pass changes (bitsandbytes), another one
        on the same numbers.
    """
    state = vars(tensor) if isinstance(tensor, nn.Parameter) and type(tensor) is not nn.Parameter else {}
    if not state or _has_parts(tensor):
        return tensor
    other: Tensor = torch.Tensor._make_subclass(type(tensor), tensor.data, tensor.requires_grad)
    shared = (Tensor, nn.Module)
    other.__dict__.update({name: part if isinstance(part, shared) else copy.copy(part) for name, part in state.items()})
    return other


def copied(model: Any) -> Any:
    """Copy a model; quantised weights, which never train, are shared with the copy.

    Args:
        model: Any module.

    Returns:
        A model of its own.
    """
    return copy.deepcopy(model, {id(tensor): alias(tensor) for tensor in model.parameters() if is_packed(tensor)})


def keep_gradients(model: nn.Module) -> None:
    """Keep bitsandbytes from ordering 4-bit weights anew at a pass without gradients: the next one has none either.

    Args:
        model: Any model; changed in place.

    Raises:
        ModelError: If it has done so already.
    """
    for name, module in model.named_modules():
        if getattr(module, PACKS, False):
            setattr(module, PACKS, False)
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            raise ModelError(
                f"the 4-bit weights of {name!r} were packed for passes without gradients when the model ran on the "
                "CPU: load it again, and give it before it has run"
            )
