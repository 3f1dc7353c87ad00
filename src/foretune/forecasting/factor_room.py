"""Where the token factors of a pass are kept: in memory where a budget lets them, else in files."""

import shutil
import tempfile

import psutil
import torch

from foretune.errors import ConfigError, StoreError
from foretune.models.packed import computing_dtype
from foretune.ntk.mapped import Mapped
from foretune.problem import Plan, memory_of
from foretune.report.folders import disk

GIB = 2**30
_STORED = 2  # bytes of a bfloat16
_SEGMENT = 2**26
_FEWER = "lower --samples, --eval-samples or --max-length, or name fewer --target-modules or --layers"


def factor_bytes(plan: Plan) -> int:
    """Estimate the size of the token factors, rather too high: inputs that several modules share count for each.

    Args:
        plan: Plan of the pass.

    Returns:
        Σ over tokens and modules of (d_in + k·d_out) numbers in bfloat16, k the outputs that a run needs.
    """
    return int(_STORED * sum(int(part.lengths.sum()) for part in plan.encoded) * _width(plan))


def _width(plan: Plan) -> float:
    """Numbers of a token."""
    n_outputs = plan.task.objective.simulated().n_outputs  # whatever the plan's own reduction is
    uses = {} if plan.adapted.layout is None else plan.adapted.layout.positions
    return sum(uses.get(site.name, 1.0) * (site.d_in + n_outputs * site.d_out) for site in plan.adapted.sites)


def _batch_bytes(plan: Plan) -> int:
    """What the largest batch takes: as it comes from the model, and as it is kept."""
    longest = max(int(part.lengths.max()) for part in plan.encoded)
    most = min(plan.settings.batch_size, max(len(part.features) for part in plan.encoded))
    came = computing_dtype(plan.placed).itemsize
    return int((came + _STORED) * most * longest * _width(plan))


def check_room(plan: Plan) -> None:
    """Refuse factors that there is no room for, before the work starts.

    Args:
        plan: Plan of the pass.

    Raises:
        ConfigError: If the memory is too little for a batch, or for all factors where they must be in it: on a GPU,
            and in several processes.
        StoreError: If the disk has not the room.
    """
    needed, device = factor_bytes(plan), plan.classifier.device
    if device.type == "cuda":
        free = free_bytes(device)
        if needed > free:
            raise ConfigError(f"the pass keeps about {_said(needed)}, and {_said(free)} are free on the GPU: {_FEWER}")
        return
    if _fits(plan):
        return
    memory, least = memory_of(plan.settings), _batch_bytes(plan)
    if plan.processes.world > 1:
        raise ConfigError(
            f"the pass keeps about {_said(needed)}, the memory is {_said(memory)}, and several processes keep all in "
            f"it: raise --memory, start one process, {_FEWER}"
        )
    if least > memory:
        raise ConfigError(
            f"memory = {_said(memory)}: a batch of this pass needs {_said(least)} at least; raise --memory, or lower "
            "--batch-size or --max-length"
        )
    folder = tempfile.gettempdir()
    with disk(f"cannot use {folder!r}"):
        free = shutil.disk_usage(folder).free
    if 2 * needed > free:
        raise StoreError(
            f"{folder!r} has {_said(free)} free and {_said(2 * needed)} are needed for what does not fit into the "
            f"memory of {_said(memory)}: name another folder in TMPDIR, raise --memory, {_FEWER}"
        )


def _fits(plan: Plan) -> bool:
    return factor_bytes(plan) + _batch_bytes(plan) <= memory_of(plan.settings)


def files_of(plan: Plan) -> tuple[Mapped | None, Mapped | None]:
    """Decide where factors are kept.

    Args:
        plan: Plan of the pass.

    Returns:
        Files of the batches as they come, and of the factors of whole samples, let go together; None for memory.
    """
    if plan.classifier.device.type == "cuda" or plan.processes.world > 1 or _fits(plan):
        return None, None
    segment = max(_SEGMENT, factor_bytes(plan) // 64)  # few files are open at a time
    spool = Mapped(segment)
    return spool, Mapped(segment, beside=spool)


def free_bytes(device: torch.device) -> int:
    """Say how much memory is free.

    Args:
        device: Where.

    Returns:
        Bytes of the GPU, or of the machine.
    """
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else int(psutil.virtual_memory().available)


def _said(count: int) -> str:
    return f"{count / 10**9:.3g}GB" if count >= 10**8 else f"{count / 10**6:.3g}MB"
