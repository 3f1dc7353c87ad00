"""A cross-fitted linear probe for the output layer: what the head will read, without training the model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from foretune.arrays import Array
from foretune.models.adapted import AdaptedModel, Batch
from foretune.models.head import HeadWeights
from foretune.ntk.capture import Receive, Uses, capture_in_turn
from foretune.ntk.premises import sample_order
from foretune.tasks.objective import Objective, Targets
from foretune.tasks.outputs import identity_reduction


class _OutputLayer:
    """Sink of a pass over the output layer alone."""

    def __init__(self, layer: nn.Linear, n: int, direction: Float[Array, " classes"]) -> None:
        self._uses, self._direction = Uses(layer, n), direction
        self.inputs = torch.empty(0, 0)

    def use(self, _: str, h: Float[Tensor, "n positions p"], __: Float[Tensor, "n positions classes"]) -> Receive:
        return self._uses.use(h)

    def finish(self) -> Iterator[tuple[str, Tensor]]:
        self.inputs = self._uses.read_inputs(self._direction).double().cpu()
        return iter(())  # whatever is not finite here is not finite in the outputs


def head_inputs(
    adapted: AdaptedModel, output: Mapping[str, nn.Linear], batches: Iterable[Batch], *, n: int, n_outputs: int
) -> Float[Tensor, "n p"]:
    """Read the inputs φ of the output layer off the model: logits = V φ + b, whichever position the model pools.

    The backward pass of it is one layer long.

    Args:
        adapted: The model.
        output: Name and module of the output layer.
        batches: Batches that hold every position once.
        n: Number of examples.
        n_outputs: Number of outputs C.

    Returns:
        n × p inputs in float64.
    """
    return join_inputs([read_inputs(adapted, output, batches, n_outputs=n_outputs)], n=n)


@dataclass(frozen=True)
class HeadInputs:
    """Inputs φ of the output layer, of some examples of a sample.

    Attributes:
        rows: Positions of the examples.
        inputs: m × p inputs in float64, on the CPU.
    """

    rows: Int[Tensor, " m"]
    inputs: Float[Tensor, "m p"]


def read_inputs(
    adapted: AdaptedModel, output: Mapping[str, nn.Linear], batches: Iterable[Batch], *, n_outputs: int
) -> HeadInputs | None:
    """Read the inputs φ of the output layer of some of a sample's batches.

    Args:
        adapted: The model.
        output: Name and module of the output layer.
        batches: Batches.
        n_outputs: Number of outputs C.

    Returns:
        The inputs in the order of the batches; None without a batch.
    """
    (layer,) = output.values()
    layer_only = replace(adapted, adapters=(), head=output)
    directions = identity_reduction("output:0", n_outputs).directions
    rows, inputs = [], []
    for batch in batches:
        for places, sink, _ in capture_in_turn(
            layer_only, batch, directions, lambda m: _OutputLayer(layer, m, directions[:, 0])
        ):
            rows.append(batch.rows[places].cpu())
            inputs.append(sink.inputs)
    return HeadInputs(torch.cat(rows), torch.cat(inputs)) if rows else None


def join_inputs(parts: Iterable[HeadInputs | None], *, n: int) -> Float[Tensor, "n p"]:
    """Put the inputs of all examples of a sample in order.

    Args:
        parts: From `read_inputs`.
        n: Number of examples in all.

    Returns:
        n × p inputs.

    Raises:
        KernelError: If the positions are not 0 … n-1.
    """
    held = [part for part in parts if part is not None]
    order = sample_order(torch.cat([torch.empty(0, dtype=torch.long), *(part.rows for part in held)]), n)
    return torch.cat([part.inputs for part in held])[order]


def probe_folds(n: int, *, seed: int, folds: int = 5) -> tuple[NDArray[np.int64], ...]:
    """Split n examples at random into folds for cross-fitting.

    Args:
        n: Number of examples.
        seed: Seed of the split.
        folds: Folds, at most n.

    Returns:
        Positions of each fold.
    """
    from sklearn.model_selection import KFold

    splitter = KFold(min(folds, n), shuffle=True, random_state=seed)
    return tuple(fold for _, fold in splitter.split(np.zeros((n, 1))))


def probe_weights(
    name: str,
    layer: nn.Linear,
    inputs: Tensor,
    objective: Objective,
    targets: Targets,
    *,
    left_out: Sequence[NDArray[np.int64]],
) -> tuple[HeadWeights, ...]:
    """Fit the output layer once for each fold, on the examples outside it.

    A head fitted on the very examples that the kernel is evaluated on leaves residuals that are too small;
    so each example gets a head that has not seen it.

    Args:
        name: Name of the output layer.
        layer: The output layer.
        inputs: n × p inputs φ.
        objective: How the layer is fitted.
        targets: n targets.
        left_out: Positions to leave out, for each head; an empty array for a head on all examples.

    Returns:
        One set of weights for each entry of `left_out`.
    """
    heads = []
    for positions in left_out:
        keep = np.setdiff1d(np.arange(len(targets)), positions)
        weight, bias = objective.fit_output(inputs.numpy()[keep], targets[keep], intercept=layer.bias is not None)
        heads.append(HeadWeights({name: (torch.as_tensor(weight), None if bias is None else torch.as_tensor(bias))}))
    return tuple(heads)


@dataclass(frozen=True)
class CrossFitted:
    """Output layers fitted by cross-fitting.

    Attributes:
        folds: Positions of the examples of each fold.
        heads: For each fold, the layer fitted on the examples outside it.
        whole: The layer fitted on all examples.
    """

    folds: tuple[NDArray[np.int64], ...]
    heads: tuple[HeadWeights, ...]
    whole: HeadWeights


def cross_fit(
    name: str,
    layer: nn.Linear,
    inputs: Float[Tensor, "n p"],
    objective: Objective,
    targets: Targets,
    *,
    seed: int,
) -> CrossFitted:
    """Fit the output layer for each fold of the examples without that fold, and once on all of them.

    Args:
        name: Name of the output layer.
        layer: The output layer.
        inputs: n × p inputs φ.
        objective: How the layer is fitted.
        targets: n targets.
        seed: Seed of the folds.

    Returns:
        The layers.
    """
    folds = probe_folds(len(targets), seed=seed)
    nobody = np.array([], dtype=np.int64)
    *heads, whole = probe_weights(name, layer, inputs, objective, targets, left_out=[*folds, nobody])
    return CrossFitted(folds, tuple(heads), whole)
