"""Output reductions: which scalar functions of the logits the kernel is taken of.

A classifier has C logits per example; the kernel needs scalars. A reduction says which k linear
combinations of the logits are differentiated (one backward pass each), how their kernels are combined,
and in which coordinates labels, initial outputs and predictions live.

| name      | differentiated                       | kernel                      | size   | targets          |
|-----------|--------------------------------------|-----------------------------|--------|------------------|
| `margin`  | z = f_1 - f_0 (two classes)          | <dz_i, dz_j>                | n      | -1, +1           |
| `trace`   | orthonormal basis of the centred f   | (1/C) sum_c <df~_c, df~_c>  | n      | one-hot - 1/C    |
| `full`    | the same basis, blocks kept          | <dv_ia, dv_jb>              | n(C-1) | one-hot in basis |
| `class:k` | f_k                                  | <df_k(i), df_k(j)>          | n      | 0, 1             |

`trace` and `full` differentiate C - 1 combinations, not C: cross-entropy does not see the sum of the logits.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import helmert

from foretune.errors import ConfigError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class OutputReduction:
    """One choice of scalar outputs for a classifier with `n_classes` logits.

    Attributes:
        name: `margin`, `trace`, `full` or `class:k`, as it stands in every result.
        n_classes: Number of logits C.
        directions: C × k matrix; output a of an example is `logits @ directions[:, a]`.
        block: Whether the k outputs keep their own rows of the kernel (example-major: row i·k + a).
        scale: Factor on the summed kernel (1/C for `trace`, else 1).
    """

    name: str
    n_classes: int
    directions: Array
    block: bool
    scale: float

    @property
    def n_outputs(self) -> int:
        """Number of backward passes k."""
        return int(self.directions.shape[1])

    @property
    def rows_per_example(self) -> int:
        """Rows of the kernel that belong to one example: k for `full`, else 1."""
        return self.n_outputs if self.block else 1

    def targets(self, labels: NDArray[np.integer]) -> Array:
        """Code labels as regression targets.

        Args:
            labels: n integers in 0 … C-1.

        Returns:
            n × t targets: t = 1 (`margin`, `class:k`), C (`trace`) or C - 1 (`full`).
        """
        one_hot: Array = np.eye(self.n_classes)[labels]
        if self.name == "margin":
            return 2.0 * one_hot[:, 1:] - 1.0
        if self.name == "trace":
            return one_hot - 1.0 / self.n_classes
        return np.asarray(one_hot @ self.directions)

    def coordinates(self, logits: Array) -> Array:
        """Express logits in the coordinates of the targets.

        Args:
            logits: n × C logits.

        Returns:
            n × t array: z, the centred logits, their basis coordinates, or f_k.
        """
        if self.name == "trace":
            return np.asarray(logits - logits.mean(axis=1, keepdims=True))
        return np.asarray(logits @ self.directions)

    def scores(self, coordinates: Array) -> Array:
        """Turn predictions in target coordinates into one score per class (arg max is the decision).

        Args:
            coordinates: n × t predictions.

        Returns:
            n × C scores; for `class:k` n × 2 (rest, k), its decision threshold at 1/2.
        """
        if self.name == "margin":
            return np.hstack([-coordinates, coordinates]) / 2.0
        if self.name == "trace":
            return coordinates
        if self.name == "full":
            return np.asarray(coordinates @ self.directions.T)
        return np.hstack([0.5 - coordinates, coordinates - 0.5])

    def classes(self, labels: NDArray[np.integer]) -> NDArray[np.integer]:
        """Map labels to the columns of `scores`.

        Args:
            labels: n integers in 0 … C-1.

        Returns:
            The labels themselves; for `class:k` 1 where the label is k, else 0.
        """
        if self.name.startswith("class:"):
            return np.asarray(self.directions[labels, 0], dtype=np.int64)
        return labels


def output_reduction(name: str | None, n_classes: int) -> OutputReduction:
    """Build a reduction from its name.

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
        return OutputReduction(name, 2, np.array([[-1.0], [1.0]]), block=False, scale=1.0)
    if name in ("trace", "full"):
        scale = 1.0 / n_classes if name == "trace" else 1.0
        return OutputReduction(name, n_classes, helmert(n_classes).T, block=name == "full", scale=scale)
    kind, _, index = name.partition(":")
    if kind == "class" and index.isdecimal() and int(index) < n_classes:
        return OutputReduction(name, n_classes, np.eye(n_classes)[:, [int(index)]], block=False, scale=1.0)
    raise ConfigError(
        f"unknown output {name!r}: use 'margin' (two classes), 'trace', 'full' or "
        f"'class:k' with k from 0 to {n_classes - 1}"
    )
