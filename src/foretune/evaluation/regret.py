"""What it costs to let a predictor choose the placement: regret in the main metric, beside plain rules."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from foretune.arrays import Array
from foretune.evaluation.predictors import Predictor, predictors_of
from foretune.evaluation.records import Record
from foretune.tasks.metrics import main_metric

Group = tuple[str, str]
RANDOM = "random placement"
ELSEWHERE = "best on the other data sets"


@dataclass(frozen=True)
class Regret:
    """Main metric lost by a rule that chooses one placement for each model and data set, accuracy as a fraction.

    Attributes:
        rule: The rule in words.
        predictor: Name of the predictor that it follows; None for a rule that follows none.
        mean: Mean over the groups.
        low: Lower end of the 95% bootstrap interval over families of groups; None with fewer than two.
        high: Upper end.
        hits: Share of the groups where it chose the best one, or one as good.
        groups: Models × data sets that count.
    """

    rule: str
    predictor: str | None
    mean: float
    low: float | None
    high: float | None
    hits: float
    groups: int


@dataclass(frozen=True)
class _Placements:
    """The placements of one model and data set, for the seeds that all of them have."""

    units: tuple[tuple[str, int], ...]
    metric: Array  # units × seeds
    quantities: dict[str, Array]  # mean over seeds, NaN where missing
    family: str


Weights = Callable[[Group], Array]  # of each placement of a group in the choice of a rule


def regrets(records: Sequence[Record], *, seed: int = 0, resamples: int = 2000) -> tuple[Regret, ...]:
    """Compare rules that choose a placement.

    With one seed, regret = max_u a(u) − a(chosen). With k > 1 seeds the best placement is found on the other seeds
    and valued on the one left out, mean over the seeds left out: a maximum over noisy values would be too high. Then
    a regret can be negative. Ties of a rule are split evenly.

    Args:
        records: Cells of one kind of task.
        seed: Seed of the bootstrap over groups.
        resamples: Draws of the bootstrap.

    Returns:
        The least first: one for each predictor that every cell has, for a random choice, and for the placement that is
        best on the other data sets.
    """
    groups = {key: table for key, table in _by_group(records).items() if len(table.units) > 1}
    if not groups:
        return ()
    rules: list[tuple[str, str | None, Weights]] = [
        (rule_in_words(predictor), predictor.name, _by_predictor(groups, predictor))
        for predictor in predictors_of(records[0].kind)
        if all(np.isfinite(table.quantities[predictor.name]).all() for table in groups.values())
    ]
    rules.append((RANDOM, None, lambda key: np.ones(len(groups[key].units))))
    if len({table.family for table in groups.values()}) > 1:
        rules.append((ELSEWHERE, None, _elsewhere(groups)))
    losses = []
    for rule, name, weights in rules:
        values, hits = np.array([_regret(groups[key].metric, weights(key)) for key in groups]).T
        low = high = None
        if len(values) > 1:
            low, high = _interval(values, [(key[0], table.family) for key, table in groups.items()], seed, resamples)
        losses.append(Regret(rule, name, float(values.mean()), low, high, float(hits.mean()), len(values)))
    return tuple(sorted(losses, key=lambda regret: regret.mean))


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


def rule_in_words(predictor: Predictor) -> str:
    """Name the rule that chooses the placement by a predictor.

    Args:
        predictor: Predictor.

    Returns:
        Which end of it is chosen, in words.
    """
    return f"{'largest' if predictor.direction > 0 else 'smallest'} {predictor.label}"


def _by_group(records: Sequence[Record]) -> dict[Group, _Placements]:
    by_group: dict[Group, list[Record]] = defaultdict(list)
    for record in records:
        if record.outcomes[main_metric(record.kind).name] is not None:
            by_group[record.group].append(record)
    return {key: _placements(cells) for key, cells in by_group.items()}


def _placements(records: Sequence[Record]) -> _Placements:
    units = sorted({(record.placement, record.r) for record in records})
    seeds = sorted({record.seed for record in records})
    at = {(record.placement, record.r, record.seed): record for record in records}
    common = [seed for seed in seeds if all((*unit, seed) in at for unit in units)]
    if not common:  # an unfinished study: take the units of the first seed
        common = seeds[:1]
        units = [unit for unit in units if (*unit, seeds[0]) in at]
    table = [[at[*unit, seed] for seed in common] for unit in units]
    name = main_metric(records[0].kind).name
    metric = np.array([[float(record.outcomes[name] or 0.0) for record in row] for row in table])
    quantities = {
        name: np.array(
            [np.mean([np.nan if (v := record.quantities[name]) is None else v for record in row]) for row in table]
        )
        for name in (predictor.name for predictor in predictors_of(records[0].kind))
    }
    return _Placements(tuple(units), metric, quantities, records[0].family)


def _by_predictor(groups: dict[Group, _Placements], predictor: Predictor) -> Weights:
    def weights(key: Group) -> Array:
        values = predictor.direction * groups[key].quantities[predictor.name]
        return np.asarray(values == values.max(), dtype=np.float64)

    return weights


def _elsewhere(groups: dict[Group, _Placements]) -> Weights:
    """The placement with the highest mean metric on the other data sets of the same model, else of any."""

    def weights(key: Group) -> Array:
        foreign = {other: table for other, table in groups.items() if table.family != groups[key].family}
        others = [table for other, table in foreign.items() if other[0] == key[0]] or list(foreign.values())
        mean = []
        for unit in groups[key].units:
            known = [table.metric[table.units.index(unit)].mean() for table in others if unit in table.units]
            mean.append(np.mean(known) if known else -np.inf)
        values = np.array(mean)
        return np.asarray(values == values.max(), dtype=np.float64)

    return weights


def _regret(metric: Array, weights: Array) -> tuple[float, float]:
    """Regret and share of hits of a rule that takes each unit with its share of the weights."""
    share = weights / weights.sum()
    mean = metric.mean(axis=1)
    hit = float(share @ np.isclose(mean, mean.max(), rtol=0, atol=1e-12))
    n_seeds = metric.shape[1]
    if n_seeds == 1:
        return float(mean.max() - share @ mean), hit
    values = []
    for left_out in range(n_seeds):
        others = np.delete(metric, left_out, axis=1).mean(axis=1)
        best = np.asarray(others == others.max(), dtype=np.float64)
        values.append((best / best.sum() - share) @ metric[:, left_out])
    return float(np.mean(values)), hit
