"""A cross-fitted linear probe for the output layer: what the head will read, without training."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from torch import Tensor, nn

from foretune.arrays import Array, Labels
from foretune.errors import ConfigError
from foretune.models.adapted import AdaptedModel, Batch
from foretune.models.head import HeadWeights
from foretune.ntk.capture import Receive, Uses, capture_in_turn
from foretune.ntk.premises import sample_order
from foretune.tasks.outputs import output_reduction


class _OutputLayer:
    """Sink of a pass over the output layer alone."""

    def __init__(self, layer: nn.Linear, n: int, direction: Float[Array, " classes"]) -> None:
        self._uses, self._direction = Uses(layer, n), direction
        self.inputs = torch.empty(0, 0)

    def use(self, _: str, h: Float[Tensor, "n positions p"]) -> Receive:
        return self._uses.use(h)

    def finish(self) -> Iterator[tuple[str, Tensor]]:
        self.inputs = self._uses.read_inputs(self._direction).double().cpu()
        return iter(())  # whatever is not finite here is not finite in the outputs


def head_inputs(
    adapted: AdaptedModel, output: Mapping[str, nn.Linear], batches: Iterable[Batch], *, n: int, n_classes: int
) -> Float[Tensor, "n p"]:
    """Read the inputs φ of the output layer off the model: logits = V φ + b, whichever position the model pools.

    The backward pass of it is one layer long.

    Args:
        adapted: The model.
        output: Name and module of the output layer.
        batches: Batches that hold every position once.
        n: Number of examples.
        n_classes: Number of logits C.

    Returns:
        n × p inputs in float64.
    """
    (layer,) = output.values()
    layer_only = replace(adapted, adapters=(), head=output)
    directions = output_reduction("class:0", n_classes).directions
    rows, inputs = [torch.empty(0, dtype=torch.long)], []
    for batch in batches:
        for places, sink, _ in capture_in_turn(
            layer_only, batch, directions, lambda m: _OutputLayer(layer, m, directions[:, 0])
        ):
            rows.append(batch.rows[places].cpu())
            inputs.append(sink.inputs)
    order = sample_order(torch.cat(rows), n)
    return torch.cat(inputs)[order]


def fit_probe(inputs: Array, labels: Labels, *, n_classes: int, intercept: bool) -> tuple[Array, Array | None]:
    """Fit a multinomial logistic regression, L2-regularised on standardised inputs of unit total variance.

    Args:
        inputs: n × p inputs φ.
        labels: n classes, of which some of 0 … C-1 may be absent.
        n_classes: C.
        intercept: Whether the layer has a bias.

    Returns:
        C × p weights and C biases (None without intercept) for the inputs as they are. An absent class has
        zero weights and a bias as if half an example of it had been seen.

    Raises:
        ConfigError: If the labels hold a single class.
    """
    present = np.unique(labels)
    if len(present) < 2:
        raise ConfigError("a probe head needs samples of 2 classes: draw more samples or use --head random")
    centre = inputs.mean(0) if intercept else np.zeros(inputs.shape[1])
    spread = inputs.std(0)
    scale = np.where(spread > 1e-12 * max(1.0, float(np.abs(inputs).max())), spread, np.inf) * np.sqrt(inputs.shape[1])
    fit = LogisticRegression(C=1.0, fit_intercept=intercept, max_iter=1000)
    fit.fit((inputs - centre) / scale, labels)
    coefficients, biases = fit.coef_, np.broadcast_to(np.asarray(fit.intercept_, float), len(fit.coef_))
    if len(present) == 2:  # scikit-learn keeps one row, the difference of the two logits
        coefficients = np.vstack([-coefficients, coefficients]) / 2
        biases = np.concatenate([-biases, biases]) / 2
    weight = np.zeros((n_classes, inputs.shape[1]))
    weight[present] = coefficients / scale
    if not intercept:
        return weight, None
    bias = np.full(n_classes, -np.log(2.0 * len(labels) / len(present)))
    bias[present] = biases - weight[present] @ centre
    return weight, bias


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
    labels: Labels,
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
        labels: n classes.
        left_out: Positions to leave out, for each head; an empty array for a head on all examples.

    Returns:
        One set of weights for each entry of `left_out`.
    """
    heads = []
    for positions in left_out:
        keep = np.setdiff1d(np.arange(len(labels)), positions)
        weight, bias = fit_probe(
            inputs.numpy()[keep], labels[keep], n_classes=layer.out_features, intercept=layer.bias is not None
        )
        heads.append(HeadWeights({name: (torch.as_tensor(weight), None if bias is None else torch.as_tensor(bias))}))
    return tuple(heads)
