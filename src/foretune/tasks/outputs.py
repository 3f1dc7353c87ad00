"""Output reductions: which scalar functions of a model's outputs the kernel is taken of.

A model has C outputs per example; the kernel needs scalars. A reduction says which k linear combinations of the
outputs are differentiated (one backward pass each), how their kernels are combined, and in which coordinates targets,
initial outputs and predictions live. Every map is linear (`class:k` adds a threshold), so a reduction is a handful of
matrices, and nobody has to ask for its name. Of a classifier:

| name      | differentiated                       | kernel                      | size   | coordinates      |
|-----------|--------------------------------------|-----------------------------|--------|------------------|
| `margin`  | z = f_1 - f_0 (two classes)          | <dz_i, dz_j>                | n      | z                |
| `trace`   | orthonormal basis of the centred f   | (1/C) sum_c <df~_c, df~_c>  | n      | centred f        |
| `full`    | the same basis, blocks kept          | <dv_ia, dv_jb>              | n(C-1) | f in the basis   |
| `class:k` | f_k                                  | <df_k(i), df_k(j)>          | n      | f_k              |

`trace` and `full` differentiate C - 1 combinations, not C: cross-entropy does not see the sum of the logits. Where the
outputs stand for themselves (regression, several labels), there is no margin, and:

| name       | differentiated | kernel                     | size | coordinates |
|------------|----------------|----------------------------|------|-------------|
| `trace`    | each f_c       | (1/C) sum_c <df_c, df_c>   | n    | f           |
| `full`     | each f_c       | <df_ia, df_jb>             | nC   | f           |
| `output:k` | f_k            | <df_k(i), df_k(j)>         | n    | f_k         |
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import helmert

from foretune.errors import ConfigError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class OutputReduction:
    """One choice of scalar outputs for a model with C outputs.

    Attributes:
        name: As it stands in every result.
        directions: C × k; output a that is differentiated is `outputs @ directions[:, a]`.
        basis: C × t; coordinates of targets and outputs are `outputs @ basis`.
        readout: t × S; scores are `coordinates @ readout + threshold`.
        threshold: S numbers.
        columns: For each of the C outputs the column of the scores that it counts for, −1 for none.
        block: Whether the k outputs keep their own rows of the kernel (example-major: row i·k + a).
        scale: Factor on the summed kernel (1/C for `trace`, else 1).
    """

    name: str
    directions: Array
    basis: Array
    readout: Array
    threshold: Array
    columns: NDArray[np.int64]
    block: bool
    scale: float

    @property
    def n_logits(self) -> int:
        """Number of the model's outputs C."""
        return int(self.directions.shape[0])

    @property
    def n_outputs(self) -> int:
        """Number of backward passes k."""
        return int(self.directions.shape[1])

    @property
    def rows_per_example(self) -> int:
        """Rows of the kernel that belong to one example: k for `full`, else 1."""
        return self.n_outputs if self.block else 1

    @property
    def scores_are_outputs(self) -> bool:
        """Whether scores are the model's outputs again, to which its loss applies; not so for `class:k`."""
        return not self.threshold.any()

    def summed(self) -> "OutputReduction":
        """The same outputs with one row of the kernel for each example: `trace` for `full`, the others have it."""
        if not self.block:
            return self
        projection = np.asarray(self.directions @ self.directions.T)
        return _reduction("trace", self.directions, np.eye(self.n_logits), basis=projection, scale=1.0 / self.n_logits)

    def coordinates(self, outputs: Array) -> Array:
        """Express outputs, or targets coded as outputs, in the coordinates of the kernel.

        Args:
            outputs: n × C.

        Returns:
            n × t.
        """
        return np.asarray(outputs @ self.basis)

    def scores(self, coordinates: Array) -> Array:
        """Turn coordinates into scores: of classes (arg max is the decision), or outputs again.

        Args:
            coordinates: n × t predictions.

        Returns:
            n × S scores; for `class:k` S = 2 (rest, k) with the decision at 1/2.
        """
        return np.asarray(coordinates @ self.readout + self.threshold)


def _reduction(
    name: str, directions: Array, readout: Array, *, basis: Array | None = None, block: bool = False, scale: float = 1.0
) -> OutputReduction:
    """A reduction whose scores are the outputs that the coordinates stand for; `readout` undoes `basis`."""
    n_logits = len(directions)
    basis = directions if basis is None else basis
    return OutputReduction(
        name, directions, basis, readout, np.zeros(n_logits), np.arange(n_logits), block=block, scale=scale
    )


def output_reduction(name: str | None, n_classes: int) -> OutputReduction:
    """Build a classifier's reduction from its name.

    Args:
        name: `margin`, `trace`, `full` or `class:k`; None takes `margin` for two classes, else `trace`.
        n_classes: Number of logits C, at least 2.

    Returns:
        The reduction.

    Raises:
        ConfigError: If the name is unknown, or does not fit the number of classes.

    Example:
        >>> output_reduction(None, 5).name, output_reduction("full", 5).rows_per_example
        ('trace', 4)
    """
    if n_classes < 2:
        raise ConfigError(f"a classifier needs at least 2 classes, got {n_classes}")
    name = name or ("margin" if n_classes == 2 else "trace")
    if name == "margin":
        if n_classes != 2:
            raise ConfigError(f"output 'margin' needs 2 classes, got {n_classes}: use 'trace' or 'full'")
        return _reduction(name, np.array([[-1.0], [1.0]]), np.array([[-0.5, 0.5]]))
    basis = helmert(n_classes).T
    if name == "trace":
        centring = np.eye(n_classes) - 1.0 / n_classes
        return _reduction(name, basis, np.eye(n_classes), basis=centring, scale=1.0 / n_classes)
    if name == "full":
        return _reduction(name, basis, basis.T, block=True)
    index = _index(name, "class", n_classes)
    if index is None:
        raise ConfigError(
            f"unknown output {name!r}: use 'margin' (two classes), 'trace', 'full' or "
            f"'class:k' with k from 0 to {n_classes - 1}"
        )
    direction = np.eye(n_classes)[:, [index]]
    one_against_rest = (np.arange(n_classes) == index).astype(np.int64)
    return OutputReduction(
        name,
        direction,
        direction,
        np.array([[-1.0, 1.0]]),
        np.array([0.5, -0.5]),
        one_against_rest,
        block=False,
        scale=1.0,
    )


def identity_reduction(name: str | None, n_logits: int) -> OutputReduction:
    """Build the reduction of outputs that stand for themselves from its name.

    Args:
        name: `trace`, `full` or `output:k`; None takes `trace`.
        n_logits: Number of outputs C, at least 1.

    Returns:
        The reduction.

    Raises:
        ConfigError: If the name is unknown.

    Example:
        >>> identity_reduction("output:1", 3).directions.ravel().tolist()
        [0.0, 1.0, 0.0]
    """
    name = name or "trace"
    if name in ("trace", "full"):
        block = name == "full"
        return _reduction(name, np.eye(n_logits), np.eye(n_logits), block=block, scale=1.0 if block else 1.0 / n_logits)
    index = _index(name, "output", n_logits)
    if index is None:
        raise ConfigError(f"unknown output {name!r}: use 'trace', 'full' or 'output:k' with k from 0 to {n_logits - 1}")
    direction = np.eye(n_logits)[:, [index]]
    columns = np.where(np.arange(n_logits) == index, 0, -1)
    return OutputReduction(name, direction, direction, np.eye(1), np.zeros(1), columns, block=False, scale=1.0)


def _index(name: str, kind: str, count: int) -> int | None:
    """The number in `kind:number`, if it is one below `count`."""
    given, _, index = name.partition(":")
    return int(index) if given == kind and index.isdecimal() and int(index) < count else None
