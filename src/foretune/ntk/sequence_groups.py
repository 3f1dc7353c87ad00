"""Gradients of sequences with respect to parameters of any form: of the modules that hold them, or in a loop.

As of classifiers (`foretune.ntk.general`), with the losses of sequences for outputs. The loop has a forward pass of
each sequence alone, without padding, and a backward pass for each number. It is what the other way is held against, on
two sequences of the sample, before the work starts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from foretune.errors import KernelError, border
from foretune.models.adapted import AdaptedModel, Batch, Layout
from foretune.models.refusals import check_loss
from foretune.ntk.capture import Receive, SharedError, run_logits
from foretune.ntk.features import TangentFeatures, join_features
from foretune.ntk.general import EXACT, HALF, ReduceGroups, agree, grouped, side_by_side, training_alone
from foretune.ntk.premises import check_eval_mode, check_finite, passing_gradients
from foretune.ntk.sequence_losses import SequenceBatch, SequenceLosses
from foretune.ntk.sequence_pass import losses_of, observe_losses
from foretune.tasks.outputs import OutputReduction, identity_reduction


@dataclass(frozen=True)
class Numbers:
    """What is differentiated.

    Attributes:
        reduction: The k numbers, as they are.
        draws: Draws S of the labels.
        seed: Of the draws.
        with_loss: Whether the loss z⁰ is the first of the numbers.
    """

    reduction: OutputReduction
    draws: int
    seed: int
    with_loss: bool


@dataclass(frozen=True)
class Pass:
    """What a pass over a batch of sequences gives.

    Attributes:
        batch: Its sequences.
        features: Makes their features, given what is kept as logits.
        losses: Their losses.
    """

    batch: SequenceBatch
    features: Callable[[Tensor], TangentFeatures]
    losses: SequenceLosses


def group_passes(adapted: AdaptedModel, batch: SequenceBatch, numbers: Numbers) -> Iterator[Pass]:
    """Take the gradients of a batch, all sequences at once where the model's layout allows it.

    Args:
        adapted: Model in eval mode with groups and no head; where nobody has looked at its layout, the loop runs.
        batch: Sequences.
        numbers: What is differentiated.

    Yields:
        Passes, each over a part of the batch.

    Raises:
        KernelError: If the model is not in eval mode, or a gradient or a loss is not finite.
    """
    check_eval_mode(adapted.model)
    layout = adapted.layout or Layout(looped=True)
    for part in batch.singles() if layout.looped or layout.singly else [batch]:
        if layout.looped:
            taken, losses = _gradients(adapted, part, numbers)
            yield _looped(adapted, part, numbers, taken, losses)
        else:
            yield _by_module(adapted, part, numbers)


def _by_module(adapted: AdaptedModel, batch: SequenceBatch, numbers: Numbers) -> Pass:
    n = len(batch.rows)
    sink = ReduceGroups(adapted, n, numbers.reduction)

    def by_sequence(name: str, tensor: Tensor) -> Tensor:
        if n > 1 and (tensor.ndim < 2 or len(tensor) != n):
            raise SharedError(f"module {name!r} does not have the sequences on its first axis: use --batch-size 1")
        return tensor.reshape(n, -1, tensor.shape[-1])

    def use(name: str, h: Tensor, y: Tensor) -> Receive:
        receive = sink.use(name, by_sequence(name, h), by_sequence(name, y))
        return lambda output, gradient: receive(output, by_sequence(name, gradient))

    _, losses = observe_losses(adapted, batch, numbers.draws, use, seed=numbers.seed, with_loss=numbers.with_loss)
    for name, tensor in sink.finish():
        check_finite(f"the gradients of {name!r}", tensor)
    check_finite("the losses", losses.target_losses)
    return Pass(batch, sink.features, losses)


Taken = dict[int, list[Tensor | None]]  # by the identity of a parameter, one for each number


def _gradients(adapted: AdaptedModel, one: SequenceBatch, numbers: Numbers) -> tuple[Taken, SequenceLosses]:
    """Gradients of one sequence's numbers with respect to every parameter, None where they do not depend on it."""
    every = list({id(p): p for group in adapted.groups for p in group.parameters.values()}.values())
    k = numbers.reduction.n_outputs
    with training_alone(adapted.model, every), passing_gradients(adapted.model), torch.enable_grad():
        logits = run_logits(adapted, Batch(one.rows, one.inputs))
        with torch.autocast(logits.device.type, enabled=False):  # mixed precision ends with the forward pass
            losses = losses_of(adapted, logits, one, numbers.draws, seed=numbers.seed)
            outputs = losses.totals[0 if numbers.with_loss else 1 :]
            rows = [
                torch.autograd.grad(outputs[output], every, retain_graph=output + 1 < k, allow_unused=True)
                for output in range(k if outputs.requires_grad else 0)
            ]
    taken: Taken = {id(p): [row[place] for row in rows] for place, p in enumerate(every)}
    return taken, replace(losses, totals=losses.totals.detach())


def _looped(adapted: AdaptedModel, one: SequenceBatch, numbers: Numbers, taken: Taken, losses: SequenceLosses) -> Pass:
    k = numbers.reduction.n_outputs
    v = []
    for group in adapted.groups:
        parts = [
            torch.stack([torch.zeros_like(p) if g is None else g for g in taken[id(p)]]).detach().reshape(k, 1, -1)
            if taken[id(p)]
            else None
            for p in group.parameters.values()
        ]
        v.append(side_by_side(group, parts, k, 1))
        check_finite(f"the gradients of {group.site.name!r}", v[-1])
    check_finite("the losses", losses.target_losses)
    return Pass(one, lambda logits: grouped(adapted, numbers.reduction, v, (), logits), losses)


def find_sequence_layout(adapted: AdaptedModel, batches: Sequence[SequenceBatch]) -> Layout:
    """Decide how the gradients are taken, by trying it.

    Args:
        adapted: Model in eval mode with groups and no head.
        batches: Sequences of the sample with the rows 0 … m−1: a short and a long one in one batch where sequences
            share batches, else one each.

    Returns:
        `looped` unless the modules give the gradients of the loop; `singly` of modules that do not have the sequences
        of a batch on the first axis, all where none share a batch.

    Raises:
        PlacementError: If the adapter's method has a loss of its own.
        KernelError: If the model does not run, no loss depends on a group, or a loss depends on what else a batch
            holds.
    """
    check_eval_mode(adapted.model)
    check_loss(adapted.model)
    numbers = Numbers(identity_reduction("trace", 1), draws=0, seed=0, with_loss=True)
    kind, n = type(adapted.model).__name__, sum(len(batch.rows) for batch in batches)
    with border(KernelError, f"{kind} does not run on a sequence"):
        alone = [(one, *_gradients(adapted, one, numbers)) for batch in batches for one in batch.singles()]
    _check_reached(adapted, [taken for _, taken, _ in alone])
    exact = _joined([_looped(adapted, one, numbers, taken, losses) for one, taken, losses in alone], n)
    for batch in batches:
        if len(batch.rows) > 1:
            _check_apart(adapted, batch, exact.logits[batch.rows], kind)
    try:
        singly = [_singly(adapted, batch) if len(batch.rows) > 1 else list(adapted.modules) for batch in batches]
        layout = Layout(singly=tuple(dict.fromkeys(chain.from_iterable(singly))))
        tried = replace(adapted, layout=layout)
        found = _joined(chain.from_iterable(group_passes(tried, batch, numbers) for batch in batches), n)
    except Exception:  # whatever a module, torch.func or the capture raises: the loop runs
        return Layout(looped=True)
    return layout if agree(found, exact) else Layout(looped=True)


def _joined(passes: Iterable[Pass], n: int) -> TangentFeatures:
    """Features of all sequences, of which the losses are the logits."""
    return join_features(
        ((one.batch.rows, one.features(one.losses.of_each(len(one.batch.rows))[:, None])) for one in passes), n
    )


def _check_reached(adapted: AdaptedModel, taken: Sequence[Taken]) -> None:
    for group in adapted.groups:
        if not any(g is not None for of_one in taken for p in group.parameters.values() for g in of_one[id(p)]):
            raise KernelError(f"no loss depends on {group.site.name!r}: leave it out")


def _check_apart(adapted: AdaptedModel, batch: SequenceBatch, alone: Tensor, kind: str) -> None:
    """Refuse a model of which a sequence's loss is another one beside other sequences."""
    n = len(batch.rows)
    with border(KernelError, f"{kind} does not run on {n} sequences"), torch.no_grad():
        logits = run_logits(adapted, Batch(batch.rows, batch.inputs))
        together = losses_of(adapted, logits, batch, 0, seed=0).of_each(n)[:, None]
    change = float((together - alone).norm() / alone.norm()) if bool(alone.any()) else 0.0
    every = list(adapted.model.parameters())
    rounded = any(not p.is_floating_point() or torch.finfo(p.dtype).eps > 1e-6 for p in every)
    if change > (HALF if rounded else EXACT):
        raise KernelError(
            f"the losses of {kind} depend on the batch: those of a sequence alone and padded beside another differ by "
            f"{100 * change:.2g}%, and so would the kernel: use --batch-size 1"
        )


def _singly(adapted: AdaptedModel, batch: SequenceBatch) -> list[str]:
    """Modules that do not have the sequences on the first axis."""
    found = []

    def note(first: int) -> Callable[[str, Tensor, Tensor], Receive]:
        def use(name: str, h: Tensor, y: Tensor) -> Receive:
            if any(tensor.ndim < 2 or len(tensor) != first for tensor in (h, y)):
                found.append(name)
            return lambda *_: None

        return use

    for part in (batch, *batch.singles()):  # a table of as many rows as sequences would pass for them
        # without a number to differentiate there is no pass backward
        observe_losses(adapted, part, 0, note(len(part.rows)), seed=0, with_loss=False)
    return found


def mean_gradients(adapted: AdaptedModel, batches: Iterable[SequenceBatch]) -> tuple[Tensor, ...]:
    """Take the gradient of the mean loss a token, with one pass backward for each batch.

    Args:
        adapted: Model in eval mode with groups.
        batches: Sequences.

    Returns:
        Σ_i ∇z_i / Σ_i T_i of each parameter of the groups.

    Raises:
        KernelError: If the model is not in eval mode, or a gradient is not finite.
    """
    check_eval_mode(adapted.model)
    every = [p for group in adapted.groups for p in group.parameters.values()]
    sums, count = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in every], 0
    for batch in batches:
        with training_alone(adapted.model, every), passing_gradients(adapted.model), torch.enable_grad():
            logits = run_logits(adapted, Batch(batch.rows, batch.inputs))
            with torch.autocast(logits.device.type, enabled=False):  # mixed precision ends with the forward pass
                losses = losses_of(adapted, logits, batch, 0, seed=0)
                taken = torch.autograd.grad(losses.totals[0], every, allow_unused=True)
        count += len(losses.target_losses)
        for total, gradient in zip(sums, taken, strict=True):
            if gradient is not None:
                total += gradient.detach()
    for group_sum in sums:
        check_finite("the gradients of what trains", group_sum)
    return tuple(total / max(1, count) for total in sums)
