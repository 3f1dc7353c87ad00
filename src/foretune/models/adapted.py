"""A model with its adapters as the kernel sees them, and batches of its inputs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor, nn

from foretune.models.sites import Site


@dataclass(frozen=True)
class Adapter:
    """A site with the tensors that its features need.

    Attributes:
        site: Shapes and scaling.
        module: The module whose input is h and whose output is y.
        rows: (draws · r) × d_in rows of A, draw-major; the first r are the adapter's own.
        b: d_out × r matrix B, or None where B = 0 (then ∂z/∂A = 0).
    """

    site: Site
    module: nn.Module
    rows: Tensor
    b: Tensor | None


@dataclass(frozen=True)
class Layout:
    """How a model lays out its examples, from `foretune.ntk.layout.find_layout`.

    Attributes:
        singly: Modules that do not have the examples on the first axis, or read what all examples share (relative
            positions, say); with such a module the examples go through the model one at a time.
        idle: Modules that no example's outputs depend on.
        positions: Positions that a module sees of an example, over all its uses, relative to the example's tokens.
    """

    singly: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    positions: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AdaptedModel:
    """A classifier with the adapters and head modules that its kernel is taken of.

    Attributes:
        model: Called as `model(**inputs).logits`.
        adapters: One for each site.
        draws: Draws of A in every `Adapter.rows`.
        head: Trained linear modules of the classifier head by name; empty to leave it out.
        forward: Context of the forward pass (it may switch adapters off that do nothing).
        layout: How the model lays out its examples; None where nobody has looked.
    """

    model: nn.Module
    adapters: tuple[Adapter, ...]
    draws: int
    head: Mapping[str, nn.Module] = field(default_factory=dict)
    forward: Callable[[], AbstractContextManager[None]] = nullcontext
    layout: Layout | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """Sites in the order of the features."""
        return tuple(adapter.site for adapter in self.adapters)


@dataclass(frozen=True)
class Batch:
    """Inputs of some examples, padded to the longest of them.

    Attributes:
        rows: Positions of the examples in the sample.
        inputs: Keyword arguments of the model; every tensor has the examples first.
    """

    rows: Tensor
    inputs: Mapping[str, Tensor]

    def singles(self) -> Iterator["Batch"]:
        """Take the batch apart.

        Yields:
            Batches of one example each, without padding.
        """
        mask = self.inputs.get("attention_mask")
        for row in range(len(self.rows)):
            one = {name: tensor[row : row + 1] for name, tensor in self.inputs.items()}
            if mask is not None and mask.ndim == 2 and bool(mask[row].any()):
                kept = mask[row].nonzero()
                part = slice(int(kept.min()), int(kept.max()) + 1)
                one = {name: t[:, part] if t.shape == (1, mask.shape[1]) else t for name, t in one.items()}
            yield Batch(self.rows[row : row + 1], one)
