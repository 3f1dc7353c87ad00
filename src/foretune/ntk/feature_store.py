"""Tangent features of many examples: tiles of examples, in memory, in files, or computed whenever they are needed."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from foretune.models.sites import Site
from foretune.ntk.clock import Clock
from foretune.ntk.features import HeadFactor, TangentFeatures, join_features
from foretune.ntk.tile_files import read_checked, write_checked
from foretune.tasks.outputs import OutputReduction

Backing = Literal["memory", "disk", "recompute"]


@dataclass(frozen=True)
class Tile:
    """Features of some examples that follow each other.

    Attributes:
        features: Features.
        traces: M × D traces of each site's block of these examples, for each draw of A.
    """

    features: TangentFeatures
    traces: Float64[Tensor, "sites draws"]


@dataclass(frozen=True)
class TilePlan:
    """Which tiles there are, and how one is computed.

    Attributes:
        spans: Positions of the examples of each tile, in order, without a gap.
        keys: For each tile a digest of all that its features follow from.
        compute: Computes the tile of a number.
        sites: Of the features.
        reduction: Of the features.
        draws: Draws of A.
        device: Where features are computed and multiplied.
    """

    spans: tuple[range, ...]
    keys: tuple[str, ...]
    compute: Callable[[int], Tile]
    sites: tuple[Site, ...]
    reduction: OutputReduction
    draws: int
    device: str = "cpu"

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.spans[-1].stop


def cut(n: int, size: int) -> tuple[range, ...]:
    """Cut n examples into tiles of one size; the last may be smaller.

    Args:
        n: Number of examples.
        size: Examples of a tile.

    Returns:
        Positions of each.
    """
    return tuple(range(start, min(n, start + size)) for start in range(0, n, size))


def site_traces(features: TangentFeatures) -> Float64[Tensor, "sites draws"]:
    """Trace of each site's block: scale · Σ of the squares of its features, for each draw of A.

    Args:
        features: Features.

    Returns:
        M × D traces in float64.
    """
    total = torch.zeros(len(features.sites), features.draws, dtype=torch.float64)
    for index, site in enumerate(features.sites):
        by_draw = features.b[index].unflatten(2, (features.draws, site.rank))
        total[index] = _squares(by_draw.movedim(2, 0)).cpu()
        for shared in (features.a[index], features.v[index]):
            if shared is not None:
                total[index] += _squares(shared[None]).cpu()
    return features.reduction.scale * total


def join_tiles(parts: Iterable[tuple[Int[Tensor, " m"], Tile]], n: int) -> Tile:
    """Join the features of batches, and add their traces.

    Args:
        parts: Positions and features of each batch; may be lazy.
        n: Number of examples in all.

    Returns:
        The tile, examples in the order of their positions.

    Raises:
        KernelError: As `foretune.ntk.features.join_features`.
    """
    traces: list[Tensor] = []

    def features() -> Iterator[tuple[Tensor, TangentFeatures]]:
        for rows, tile in parts:
            traces.append(tile.traces)
            yield rows, tile.features

    joined = join_features(features(), n)
    return Tile(joined, torch.stack(traces).sum(0))


def _squares(parts: Tensor) -> Tensor:
    """Sums of squares in float64 of each part, without a copy in float64 of all of it."""
    norms = torch.stack([torch.linalg.vector_norm(part.flatten(1), dim=1, dtype=torch.float64) for part in parts])
    return norms.square().sum(1)


class Store:
    """The tiles of a sample.

    Args:
        plan: Tiles.
        backing: Where they are kept: `memory`, files on the `disk`, or nowhere.
        folder: Of the files.
        label: Begins the names of the files.
    """

    def __init__(self, plan: TilePlan, backing: Backing, folder: Path | None = None, label: str = "features") -> None:
        self.plan = plan
        self.computed = 0  # tiles, each time one was
        self._backing, self._folder, self._label = backing, folder, label
        self._held: dict[int, Tile] = {}
        self._trusted: set[int] = set()

    def tile(self, index: int, clock: Clock | None = None) -> Tile:
        """Give a tile out.

        Args:
            index: Its number.
            clock: Told what computing it or its files take.

        Returns:
            The tile; a damaged file, or one of something else, is replaced.

        Raises:
            StoreError: If the disk refuses.
        """
        if index in self._held:
            return self._held[index]
        path = None if self._folder is None else self._folder / f"{self._label}-{index:05d}.safetensors"
        clock = clock or Clock()
        if self._backing == "disk" and path is not None:
            with clock.of("files"):
                found = read_checked(path, self.plan.keys[index], check=index not in self._trusted)
                read = None if found is None else _unpack(self.plan, *found)
            if read is not None:
                self._trusted.add(index)
                return read
        with clock.of("passes"):
            tile = self.plan.compute(index)
        self.computed += 1
        if self._backing == "disk" and path is not None:
            with clock.of("files"):
                write_checked(path, *_pack(tile, self.plan.keys[index]))
            self._trusted.add(index)
        elif self._backing == "memory":
            self._held[index] = tile
        return tile


def _pack(tile: Tile, key: str) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """Name the tensors of a tile, and say what else it takes to make it of them again."""
    features = tile.features
    named: dict[str, Tensor | None] = {"logits": features.logits, "traces": tile.traces}
    for kind in ("b", "a", "v"):
        named |= {f"{kind}.{index}": tensor for index, tensor in enumerate(getattr(features, kind))}
    for index, factor in enumerate(features.head):
        named |= {f"head.{index}.{kind}": getattr(factor, kind) for kind in ("g", "h", "dense")}
    tensors = {name: tensor for name, tensor in named.items() if tensor is not None}
    return tensors, key, {"biases": [factor.bias for factor in features.head]}


def _unpack(plan: TilePlan, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Tile:
    """Make a tile of its tensors, on the device that features are computed on."""
    there = {name: tensor.to(plan.device) for name, tensor in tensors.items() if name != "traces"}

    def each(kind: str) -> tuple[Tensor | None, ...]:
        return tuple(there.get(f"{kind}.{index}") for index in range(len(plan.sites)))

    def factor(index: int, bias: bool) -> HeadFactor:
        g, h, dense = (there.get(f"head.{index}.{kind}") for kind in ("g", "h", "dense"))
        return HeadFactor(g=g, h=h, dense=dense, bias=bias)

    features = TangentFeatures(
        sites=plan.sites,
        reduction=plan.reduction,
        draws=plan.draws,
        b=tuple(there[f"b.{index}"] for index in range(len(plan.sites))),
        a=each("a"),
        v=each("v"),
        head=tuple(factor(index, bias) for index, bias in enumerate(facts["biases"])),
        logits=there["logits"],
    )
    return Tile(features, tensors["traces"])
