"""Whether examples may share a batch, and how a model lays them out: looked up once, on two examples.

A kernel must not depend on the batches. It does where padding reaches the outputs (FNet mixes all positions, ConvBERT
and Nyströmformer some) or where a classifier reads the last position, padding or not (XLNet). And a gradient of one
example can only be read off a batch where a module has the examples on its first axis.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from foretune.errors import KernelError, border
from foretune.models.adapted import AdaptedModel, Batch, Group, Layout
from foretune.models.classifier import Classifier, Encoded, batches
from foretune.models.packed import holds_packed
from foretune.ntk.capture import Directions, Receive, observe
from foretune.ntk.general import idle_groups, runs_by_module
from foretune.ntk.jacobian import batch_features
from foretune.ntk.premises import check_eval_mode
from foretune.tasks.outputs import identity_reduction

ROUNDING = 1e-5  # relative change of outputs or gradients that float32 explains in any model
CERTAIN = 3e-3  # that it explains in none; between the two, float64 decides
HALF = 1e-1  # that half precision explains
LARGEST = 2 * 10**8  # parameters of a model that is run in float64 to decide


def find_layout(
    adapted: AdaptedModel, classifier: Classifier, encoded: Sequence[Encoded], *, n_outputs: int, batch_size: int
) -> Layout:
    """Run a short example alone and beside a longer one, and compare.

    Args:
        adapted: Model in eval mode with its adapters.
        classifier: Whose tokenizer pads.
        encoded: Texts of the passes to come; of one of them, the shortest and the longest text are taken.
        n_outputs: Outputs C.
        batch_size: Texts in a batch of these passes; with 1 nothing is compared.

    Returns:
        The layout.

    Raises:
        KernelError: If the model does not run, or batches have more than one example and the short example's outputs
            or gradients depend on the batch.
    """
    check_eval_mode(adapted.model)
    sample = max(encoded, key=lambda sample: int(sample.lengths.max() - sample.lengths.min()))
    short, long = int(sample.lengths.argmin()), int(sample.lengths.argmax())
    # with texts of one length there is no padding to reach the outputs
    other = long if long != short else next((row for row in range(len(sample.features)) if row != short), None)
    other = None if batch_size == 1 else other
    (one,) = batches(sample, classifier, batch_size=1, rows=[short])
    tokens = max(1, int(sample.lengths[short]))
    with border(KernelError, f"{_name(classifier)} does not run on a text of {tokens} tokens"):
        if adapted.groups:
            (some,) = batches(sample, classifier, batch_size=2, rows=[short] if other is None else [short, other])
            adapted = _with_engine(adapted, one, some, n_outputs)
        alone = _look(adapted, one, np.ones((n_outputs, 1)))
    # of a table that all examples share, such as relative positions, a text reads twice its length at most
    positions = {
        name: sum(min(shape[:-1].numel(), 2 * tokens) for shape in of_site) / tokens
        for name, of_site in alone.shapes.items()
    }
    looped = adapted.layout is not None and adapted.layout.looped
    idle = (*adapted.layout.idle, *alone.idle) if adapted.layout is not None else alone.idle
    used = tuple(adapter for adapter in adapted.adapters if adapter.site.name not in idle)
    groups = used_groups(adapted.groups, idle)
    if not used and not groups:
        raise KernelError(f"the outputs do not depend on {adapted.sites[0].name!r} or anything else that trains")
    if other is None:
        return Layout((), idle, positions, looped)
    forward_only = np.empty((n_outputs, 0))
    (both,) = batches(sample, classifier, batch_size=2, rows=[short, other])
    with border(KernelError, f"{_name(classifier)} does not run on two texts, one of {tokens} tokens"):
        together = _look(adapted, both, forward_only)
    singly = tuple(name for name, of_site in alone.shapes.items() if not _first_axis(of_site, together.shapes[name]))
    layout = Layout(singly, idle, positions, looped)
    checked = replace(adapted, adapters=used, head={}, layout=layout, groups=groups)
    place = both.rows.tolist().index(short)
    reduction = identity_reduction("output:0", n_outputs)  # one of them tells

    def change() -> float:
        own, beside = (batch_features(checked, batch, reduction) for batch in (one, both))
        # texts that go one at a time never met
        logits = _look(adapted, both, forward_only).logits if singly or looped else beside.logits
        if looped:  # modules that did not run by themselves may mix examples: the other one may change alone
            (second,) = batches(sample, classifier, batch_size=1, rows=[other])
            longer = [_look(adapted, second, forward_only).logits[0]], [logits[1 - place]]
        gradients = [part[:, 0] for part in own.gradients], [part[:, place] for part in beside.gradients]
        changes = [_change([own.logits[0]], [logits[place]]), _change(*gradients)]
        return max([*changes, _change(*longer)] if looped else changes)

    change_of_outputs = change()
    if _leaks(change_of_outputs, change, adapted.model):
        raise KernelError(
            f"the outputs of {_name(classifier)} depend on the batch: those of a text alone and padded beside another, "
            f"or their gradients, differ by {100 * change_of_outputs:.2g}%, and so would the kernel: use --batch-size 1"
        )
    return layout


def _with_engine(adapted: AdaptedModel, one: Batch, some: Batch, n_outputs: int) -> AdaptedModel:
    """Decide how the gradients of groups are taken."""
    reduction = identity_reduction("output:0", n_outputs)
    if runs_by_module(adapted, some, reduction):
        return replace(adapted, layout=None)
    return replace(adapted, layout=Layout(idle=idle_groups(adapted, one), looped=True))


def used_groups(groups: Sequence[Group], idle: Sequence[str]) -> tuple[Group, ...]:
    """Leave out the groups that no outputs depend on.

    Args:
        groups: Of a model.
        idle: Modules and groups that no outputs depend on.

    Returns:
        The others.
    """
    return tuple(
        group
        for group in groups
        if group.site.name not in idle and not (group.modules and set(group.modules) <= set(idle))
    )


def _name(classifier: Classifier) -> str:
    return type(classifier.model).__name__


def _first_axis(alone: Sequence[torch.Size], together: Sequence[torch.Size]) -> bool:
    return all(shape[0] == 1 for shape in alone) and all(len(shape) > 1 and shape[0] == 2 for shape in together)


@dataclass(frozen=True)
class _Seen:
    """Logits, the shapes of the inputs of each use of each module, and modules that the logits do not depend on."""

    logits: Tensor
    shapes: Mapping[str, Sequence[torch.Size]]
    idle: tuple[str, ...]


def _look(adapted: AdaptedModel, batch: Batch, directions: Directions) -> _Seen:
    shapes: dict[str, list[torch.Size]] = {name: [] for name in adapted.modules}

    def note(name: str, h: Tensor, _: Tensor) -> Receive:
        shapes[name].append(h.shape)
        return lambda *_: None

    observed = observe(adapted, batch, directions, note)
    return _Seen(observed.logits, shapes, tuple(name for name in shapes if name not in observed.reached))


def _change(alone: Sequence[Tensor], together: Sequence[Tensor]) -> float:
    """‖together - alone‖ / ‖alone‖; 0 where something is not finite, for the pass says where that comes from."""
    one, other = (torch.cat([part.detach().double().flatten() for part in parts]) for parts in (alone, together))
    size = float(one.norm()) if one.numel() and bool(torch.isfinite(one).all() and torch.isfinite(other).all()) else 0.0
    return float((other - one).norm()) / size if size > 0 else 0.0


def _leaks(change_of_outputs: float, change: Callable[[], float], model: nn.Module) -> bool:
    """Whether a change is more than rounding."""
    every = [*model.parameters(), *model.buffers()]
    tensors = [tensor for tensor in every if tensor.is_floating_point()]
    integers = any(not parameter.is_floating_point() for parameter in model.parameters())  # inputs may be rounded too
    if integers or any(torch.finfo(tensor.dtype).eps > 1e-6 for tensor in tensors):
        return change_of_outputs > HALF
    if change_of_outputs <= ROUNDING or change_of_outputs > CERTAIN:
        return change_of_outputs > CERTAIN
    if holds_packed(model) or sum(tensor.numel() for tensor in tensors) > LARGEST:
        return change_of_outputs > CERTAIN / 3.0
    try:
        with _in_float64(tensors):
            exact = change()
    except (RuntimeError, KernelError):  # kernels of experts, say, know no float64
        return change_of_outputs > CERTAIN / 3.0
    return exact > change_of_outputs / 3.0  # rounding would all but vanish


@contextmanager
def _in_float64(tensors: Sequence[Tensor]) -> Iterator[None]:
    before = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.double()
        yield
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data
