"""How many samples are scored in a budget of memory: tiles, where features and kernels are kept, what to go on from."""

import hashlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foretune.arrays import Array
from foretune.errors import ConfigError, StoreError
from foretune.models.identity import fingerprint
from foretune.models.packed import computing_dtype
from foretune.models.sites import split_name
from foretune.models.tuner import is_base
from foretune.ntk.feature_sketch import feature_width
from foretune.ntk.feature_store import Backing
from foretune.ntk.large_spectrum import DENSE
from foretune.ntk.sketch_pass import by_products
from foretune.ntk.tile_files import digest, tensor_digest
from foretune.problem import Plan, memory_of
from foretune.report.folders import beside as hidden_beside
from foretune.report.folders import disk, hold, place_of, remove
from foretune.report.provenance import versions
from foretune.report.store import check_writable, make_folder

AGAIN = "none"  # for `scratch`: what does not fit is computed again
_FLOAT = 8
_SKETCH = 4  # bytes of a number of a sketch, at least
_ENDING = ".foretune-scratch"
_LARGEST_TILE = 1024  # examples; more make products no faster


@dataclass(frozen=True)
class Tiling:
    """How a score of many samples is cut.

    Attributes:
        size: Examples of a tile.
        backing: Where features are kept.
        mapped: Whether kernels lie in files that are mapped, instead of in memory.
        folder: Of all files; None where there are none.
        key: Digest of the model, its adapter and all else that features follow from but the texts.
    """

    size: int
    backing: Backing
    mapped: bool
    folder: Path | None
    key: str


@dataclass(frozen=True)
class _Needs:
    """Bytes that a score takes.

    Attributes:
        example: Features of an example.
        layout: What an example's features are laid out in when they are multiplied, and what a tile is written from.
        batch: Features of a batch that are formed before they are sketched.
        examples: Training and evaluation rows.
        kernels: All kernels of one pass.
        algebra: Beside a kernel, to work on it.
        products: Files of the finished products of all passes.
    """

    example: int
    layout: int
    batch: int
    examples: int
    kernels: int
    algebra: int
    products: int


def _needs(plan: Plan) -> _Needs:
    settings, reduction, adapters = plan.settings, plan.reduction, plan.adapted.adapters
    size = computing_dtype(plan.placed).itemsize
    never_formed = () if settings.sketch is None else by_products(plan.adapted, settings.sketch)
    widths = [len(one.rows) * one.site.d_out for one in adapters] + [0]
    shared = sum(0 if one.b is None else one.site.rank * one.site.d_in for one in adapters)
    shared += sum(site.others for site in plan.adapted.sites if site.name not in never_formed)
    head = sum(p.numel() for module in plan.adapted.head.values() for p in module.parameters())
    outputs, k = reduction.n_outputs, reduction.rows_per_example
    plain = outputs * (sum(widths) + shared + head) * size
    numbers = 0 if settings.sketch is None else settings.sketch * plan.adapted.draws
    sketch = outputs * (numbers * max(size, _SKETCH) + head * size) if numbers else 0
    widest = numbers or max(max(widths), shared)
    n, m = settings.samples * k, 0 if plan.evaluation is None else len(plan.evaluation.features) * k
    matrices = plan.adapted.draws + bool(plan.adapted.head)
    passes = settings.repeats * (settings.heads if settings.head == "average" else 1)
    return _Needs(
        example=sketch or plain,
        # two sides in float64, and the bytes of a file
        layout=2 * _FLOAT * outputs * widest + (sketch or plain),
        # once more while they are given their signs
        batch=2 * min(settings.batch_size, settings.samples) * plain if numbers else 0,
        examples=settings.samples + m // k,
        kernels=_FLOAT * matrices * n * (n + m),
        algebra=_FLOAT * n * n * (4 if n <= DENSE else 1),
        products=_FLOAT * passes * matrices * n * (n // 2 + n // 8 + m),
    )


def plan_tiles(plan: Plan, output: Path | None = None) -> Tiling | None:
    """Decide how a score is cut, before the work starts.

    Args:
        plan: What will be done.
        output: Folder of the run, beside which files may be kept.

    Returns:
        None where all features and every site's kernel fit into the memory at once, and the kernel is small enough to
        be decomposed.

    Raises:
        ConfigError: If the memory is too little for one tile, or a sketch is wider than the features.
        StoreError: If the disk has not the room that is needed.
    """
    settings, needs, memory = plan.settings, _needs(plan), memory_of(plan.settings)
    _check_sketch(plan)
    n = settings.samples
    rows = n * plan.reduction.rows_per_example
    at_once = n * needs.example + _FLOAT * (len(plan.adapted.sites) + 2) * plan.adapted.draws * rows * rows
    if settings.sketch is None and rows <= DENSE and at_once <= memory:
        return None
    half = memory // 2
    mapped = needs.kernels + needs.algebra > half
    least = min(settings.batch_size, n)
    in_memory = max(needs.examples * needs.example, least * needs.layout + needs.batch) <= half // 2
    room = (half // 2 if in_memory else half) - needs.batch
    each = needs.layout if in_memory else 2 * needs.example + needs.layout
    if max(needs.algebra, least * each + needs.batch) > half:
        wanted = 2 * max(needs.algebra, least * (2 * needs.example + needs.layout) + needs.batch)
        remedy = "raise --memory" + ("" if needs.algebra > half else " or lower --batch-size")
        raise ConfigError(
            f"memory = {_said(memory)}: {n:,} samples of this adapter need {_said(wanted)} at least; {remedy}"
        )
    size = min(n, room // each, _LARGEST_TILE)
    again = settings.scratch == AGAIN
    backing: Backing = "memory" if in_memory else "recompute" if again else "disk"
    key = _content_key(plan, size)
    if again and not mapped:
        return Tiling(size, backing, False, None, key)
    if in_memory and not mapped and rows <= DENSE:
        return Tiling(size, backing, False, None, key)
    folder = _scratch(None if again else settings.scratch, output) / key[:20]
    wanted = needs.products + (2 * needs.kernels if mapped else 0)
    wanted += needs.examples * needs.example if backing == "disk" else 0
    _check_room(folder, wanted)
    return Tiling(size, backing, mapped, folder, key)


def _check_sketch(plan: Plan) -> None:
    sketch = plan.settings.sketch
    if sketch is None:
        return
    outputs = 1 if plan.reduction.block else plan.reduction.n_outputs
    of_a = any(adapter.b is not None for adapter in plan.adapted.adapters)
    width = feature_width(plan.adapted.sites, of_a=of_a, outputs=outputs)
    if sketch > width:
        raise ConfigError(f"sketch = {sketch:,}: there are {width:,} features, which is exact; leave the sketch out")
    if sketch % 2:
        raise ConfigError(f"sketch = {sketch:,}: must be even, for two halves that tell its error")


def _said(count: int) -> str:
    return f"{count / 10**9:.3g}GB" if count >= 10**8 else f"{count / 10**6:.3g}MB"


def _scratch(given: str | None, output: Path | None) -> Path:
    """The folder that is named, one hidden beside the run's, or the user's own among the system's temporary ones."""
    if given is not None:
        return place_of(Path(given))
    if output is not None:
        return hidden_beside(place_of(output), _ENDING)
    user = os.getuid() if hasattr(os, "getuid") else 0
    own = Path(tempfile.gettempdir()) / f"foretune-scratch-{user}"
    with disk(f"cannot write to {str(own)!r}", "name a folder with --scratch"):
        own.mkdir(mode=0o700, exist_ok=True)
        if hasattr(os, "getuid") and own.stat().st_uid != user:
            raise StoreError(f"{str(own)!r} belongs to somebody else: name a folder with --scratch")
    return own


def _check_room(folder: Path, wanted: int) -> None:
    """Refuse a disk without room; what an earlier run left there for this one counts as room."""
    check_writable(folder)
    with disk(f"cannot use {str(folder)!r}"):
        held = sum(path.stat().st_size for path in folder.glob("**/*") if path.is_file()) if folder.is_dir() else 0
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
    if wanted > free + held:
        raise StoreError(
            f"scratch folder {str(folder)!r} has {_said(free)} free and {_said(wanted)} are needed: name another with "
            f"--scratch, raise --memory, or --scratch {AGAIN} to compute features again"
        )


def _content_key(plan: Plan, size: int) -> str:
    """Hash all that features follow from beside the texts: weights, adapter, draws of A, reduction, types, versions."""
    held = {f"rows {one.site.name}": one.rows for one in plan.adapted.adapters}
    held |= {f"b {one.site.name}": one.b for one in plan.adapted.adapters if one.b is not None}
    for name, parameter in plan.placed.named_parameters():
        if not is_base(name) or split_name(name)[0] is None:
            held[name] = parameter
    facts = (
        fingerprint(plan.placed),
        tensor_digest(held),
        repr(plan.adapted.sites),
        repr([list(module.state_dict()) for module in plan.adapted.head.values()]),
        plan.reduction.name,
        plan.classifier.source,
        str(plan.classifier.device),
        repr({name: getattr(plan.settings, name) for name in ("sketch", "seed", "batch_size", "ntk_params")}),
        repr(sorted(versions().items())),
        str(size),
    )
    return digest(*facts)


@contextmanager
def scratch_of(tiling: Tiling | None) -> Iterator[None]:
    """Hold the folder of a score's files, and remove it when the score is done; a killed or failed one leaves it.

    Args:
        tiling: How the score is cut, None for one that is not.

    Yields:
        Nothing.

    Raises:
        StoreError: If another run holds the folder, or the disk refuses.
    """
    if tiling is None or tiling.folder is None:
        yield
        return
    folder = tiling.folder
    with hold(folder):
        make_folder(folder)
        yield
        with disk(f"cannot remove {str(folder)!r}"):
            remove(folder)  # kernels that are mapped live on until nobody uses them
            if folder.parent.name.endswith(_ENDING) and set(os.listdir(folder.parent)) <= {
                f".{folder.name}.foretune-lock"
            }:
                remove(folder.parent)


def new_array(tiling: Tiling, name: str, shape: tuple[int, ...]) -> Array:
    """Make an array for a kernel.

    Args:
        tiling: Says whether it is mapped.
        name: Of its file.
        shape: Its shape.

    Returns:
        float64, of any content.
    """
    if not tiling.mapped or tiling.folder is None:
        return np.empty(shape)
    name = f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npy"
    with disk(f"cannot write {str(tiling.folder / name)!r}"):
        (tiling.folder / name).unlink(missing_ok=True)  # one that is still mapped stays as it is
        mapped: Array = np.lib.format.open_memmap(tiling.folder / name, mode="w+", dtype=np.float64, shape=shape)
    return mapped


def let_go(array: Array | None) -> None:
    """Give the memory of a mapped kernel back; what is needed again comes from its file.

    Args:
        array: A kernel; nothing is done with one that is not mapped.
    """
    held: Any = array
    while held is not None and not isinstance(held, mmap.mmap):
        held = getattr(held, "base", None)
    if held is not None and hasattr(mmap, "MADV_DONTNEED"):
        held.madvise(mmap.MADV_DONTNEED)  # of a shared file, so that what was written stays
