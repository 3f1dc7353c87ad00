"""Which pretrained model this is, told by its weights."""

import hashlib

import torch
from peft import PeftModel
from torch import nn

from foretune.models.packed import unpacked
from foretune.models.sites import split_name
from foretune.models.tuner import is_base

FEW = 64  # numbers of each parameter


def fingerprint(model: nn.Module) -> str:
    """Name the pretrained weights of a model's layers, whatever head or adapters it carries.

    SHA-256 over the shape and the first 64 numbers, in bfloat16, of every parameter of a numbered layer. So the same
    checkpoint has one name in float32 and bfloat16, with adapters and without; another checkpoint of the same
    architecture has another.

    Args:
        model: A transformers or peft model.

    Returns:
        13 hexadecimal digits.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone: nn.Module = getattr(plain, "base_model", plain)  # what transformers puts a head on
    parts = []
    for name, parameter in backbone.named_parameters():
        if split_name(name)[0] is None or not is_base(name):
            continue
        plain_numbers = unpacked(parameter)
        few = torch.empty(0) if plain_numbers is None else plain_numbers.flatten()[:FEW].to("cpu")
        numbers = few.to(torch.bfloat16).view(torch.int16) if few.is_floating_point() else few
        parts.append(repr(tuple(parameter.shape)).encode() + numbers.contiguous().numpy().tobytes())
    digest = hashlib.sha256()
    for part in sorted(parts):
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.hexdigest()[:13]  # 52 bits: a float holds them
