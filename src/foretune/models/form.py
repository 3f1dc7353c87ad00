"""In which form weights are loaded: how precise, quantised or not, and on which device or devices."""

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, get_args

import torch
import transformers
from torch import nn

from foretune.errors import ModelError, border
from foretune.models.dispatched import is_dispatched
from foretune.settings.groups import Dtype, Quantization

SPREAD = "map"  # a device's name: layers over all of them, where they fit
_PACKAGE = "bitsandbytes"


@dataclass(frozen=True)
class Form:
    """How weights are loaded.

    Attributes:
        dtype: Of the weights, and of what is computed with those that are quantised.
        device: Where they lie; None to let accelerate spread the layers over the devices.
        quantization: Whether the linear modules below the head are quantised on loading.
    """

    dtype: torch.dtype
    device: torch.device | None = None
    quantization: Quantization = "none"

    def arguments(self, config: Any, named: str, head: tuple[str, ...] = ()) -> dict[str, Any]:
        """Say it in the words of transformers' `from_pretrained`.

        Args:
            config: transformers' configuration of the model.
            named: What the model is called in a message.
            head: Modules that stay as they are.

        Returns:
            Keyword arguments.

        Raises:
            ModelError: If the weights are quantised already.
        """
        own = getattr(config, "quantization_config", None) is not None
        arguments: dict[str, Any] = {"dtype": self.dtype}
        if self.quantization != "none":
            if own:
                raise ModelError(f"{named} is quantised already: leave --quantization out")
            arguments["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_8bit=self.quantization == "8bit",
                load_in_4bit=self.quantization == "4bit",
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=self.dtype,
                llm_int8_skip_modules=list(head) or None,
            )
        if self.device is None:
            arguments["device_map"] = "auto"
        elif own or self.quantization != "none":
            arguments["device_map"] = {"": self.device}  # what is quantised is packed for its device
        return arguments

    def settle(self, model: Any, named: str) -> nn.Module:
        """Put a model where it belongs, in eval mode.

        Args:
            model: As transformers has loaded it.
            named: What the model is called in a message.

        Returns:
            The model.

        Raises:
            ModelError: If the device has no room for it.
        """
        model = model.eval()
        if self.device is None or is_dispatched(model) or getattr(model, "hf_quantizer", None) is not None:
            return model  # type: ignore[no-any-return]
        with border(ModelError, f"cannot put {named} on the device {str(self.device)!r}"):
            return model.to(self.device)  # type: ignore[no-any-return]


def form_of(dtype: str, device: str, quantization: str = "none") -> Form:
    """Read the settings.

    Args:
        dtype: One of `foretune.settings.groups.Dtype`.
        device: As `resolve_device`, or `map`.
        quantization: One of `foretune.settings.groups.Quantization`.

    Returns:
        The form.

    Raises:
        ModelError: If a name is unknown, the device does not exist here, or what quantises is not installed.
    """
    if quantization not in get_args(Quantization):
        raise ModelError(f"unknown quantization {quantization!r}: use one of {', '.join(get_args(Quantization))}")
    if quantization != "none" and find_spec(_PACKAGE) is None:
        raise ModelError(
            f"quantization = {quantization!r} needs {_PACKAGE}, which is not installed: "
            "pip install 'foretune[quantized]'"
        )
    precision = dtype_of(dtype)
    if quantization != "none" and precision == torch.float64:
        raise ModelError(f"quantization = {quantization!r} computes in half or single precision: use another dtype")
    return Form(precision, None if device == SPREAD else resolve_device(device), quantization)  # type: ignore[arg-type]


def resolve_device(name: str) -> torch.device:
    """Resolve `auto` to the GPU if there is one, under a launcher to that of this process.

    Args:
        name: `auto`, `cpu`, `cuda`, `cuda:1`, …

    Returns:
        The device.

    Raises:
        ModelError: If the device does not exist here.
    """
    if name == "auto":
        # a launcher of several processes numbers them; each has its own GPU
        local = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {name!r} is not available here: use 'auto' or 'cpu'") from error
    return device


def dtype_of(name: str) -> torch.dtype:
    """Resolve the name of a precision.

    Args:
        name: One of `foretune.settings.groups.Dtype`.

    Returns:
        torch's.

    Raises:
        ModelError: If there is no such.
    """
    if name not in get_args(Dtype):
        raise ModelError(f"unknown dtype {name!r}: use one of {', '.join(get_args(Dtype))}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype
