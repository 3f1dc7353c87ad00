"""Kernels of many examples, pair of tiles by pair of tiles: memory holds two tiles of features and one product.

`pairs` lists what has to be multiplied, `multiply` does one pair, and `tiled_kernel` puts the products in their places;
whoever shares the pairs out among processes shares the list.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64

from foretune.arrays import Array
from foretune.ntk.clock import Clock
from foretune.ntk.feature_store import Store, Tile
from foretune.ntk.kernel import summed_kernel
from foretune.ntk.tile_files import digest, read_checked, write_checked

Allocate = Callable[[tuple[int, ...]], Array]  # an array of float64 of a shape, whatever its content


@dataclass(frozen=True)
class Product:
    """The kernel between two tiles, and what is known of the first of them.

    Attributes:
        total: D × m × n kernel, summed over the sites.
        head: m × n kernel of the trained head, or None.
        traces: M × D traces of the sites' blocks of the first tile, None but in the first pair that it is in.
        logits: m × C initial outputs of the first tile, float64, None as the traces.
        epsilon: Machine epsilon of the features.
    """

    total: Float64[Array, "draws m n"]
    head: Float64[Array, "m n"] | None
    traces: Float64[Array, "sites draws"] | None
    logits: Float64[Array, "m classes"] | None
    epsilon: float


@dataclass(frozen=True)
class TiledKernel:
    """Kernel between two samples of m and n examples, the sites summed.

    Attributes:
        matrices: D × m·k × n·k float64, one for each draw of A, without the head.
        head: m·k × n·k kernel of the trained head, or None.
        site_traces: M × D traces of the sites' blocks of the first sample with itself; of its
            features before they were sketched.
        logits: m × C initial outputs of the first sample.
        epsilon: Machine epsilon of the features.
    """

    matrices: Float64[Array, "draws m n"]
    head: Float64[Array, "m n"] | None
    site_traces: Float64[Array, "sites draws"]
    logits: Float64[Array, "m classes"]
    epsilon: float


def pairs(n_left: int, n_right: int | None = None) -> list[tuple[int, int]]:
    """List the pairs of tiles to multiply, those with one first tile after each other.

    Args:
        n_left: Tiles of the rows.
        n_right: Tiles of the columns; None for a kernel of a sample with itself, whose every pair is taken once.

    Returns:
        Numbers (i, j): i ≤ j < n_left without `n_right`, else all.
    """
    if n_right is None:
        return [(i, j) for i in range(n_left) for j in range(i, n_left)]
    return [(i, j) for i in range(n_left) for j in range(n_right)]


def multiply(left: Tile, right: Tile | None, *, first: bool) -> Product:
    """Multiply the features of one pair of tiles.

    Args:
        left: Tile of the rows.
        right: Tile of the columns; None takes `left` (exactly symmetric result).
        first: Whether it is the first pair of `left`, and traces and outputs are kept.

    Returns:
        The product.

    Raises:
        KernelError: If the features do not belong together.
    """
    total, head = summed_kernel(left.features, None if right is None else right.features)
    logits = left.features.logits
    return Product(
        total=total,
        head=head,
        # copies: a view would keep all of a mapped tile in memory
        traces=np.array(left.traces.numpy()) if first else None,
        logits=np.array(logits.double().cpu().numpy()) if first else None,
        epsilon=float(torch.finfo(logits.dtype).eps),
    )


def tiled_kernel(
    left: Store,
    right: Store | None = None,
    *,
    folder: Path | None = None,
    allocate: Allocate = np.empty,
    clock: Clock | None = None,
    release: Callable[[Array], None] = lambda _: None,
) -> TiledKernel:
    """Compute a kernel by tiles: up to the order of the sums `tangent_kernel(...).matrices()`.

    Args:
        left: Features of the rows.
        right: Features of the columns; None takes those of `left`, and every pair is multiplied once.
        folder: Where finished products are kept, and taken from where they are whole and of the same tiles; None keeps
            none.
        allocate: Makes the arrays that the kernels are put into.
        clock: Told what passes, products and files take.
        release: Called with each of them after every product, to give back the memory of what is mapped.

    Returns:
        The kernel.

    Raises:
        KernelError: If the features do not belong together.
        StoreError: If the disk refuses.
    """
    other = left if right is None else right
    k, draws = left.plan.reduction.rows_per_example, left.plan.draws
    shape = (left.plan.n * k, other.plan.n * k)
    matrices, head, epsilon = allocate((draws, *shape)), None, 0.0
    traces: list[Array] = []
    logits: list[Array] = []
    every = pairs(len(left.plan.spans), None if right is None else len(right.plan.spans))
    for (i, j), product in _products(left, right, every, folder, clock or Clock()):
        rows, columns = _expanded(left.plan.spans[i], k), _expanded(other.plan.spans[j], k)
        if head is None and product.head is not None:
            head = allocate(shape)
        for target, part in ((matrices, product.total), (head, product.head)):
            if target is None or part is None:
                continue
            target[..., rows, columns] = part
            if right is None and i != j:
                target[..., columns, rows] = part.swapaxes(-2, -1)
            release(target)
        if product.logits is not None and product.traces is not None:
            epsilon = product.epsilon
            traces.append(product.traces)
            logits.append(product.logits)
    return TiledKernel(matrices, head, np.sum(traces, axis=0), np.concatenate(logits), epsilon)


def _expanded(span: range, k: int) -> slice:
    return slice(span.start * k, span.stop * k)


def _products(
    left: Store, right: Store | None, every: list[tuple[int, int]], folder: Path | None, clock: Clock
) -> Iterator[tuple[tuple[int, int], Product]]:
    """Products of the pairs: those that are finished from their files, the others computed and kept."""
    other, label = (left, "product") if right is None else (right, "cross")
    for i, of_row in groupby(every, key=lambda pair: pair[0]):
        tile: Tile | None = None
        for count, (_, j) in enumerate(of_row):
            key = digest(label, left.plan.keys[i], other.plan.keys[j], str(count == 0))
            path = None if folder is None else folder / f"{label}-{i:05d}-{j:05d}.safetensors"
            product = None
            if path is not None:
                with clock.of("files"):
                    product = _read(path, key)
            if product is None:
                tile = left.tile(i, clock) if tile is None else tile
                with_tile = None if right is None and i == j else other.tile(j, clock)
                with clock.of("products"):
                    product = multiply(tile, with_tile, first=count == 0)
                if path is not None:
                    with clock.of("files"):
                        _write(path, product, key)
            yield (i, j), product


def _write(path: Path, product: Product, key: str) -> None:
    named = {name: getattr(product, name) for name in ("total", "head", "traces", "logits")}
    tensors = {name: torch.from_numpy(array) for name, array in named.items() if array is not None}
    write_checked(path, tensors, key, {"epsilon": product.epsilon})


def _read(path: Path, key: str) -> Product | None:
    found = read_checked(path, key)
    if found is None:
        return None
    tensors, facts = found
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return Product(
        arrays["total"], arrays.get("head"), arrays.get("traces"), arrays.get("logits"), float(facts["epsilon"])
    )
