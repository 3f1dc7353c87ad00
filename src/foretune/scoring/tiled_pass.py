"""One pass of a score by tiles of examples."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foretune.arrays import Array
from foretune.models.adapted import Batch
from foretune.models.classifier import Encoded
from foretune.models.head import HeadWeights, installed
from foretune.models.placement import head_modules
from foretune.ntk.clock import Clock, KernelSeconds
from foretune.ntk.feature_sketch import sketch_error, sketch_sites
from foretune.ntk.feature_store import Store, Tile, TilePlan, cut, join_tiles, site_traces
from foretune.ntk.jacobian import batch_features
from foretune.ntk.sketch_pass import batch_sketch
from foretune.ntk.tile_files import digest, tensor_digest
from foretune.ntk.tiles import TiledKernel, tiled_kernel
from foretune.problem import OnBatch, Plan
from foretune.scoring.tiling import Tiling, let_go, new_array
from foretune.stream import stream_groups


@dataclass(frozen=True)
class Headed:
    """Texts and the head under which the features of each are taken.

    Attributes:
        encoded: Tokens.
        heads: Heads with the positions of their texts; together every position once.
    """

    encoded: Encoded
    heads: Sequence[tuple[HeadWeights, NDArray[np.int64]]]


@dataclass(frozen=True)
class TiledPass:
    """Kernels of one pass.

    Attributes:
        train: Kernel of the training samples.
        cross: Kernel of the evaluation rows with them, or None.
        sketch_error: Relative error of a sketched kernel for each draw of A, None without a sketch.
        seconds_kernel: Passes over the training samples and their products.
        seconds_evaluation: The same of the evaluation rows.
        parts: Parts of `seconds_kernel`.
    """

    train: TiledKernel
    cross: TiledKernel | None
    sketch_error: tuple[float, ...] | None
    seconds_kernel: float
    seconds_evaluation: float
    parts: KernelSeconds


def tiled_pass(
    plan: Plan, train: Headed, evaluation: Headed | None, tiling: Tiling, on_batch: OnBatch | None = None
) -> TiledPass:
    """Take features tile by tile and multiply them pair by pair; finished work on the disk is gone on from.

    Args:
        plan: What will be done.
        train: Training samples.
        evaluation: Evaluation rows, or None.
        tiling: Tiles.
        on_batch: Called with the number of examples after each batch.

    Returns:
        The kernels.

    Raises:
        KernelError: If features cannot be taken.
        StoreError: If the disk refuses.
    """
    start, clock = time.perf_counter(), Clock()
    tiles = _tile_plan(plan, train, tiling, on_batch)
    name = digest(*tiles.keys)[:16]
    folder = None if tiling.folder is None else tiling.folder / name
    if folder is not None:
        folder.mkdir(exist_ok=True)
    store = Store(tiles, tiling.backing, folder)
    kernel = tiled_kernel(
        store, folder=folder, allocate=_allocate(tiling, f"{name} train"), release=let_go, clock=clock
    )
    _let_go(kernel)
    error = None
    if plan.settings.sketch is not None:
        error = sketch_error(store.tile(index, clock).features for index in range(len(tiles.spans)))
    seconds_kernel, start = time.perf_counter() - start, time.perf_counter()
    cross = None
    if evaluation is not None:
        of_rows = _tile_plan(plan, evaluation, tiling, on_batch)
        left = Store(of_rows, tiling.backing, folder, label="evaluation")
        cross = tiled_kernel(left, store, folder=folder, allocate=_allocate(tiling, f"{name} cross"), release=let_go)
        _let_go(cross)
    if folder is not None:
        _drop_features(folder)
    return TiledPass(kernel, cross, error, seconds_kernel, time.perf_counter() - start, clock.seconds)


def _allocate(tiling: Tiling, name: str) -> Callable[[tuple[int, ...]], Array]:
    return lambda shape: new_array(tiling, f"{name} {len(shape)}", shape)


def _let_go(kernel: TiledKernel) -> None:
    let_go(kernel.matrices)
    let_go(kernel.head)


def _drop_features(folder: Path) -> None:
    """Features of a pass whose products are all there are of no further use."""
    for label in ("features", "evaluation"):
        for path in folder.glob(f"{label}-*"):
            path.unlink(missing_ok=True)


def _tile_plan(plan: Plan, headed: Headed, tiling: Tiling, on_batch: OnBatch | None) -> TilePlan:
    modules = head_modules(plan.placed) if plan.settings.head != "random" else {}
    n, sketch = len(headed.encoded.features), plan.settings.sketch
    spans = cut(n, tiling.size)

    def parts(span: range) -> Iterator[tuple[Tensor, Tile]]:
        inside = [rows[(rows >= span.start) & (rows < span.stop)] for _, rows in headed.heads]
        for number, batch in stream_groups(plan, headed.encoded, inside, on_batch=on_batch):
            with installed(modules, headed.heads[number][0]):
                yield batch.rows - span.start, _of_batch(plan, batch)

    return TilePlan(
        spans=spans,
        keys=tuple(_tile_key(headed, tiling, span) for span in spans),
        compute=lambda index: join_tiles(parts(spans[index]), len(spans[index])),
        sites=plan.adapted.sites if sketch is None else sketch_sites(plan.adapted.sites, sketch),
        reduction=plan.reduction,
        draws=plan.adapted.draws,
        device=str(plan.classifier.device),
    )


def _of_batch(plan: Plan, batch: Batch) -> Tile:
    """Features of a batch, or their sketch: no more than one batch's features are there for it."""
    if plan.settings.sketch is not None:
        return batch_sketch(plan.adapted, batch, plan.reduction, width=plan.settings.sketch, seed=plan.settings.seed)
    features = batch_features(plan.adapted, batch, plan.reduction)
    return Tile(features, site_traces(features))


def _tile_key(headed: Headed, tiling: Tiling, span: range) -> str:
    """Hash all that the features of a tile follow from: the model, the tokens, and the head of each text."""
    parts = [tiling.key, json.dumps([headed.encoded.features[row] for row in span], sort_keys=True)]
    for head, rows in headed.heads:
        inside = rows[(rows >= span.start) & (rows < span.stop)]
        held: dict[str, torch.Tensor] = {}
        for name, (weight, bias) in head.weights.items():
            held |= {f"{name}.weight": weight} | ({} if bias is None else {f"{name}.bias": bias})
        parts += [tensor_digest(held), repr((inside - span.start).tolist())]
    return digest(*parts)
