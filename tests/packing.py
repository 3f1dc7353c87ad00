"""Tiny quantised modules, as libraries make them: integers in the parameter, scales beside it."""

import torch
from torch import nn


class PackedLinear(nn.Linear):
    """W ≈ scale · integers, one scale for each row."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None, dtype=plain.weight.dtype)
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((plain.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = plain.bias

    def unpacked(self) -> torch.Tensor:
        return self.weight.to(self.scale.dtype) * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.unpacked(), self.bias)


class Severed(PackedLinear):
    """A kernel without a gradient."""

    def forward(self, x):
        return super().forward(x.detach())


class PackedEmbedding(nn.Embedding):
    """A table of integers: the first parameter of its model."""

    def __init__(self, plain: nn.Embedding) -> None:
        super().__init__(plain.num_embeddings, plain.embedding_dim, padding_idx=plain.padding_idx)
        self.scale = float(plain.weight.detach().abs().max()) / 127
        self.dtype = plain.weight.dtype
        self.weight = nn.Parameter((plain.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, ids):
        return self.weight[ids].to(self.dtype) * self.scale


def pack(model: nn.Module, kind: type = PackedLinear, *, tables: bool = False) -> nn.Module:
    """Quantise the linear modules of the base, and its table of tokens."""
    base = model.base_model
    for name, module in list(base.named_modules()):
        parent, _, own = name.rpartition(".")
        if isinstance(module, nn.Linear) and "pooler" not in name:
            setattr(base.get_submodule(parent), own, kind(module))
        elif tables and isinstance(module, nn.Embedding) and own == "word_embeddings":
            setattr(base.get_submodule(parent), own, PackedEmbedding(module))
    return model


def unpack(model: nn.Module) -> nn.Module:
    """The same numbers in plain modules."""
    base = model.base_model
    for name, module in list(base.named_modules()):
        parent, _, own = name.rpartition(".")
        if isinstance(module, PackedLinear):
            plain = nn.Linear(module.in_features, module.out_features, dtype=module.scale.dtype)
            plain.weight = nn.Parameter(module.unpacked())
            plain.bias = module.bias
            setattr(base.get_submodule(parent), own, plain)
    return model
