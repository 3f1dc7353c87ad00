"""A classifier with the adapters that its kernel is taken of, as plain tensors, and batches of its examples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, Int
from peft import PeftConfig
from torch import Tensor, nn

from foretune.errors import KernelError
from foretune.models.sites import Site
from foretune.models.tuner import method_name


@dataclass(frozen=True)
class Vector:
    """Numbers θ that a module trains, each of which multiplies one number of every position.

    With g_t = ∂z/∂y_t the gradient of one example is ∂z/∂θ = Σ_t project(g_t) ⊙ factor(h_t, y_t).

    Attributes:
        name: Of the parameter in the module, such as `ia3_l`.
        numbers: Length w.
        factor: Takes n × positions × d_in inputs and n × positions × d_out outputs to n × positions × w; None for 1,
            as of a bias.
        project: Takes n × positions × d_out gradients to n × positions × w; None where they stay as they are.
    """

    name: str
    numbers: int
    factor: Callable[[Tensor, Tensor], Tensor] | None = None
    project: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Adapter:
    """A site with the tensors that its features need.

    Attributes:
        site: Shapes and scaling.
        module: The module whose input is h and whose output is y.
        rows: (draws · r) × d_in rows of A, draw-major; the first r are the adapter's own.
        b: d_out × r matrix B, or None where B = 0 (then ∂z/∂A = 0).
        vectors: What the module trains beside A and B.
    """

    site: Site
    module: nn.Module
    rows: Float[Tensor, "rows d_in"]
    b: Float[Tensor, "d_out r"] | None
    vectors: tuple[Vector, ...] = ()

    def width(self, draws: int) -> int:
        """Count the numbers of its features.

        Args:
            draws: Draws D of A.

        Returns:
            D·r·d_out for B, r·d_in for A where B ≠ 0, and those of the vectors.
        """
        of_a = 0 if self.b is None else self.site.rank * self.site.d_in
        return draws * self.site.rank * self.site.d_out + of_a + sum(vector.numbers for vector in self.vectors)


@dataclass(frozen=True)
class Group:
    """Trained parameters of any form, whose gradients automatic differentiation takes: the general path.

    Attributes:
        site: Their place, of rank 0, with as many `others` as they have numbers.
        parameters: The parameters themselves by their names in the model, in the order of the features.
        modules: What is taken to use them, by name: with the inputs and output gradients of these modules the gradients
            of all examples of a batch follow from one pass, where each has the examples on its first axis.
    """

    site: Site
    parameters: Mapping[str, nn.Parameter]
    modules: Mapping[str, nn.Module] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """How a model lays out its examples, from `foretune.ntk.layout.find_layout`.

    Attributes:
        singly: Modules that do not have the examples on the first axis, or read what all examples share (relative
            positions, say); with such a module the examples go through the model one at a time.
        idle: Modules that no example's outputs depend on.
        positions: Positions that a module sees of an example, over all its uses, relative to the example's tokens.
        looped: Whether the gradients of `AdaptedModel.groups` take passes of each example's own.
    """

    singly: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    positions: Mapping[str, float] = field(default_factory=dict)
    looped: bool = False


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
        groups: Parameters that no formula covers; where there are some, everything goes the general path.
    """

    model: nn.Module
    adapters: tuple[Adapter, ...]
    draws: int
    head: Mapping[str, nn.Module] = field(default_factory=dict)
    forward: Callable[[], AbstractContextManager[None]] = nullcontext
    layout: Layout | None = None
    groups: tuple[Group, ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        """Sites in the order of the features."""
        return (*(adapter.site for adapter in self.adapters), *(group.site for group in self.groups))

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Modules whose inputs and output gradients a pass takes: in the order of the sites, then the head's, by name.

        Raises:
            KernelError: If two of them have one name.
        """
        of_groups: dict[str, nn.Module] = {}
        if self.layout is None or not self.layout.looped:
            of_groups = {name: module for group in self.groups for name, module in group.modules.items()}
        named = [(adapter.site.name, adapter.module) for adapter in self.adapters]
        named += [*of_groups.items(), *self.head.items()]
        modules = dict(named)
        if len(modules) < len(named):
            names = [name for name, _ in named]
            twice = next(name for name in names if names.count(name) > 1)
            raise KernelError(f"module {twice!r} is named twice among the adapters and the head: leave one out")
        return modules


@dataclass(frozen=True)
class Batch:
    """Inputs of some examples, padded to the longest of them.

    Attributes:
        rows: Positions of the examples in the sample.
        inputs: Keyword arguments of the model; every tensor has the examples first.
    """

    rows: Int[Tensor, " n"]
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


def describe_placement(config: PeftConfig | None, sites: Sequence[Site]) -> dict[str, Any]:
    """Say where adapters sit and what they are, as in every `result.json` under `placement`.

    Args:
        config: peft's configuration of the placed adapters; None where layers train whole.
        sites: Their modules.

    Returns:
        Facts by name, JSON-ready: `r`, `alpha`, `rslora` and `init` are None where the method has none.
    """
    targets = getattr(config, "target_modules", None)
    known = {name: getattr(config, name, None) for name in ("r", "lora_alpha", "use_rslora", "init_lora_weights")}
    known["r"] = getattr(config, "init_r", known["r"])  # AdaLoRA's
    return {
        "method": "full" if config is None else method_name(config),
        "target_modules": [targets] if isinstance(targets, str) else sorted(targets or []),
        "layers": sorted({site.layer for site in sites if site.layer is not None}),
        "r": known["r"],
        "alpha": known["lora_alpha"],
        "rslora": None if known["use_rslora"] is None else bool(known["use_rslora"]),
        "init": None if known["init_lora_weights"] is None else str(known["init_lora_weights"]),
    }
