"""The batches of a plan's passes, shared by the processes of a command, and the probe that is fitted on them."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from foretune.models.adapted import Batch
from foretune.models.classifier import Encoded, batches, group_rows
from foretune.ntk.probe import CrossFitted, cross_fit, join_inputs, read_inputs
from foretune.problem import OnBatch, Plan
from foretune.tasks.objective import Targets


def stream_batches(plan: Plan, encoded: Encoded, *, on_batch: OnBatch | None = None) -> Iterator[Batch]:
    """Make this process's batches of a pass, and tell of each once it has been used.

    Args:
        plan: Tokenizer, batch size, and who shares the pass.
        encoded: Tokens.
        on_batch: Called with a number of examples after each batch, with that of all examples in all.

    Yields:
        Batches.
    """
    for _, batch in stream_groups(plan, encoded, [np.arange(len(encoded.features))], on_batch=on_batch):
        yield batch


def stream_groups(
    plan: Plan, encoded: Encoded, groups: Sequence[NDArray[np.int64]], *, on_batch: OnBatch | None = None
) -> Iterator[tuple[int, Batch]]:
    """Make this process's batches of several groups of examples, of which no batch holds two.

    The batches are those of one process, shared out by their tokens, padding included: who takes them changes no bit.

    Args:
        plan: Tokenizer, batch size, and who shares the pass.
        encoded: Tokens.
        groups: Positions of the examples of each group.
        on_batch: Called with a number of examples after each batch, with that of all examples in all.

    Yields:
        Number of the group, and a batch of it.
    """
    size, lengths = plan.settings.batch_size, encoded.lengths
    pieces = [
        (number, rows)
        for number, group in enumerate(groups)
        for rows in group_rows(encoded, batch_size=size, rows=group.tolist())
    ]
    mine = plan.processes.share([float(lengths[rows].max()) * len(rows) for _, rows in pieces])
    told = plan.processes.progress([len(pieces[piece][1]) for piece in mine], sum(map(len, groups)))
    for piece, count in zip(mine, told, strict=True):
        number, rows = pieces[piece]
        for batch in batches(encoded, plan.classifier, batch_size=size, rows=rows.tolist()):
            yield number, batch
        if on_batch is not None:
            on_batch(count)


def fit_probe(
    plan: Plan, name: str, layer: nn.Linear, targets: Targets, *, train: Encoded, on_batch: OnBatch | None = None
) -> CrossFitted:
    """Fit the output layer on the samples, cross-fitted, after one forward pass over them.

    Args:
        plan: The model, how the layer is fitted, and who shares the pass.
        name: Name of the output layer.
        layer: The output layer.
        targets: n targets.
        train: Tokens of the n samples.
        on_batch: As in `stream_batches`.

    Returns:
        The layers, the same in all processes.
    """
    objective, processes = plan.task.objective, plan.processes
    stream = stream_batches(plan, train, on_batch=on_batch)
    own = read_inputs(plan.adapted, {name: layer}, stream, n_outputs=objective.n_outputs)
    parts, fitted = processes.collect(own), None
    if processes.is_main:
        inputs = join_inputs(parts, n=len(targets))
        fitted = cross_fit(name, layer, inputs, objective, targets, seed=plan.settings.seed)
    return processes.spread(fitted)
