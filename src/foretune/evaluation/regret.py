"""What it costs to let a quantity choose the placement: regret in accuracy, beside plain rules."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from foretune.arrays import Array
from foretune.evaluation.predictors import QUANTITIES, Quantity
from foretune.evaluation.records import Record

Group = tuple[str, str]


@dataclass(frozen=True)
class Choice:
    """Regret of a rule that chooses one placement for each model and data set, as a fraction of accuracy.

    Attributes:
        rule: The rule.
        regret: Mean over the groups.
        low: Lower end of the 95% bootstrap interval over families of groups; None with fewer than two.
        high: Upper end.
        hits: Share of the groups where it chose the best one, or one as good.
        groups: Models × data sets that count.
    """

    rule: str
    regret: float
    low: float | None
    high: float | None
    hits: float
    groups: int


@dataclass(frozen=True)
class _Group:
    """The placements of one model and data set, for the seeds that all of them have."""

    units: tuple[tuple[str, int], ...]
    accuracy: Array  # units × seeds
    quantities: dict[str, Array]  # mean over seeds, NaN where missing
    family: str


def regrets(records: Sequence[Record], *, seed: int = 0, resamples: int = 2000) -> tuple[Choice, ...]:
    """Compare rules that choose a placement.

    With one seed, regret = max_u a(u) − a(chosen). With k > 1 seeds the best placement is found on the other seeds
    and valued on the one left out, mean over the seeds left out: a maximum over noisy values would be too high. Then
    a regret can be negative. Ties of a rule are split evenly.

    Args:
        records: Cells.
        seed: Seed of the bootstrap over groups.
        resamples: Draws of the bootstrap.

    Returns:
        A choice for each quantity that every cell has, a random choice, the placement that is best on the other data
        sets, and the one with the most parameters (by its quantity).
    """
    groups = {key: held for key, held in _groups(records).items() if len(held.units) > 1}
    if not groups:
        return ()
    rules: dict[str, Callable[[Group], Array]] = {}
    for quantity in QUANTITIES:
        if all(np.isfinite(held.quantities[quantity.name]).all() for held in groups.values()):
            rules[rule_of(quantity)] = _by_quantity(groups, quantity)
    rules["random placement"] = lambda key: np.ones(len(groups[key].units))
    if len({held.family for held in groups.values()}) > 1:
        rules["best on the other data sets"] = _elsewhere(groups)
    choices = []
    for rule, weights in rules.items():
        valued = [_regret(groups[key].accuracy, weights(key)) for key in groups]
        values, hits = np.array(valued).T
        low = high = None
        if len(values) > 1:
            low, high = _interval(values, [(key[0], held.family) for key, held in groups.items()], seed, resamples)
        choices.append(Choice(rule, float(values.mean()), low, high, float(hits.mean()), len(values)))
    return tuple(sorted(choices, key=lambda choice: choice.regret))


def _interval(values: Array, kin: Sequence[Group], seed: int, resamples: int) -> tuple[float | None, float | None]:
    """95% percentile interval of the mean; versions of one data set are drawn together."""
    names = sorted(set(kin))
    if len(names) < 2:
        return None, None
    index = np.array([names.index(name) for name in kin])
    total, count = np.bincount(index, values), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    low, high = np.percentile(total[drawn].sum(axis=1) / count[drawn].sum(axis=1), [2.5, 97.5])
    return float(low), float(high)


def rule_of(quantity: Quantity) -> str:
    """Name the rule that chooses the placement by a quantity.

    Args:
        quantity: Quantity.

    Returns:
        Which end of it is chosen, in words.
    """
    return f"{'largest' if quantity.prefers > 0 else 'smallest'} {quantity.label}"


def _groups(records: Sequence[Record]) -> dict[Group, _Group]:
    by_group: dict[Group, list[Record]] = defaultdict(list)
    for record in records:
        if record.outcomes["accuracy"] is not None:
            by_group[record.group].append(record)
    return {key: _group(held) for key, held in by_group.items()}


def _group(records: Sequence[Record]) -> _Group:
    units = sorted({(record.placement, record.r) for record in records})
    seeds = sorted({record.seed for record in records})
    at = {(record.placement, record.r, record.seed): record for record in records}
    common = [seed for seed in seeds if all((*unit, seed) in at for unit in units)]
    if not common:  # an unfinished study: take the units of the first seed
        common = seeds[:1]
        units = [unit for unit in units if (*unit, seeds[0]) in at]
    table = [[at[*unit, seed] for seed in common] for unit in units]
    accuracy = np.array([[float(record.outcomes["accuracy"] or 0.0) for record in row] for row in table])
    quantities = {
        quantity.name: np.array(
            [
                np.mean([np.nan if (v := record.quantities[quantity.name]) is None else v for record in row])
                for row in table
            ]
        )
        for quantity in QUANTITIES
    }
    return _Group(tuple(units), accuracy, quantities, records[0].family)


def _by_quantity(groups: dict[Group, _Group], quantity: Quantity) -> Callable[[Group], Array]:
    def weights(key: Group) -> Array:
        values = quantity.prefers * groups[key].quantities[quantity.name]
        return np.asarray(values == values.max(), dtype=np.float64)

    return weights


def _elsewhere(groups: dict[Group, _Group]) -> Callable[[Group], Array]:
    """The placement with the highest mean accuracy on the other data sets of the same model, else of any."""

    def weights(key: Group) -> Array:
        foreign = {other: held for other, held in groups.items() if held.family != groups[key].family}
        others = [held for other, held in foreign.items() if other[0] == key[0]] or list(foreign.values())
        mean = []
        for unit in groups[key].units:
            known = [held.accuracy[held.units.index(unit)].mean() for held in others if unit in held.units]
            mean.append(np.mean(known) if known else -np.inf)
        values = np.array(mean)
        return np.asarray(values == values.max(), dtype=np.float64)

    return weights


def _regret(accuracy: Array, weights: Array) -> tuple[float, float]:
    """Regret and share of hits of a rule that takes each unit with its share of the weights."""
    share = weights / weights.sum()
    mean = accuracy.mean(axis=1)
    hit = float(share @ np.isclose(mean, mean.max(), rtol=0, atol=1e-12))
    n_seeds = accuracy.shape[1]
    if n_seeds == 1:
        return float(mean.max() - share @ mean), hit
    values = []
    for left_out in range(n_seeds):
        others = np.delete(accuracy, left_out, axis=1).mean(axis=1)
        best = np.asarray(others == others.max(), dtype=np.float64)
        values.append((best / best.sum() - share) @ accuracy[:, left_out])
    return float(np.mean(values)), hit
