"""Accuracy of a linear probe on frozen features, by cross-validation."""

import numpy as np
from numpy.typing import NDArray

from foretune.errors import ConfigError
from foretune.head import fit_probe, probe_folds

Array = NDArray[np.float64]
Labels = NDArray[np.integer]


def probe_accuracy(features: Array, labels: Labels, n_classes: int, *, seed: int = 0, folds: int = 5) -> float:
    """Share of examples that a logistic regression on the other folds puts into their class.

    (1/n) Σ_i [argmax_c (W⁽ᶠ⁾φ_i + b⁽ᶠ⁾)_c = y_i] with W⁽ᶠ⁾, b⁽ᶠ⁾ the probe head (`foretune.head.fit_probe`) of the
    examples outside the fold f of example i; of equal scores the first class counts. Where those hold a single class,
    that class is the prediction.

    Args:
        features: n × D features.
        labels: n classes, of which some of 0 … C-1 may be absent.
        n_classes: C.
        seed: Seed of the split.
        folds: Folds, at most n.

    Returns:
        Fraction.

    Raises:
        ConfigError: If the labels hold a single class, or there are fewer than 2 folds.
    """
    features, labels = np.asarray(features, dtype=np.float64), np.asarray(labels)
    if len(np.unique(labels)) < 2:
        raise ConfigError(f"{len(labels)} samples of a single class: draw more samples, of 2 classes or more")
    if folds < 2:
        raise ConfigError(f"{folds} folds: at least 2 are needed")
    right = 0
    for held in probe_folds(len(labels), seed=seed, folds=folds):
        rest = np.setdiff1d(np.arange(len(labels)), held)
        if len(np.unique(labels[rest])) < 2:
            predicted = np.full(len(held), labels[rest[0]])
        else:
            weight, bias = fit_probe(features[rest], labels[rest], n_classes=n_classes, intercept=True)
            assert bias is not None
            predicted = np.argmax(features[held] @ weight.T + bias, axis=1)
        right += int(np.sum(predicted == labels[held]))
    return right / len(labels)
