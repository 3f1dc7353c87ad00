"""Rank and linear correlation in three scopes, with intervals from a bootstrap that knows the study's layers.

Nothing here knows what the numbers mean: arrays in, arrays out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from foretune.arrays import Array

Labels = NDArray[np.int64]
Coefficient = Callable[[Array, Array], Array]
Scope = Literal["all", "across", "within"]
SCOPES: tuple[Scope, ...] = ("all", "across", "within")


@dataclass(frozen=True)
class Layers:
    """How cells are nested: seeds in units (a placement at a rank), units in groups (a data set), groups in families.

    Attributes:
        group: Group of each of the n cells, from 0.
        unit: Unit of each cell, from 0; a unit lies in one group.
        family: Family of each cell, from 0; a group lies in one family. None where every group is one of its own.
    """

    group: Labels
    unit: Labels
    family: Labels | None = None


@dataclass(frozen=True)
class Correlation:
    """A coefficient of each of a quantities with each of b outcomes.

    Attributes:
        estimate: a × b; NaN where undefined (a constant column).
        low: Lower end of the 95% interval; NaN where the bootstrap gives none.
        high: Upper end.
        p: Two-sided p of a permutation test; NaN where undefined.
        points: Points that the estimate rests on, a × b: cells (all), families (across), units of the groups that
            count (within).
    """

    estimate: Array
    low: Array
    high: Array
    p: Array
    points: Labels

    @property
    def established(self) -> NDArray[np.bool_]:
        """Where the interval leaves 0 out and p < 0.05.

        The second condition is for few points: those in perfect order stay so in every draw of the bootstrap, and
        its interval is a point, however few they are.
        """
        return ((self.low > 0) | (self.high < 0)) & (self.p < 0.05)


def pearson(x: Array, y: Array) -> Array:
    """Pearson's r of each column of x with each column of y.

    Args:
        x: n × a.
        y: n × b.

    Returns:
        a × b; NaN where a column is constant.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return _unit(x).T @ _unit(y)


def _unit(x: Array) -> Array:
    centred = x - x.mean(axis=0)
    norm = np.linalg.norm(centred, axis=0)
    constant = np.ptp(x, axis=0) == 0  # rounding would leave something of it
    return np.where(constant, np.nan, centred / np.where(constant, 1.0, norm))


def spearman(x: Array, y: Array) -> Array:
    """Spearman's ρ of each column of x with each column of y: Pearson's r of the mid-ranks.

    Args:
        x: n × a.
        y: n × b.

    Returns:
        a × b; NaN where a column is constant.
    """
    return pearson(rankdata(x, axis=0), rankdata(y, axis=0))


def kendall(x: Array, y: Array) -> Array:
    """Kendall's τ-b of each column of x with each column of y.

    τ_b = Σ_{i<j} sign(x_i − x_j) sign(y_i − y_j) / √(n_x n_y) with n_x the pairs that x does not tie.

    Args:
        x: n × a.
        y: n × b.

    Returns:
        a × b; NaN where a column is constant.
    """
    rows, columns = np.triu_indices(len(x), 1)
    dx, dy = np.sign(x[rows] - x[columns]), np.sign(y[rows] - y[columns])
    untied = np.sqrt(np.outer(np.abs(dx).sum(axis=0), np.abs(dy).sum(axis=0)))
    return np.where(untied > 0, (dx.T @ dy) / np.where(untied > 0, untied, 1.0), np.nan)


COEFFICIENTS: Mapping[str, Coefficient] = {
    "spearman": spearman,
    "kendall": kendall,
    "pearson": pearson,
}


Block = tuple[Array, Array]  # rows of x and y that a coefficient is computed over


@dataclass(frozen=True)
class _Sorted:
    """Cells in the order of families, groups and units: `rows` of the data, and which of the next begins each."""

    rows: Labels
    units: Labels
    groups: Labels
    families: Labels


def _sort(layers: Layers) -> _Sorted:
    family = layers.group if layers.family is None else layers.family
    rows = np.lexsort((layers.unit, layers.group, family))
    nested = np.stack([family[rows], layers.group[rows], layers.unit[rows]])
    _, units = np.unique(nested, axis=1, return_index=True)
    _, groups = np.unique(nested[:2, units], axis=1, return_index=True)
    _, families = np.unique(nested[0, units][groups], return_index=True)
    return _Sorted(rows, units, groups, families)


def _means(values: Array, starts: Labels) -> Array:
    """Mean over the rows from each start to the next."""
    counts = np.diff(np.append(starts, len(values)))
    return np.asarray(np.add.reduceat(values, starts, axis=0) / counts[:, None])


def _blocks(x: Array, y: Array, cells: _Sorted) -> dict[Scope, list[Block]]:
    # What each scope's coefficient is computed over; the mean over the blocks is the estimate. all: the cells. across:
    # the families' means of their groups' means of their units' means. within: in each group the means of its units,
    # where it has more than two.
    x, y = x[cells.rows], y[cells.rows]
    x_unit, y_unit = _means(x, cells.units), _means(y, cells.units)
    ends = np.append(cells.groups[1:], len(x_unit))
    within = [(x_unit[a:b], y_unit[a:b]) for a, b in zip(cells.groups, ends, strict=True) if b - a > 2]
    across = tuple(_means(_means(values, cells.groups), cells.families) for values in (x_unit, y_unit))
    return {"all": [(x, y)], "across": [(across[0], across[1])], "within": within}


def _over(blocks: Sequence[Block], coefficient: Coefficient, shape: tuple[int, int]) -> Array:
    """Mean of the coefficient over the blocks where it is defined; NaN where it is in none."""
    if not blocks:
        return np.full(shape, np.nan)
    if len(blocks) == 1:
        return coefficient(*blocks[0])
    values = np.array([coefficient(*block) for block in blocks])
    defined = np.isfinite(values)
    count = defined.sum(axis=0)
    total = np.where(defined, values, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _points(blocks: Sequence[Block], shape: tuple[int, int]) -> Labels:
    counted = np.zeros(shape, dtype=np.int64)
    for x, y in blocks:
        counted += len(x) * np.outer(np.ptp(x, axis=0) > 0, np.ptp(y, axis=0) > 0)
    return counted


def _resample(cells: _Sorted, rng: np.random.Generator) -> _Sorted:
    """Draw families with replacement, in each group its units, in each its cells; what is drawn twice is two things."""
    unit_ends = np.append(cells.units[1:], len(cells.rows))
    group_ends = np.append(cells.groups[1:], len(cells.units))
    rows: list[Labels] = []
    units: list[int] = []
    groups: list[int] = []
    families: list[int] = []
    count = 0
    family_ends = np.append(cells.families[1:], len(cells.groups))
    for family in rng.integers(len(cells.families), size=len(cells.families)):
        families.append(len(groups))
        for group in range(cells.families[family], family_ends[family]):
            groups.append(len(units))
            first, last = cells.groups[group], group_ends[group]
            for unit in rng.integers(first, last, size=last - first):
                units.append(count)
                start, end = cells.units[unit], unit_ends[unit]
                rows.append(rng.integers(start, end, size=end - start))
                count += end - start
    return _Sorted(cells.rows[np.concatenate(rows)], np.array(units), np.array(groups), np.array(families))


def correlate(
    x: Array, y: Array, layers: Layers, *, resamples: int = 2000, permutations: int = 999, seed: int = 0
) -> dict[tuple[str, Scope], Correlation]:
    """Correlate quantities with outcomes in each scope, with 95% percentile intervals of a hierarchical bootstrap.

    Families, then units of their groups, then cells are drawn with replacement, the same draws for all quantities. A
    family is a group, or several that are no independent draws: versions of one data set. With few families such
    intervals are rather too narrow than too wide. p is the share of the permutations and the given order whose
    coefficient is at least as far from 0; outcomes are permuted over the cells (all), over the families (across), over
    the units of each group (within).

    Args:
        x: n × a quantities, finite.
        y: n × b outcomes, finite.
        layers: How the n cells are nested.
        resamples: Draws of the bootstrap.
        permutations: Permutations of the test.
        seed: Seed of both.

    Returns:
        A correlation for each coefficient (`spearman`, `kendall`, `pearson`) and scope.
    """
    rng = np.random.default_rng(seed)
    shape = (x.shape[1], y.shape[1])
    cells = _sort(layers)
    given = _blocks(x, y, cells)
    drawn = [_blocks(x, y, _resample(cells, rng)) for _ in range(resamples)]
    permuted = [_permute(given, rng) for _ in range(permutations)]
    result = {}
    for name, coefficient in COEFFICIENTS.items():
        for scope in SCOPES:
            estimate = _over(given[scope], coefficient, shape)
            low, high = _interval(np.array([_over(blocks[scope], coefficient, shape) for blocks in drawn]))
            undefined = ~np.isfinite(estimate)
            low[undefined] = high[undefined] = np.nan
            p = np.ones(shape)
            for blocks in permuted:
                p += np.abs(_over(blocks[scope], coefficient, shape)) >= np.abs(estimate) - 1e-9
            p = np.where(undefined, np.nan, p / (permutations + 1))
            result[name, scope] = Correlation(estimate, low, high, p, _points(given[scope], shape))
    return result


def _permute(given: Mapping[Scope, Sequence[Block]], rng: np.random.Generator) -> dict[Scope, list[Block]]:
    return {scope: [(x, rng.permutation(y)) for x, y in blocks] for scope, blocks in given.items()}


def _interval(values: Array) -> tuple[Array, Array]:
    """2.5% and 97.5% of the draws where the coefficient is defined; NaN if it is in fewer than half of them."""
    defined = np.isfinite(values)
    enough = defined.mean(axis=0) >= 0.5 if len(values) else np.zeros(values.shape[1:], dtype=bool)
    low, high = np.full(values.shape[1:], np.nan), np.full(values.shape[1:], np.nan)
    for index in np.argwhere(enough):
        column = values[(slice(None), *index)]
        low[tuple(index)], high[tuple(index)] = np.percentile(column[np.isfinite(column)], [2.5, 97.5])
    return low, high
