"""A cross-fitted linear probe for the output layer: what the head will read, without training the model."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import KFold
from torch import Tensor, nn

from foretune.errors import KernelError
from foretune.models.adapted import AdaptedModel, Batch
from foretune.models.head import HeadWeights
from foretune.ntk.jacobian import tangent_features
from foretune.tasks.objective import Objective, Targets
from foretune.tasks.outputs import identity_reduction


def head_inputs(
    adapted: AdaptedModel, output: Mapping[str, nn.Linear], batches: Iterable[Batch], *, n: int, n_outputs: int
) -> Tensor:
    """Read the inputs φ of the output layer off the model: logits = V φ + b at one position of each text.

    ∂f_0/∂V_0 = φ, so the tangent pass over the output layer alone finds them, whichever position the model
    pools; its backward pass is one layer long.

    Args:
        adapted: The model.
        output: Name and module of the output layer.
        batches: Batches that hold every position once.
        n: Number of examples.
        n_outputs: Number of outputs C.

    Returns:
        n × p inputs in float64.

    Raises:
        KernelError: If the layer's gradient has another form.
    """
    layer_only = AdaptedModel(adapted.model, (), 1, output, adapted.forward)
    factor = tangent_features(layer_only, batches, identity_reduction("output:0", n_outputs), n=n).head[0]
    if factor.h is not None:
        return factor.h.double().cpu()
    if factor.dense is None:
        raise KernelError("the output layer has no inputs")
    (layer,) = output.values()
    return factor.dense[0, :, : layer.in_features].double().cpu()


def probe_folds(n: int, *, seed: int, folds: int = 5) -> tuple[NDArray[np.int64], ...]:
    """Split n examples at random into folds for cross-fitting.

    Args:
        n: Number of examples.
        seed: Seed of the split.
        folds: Folds, at most n.

    Returns:
        Positions of each fold.
    """
    splitter = KFold(min(folds, n), shuffle=True, random_state=seed)
    return tuple(held for _, held in splitter.split(np.zeros((n, 1))))


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
