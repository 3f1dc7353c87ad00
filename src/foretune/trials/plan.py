"""Which trials a spend buys: few rows for several candidates, the largest trial for the best.

Sizes stand on two ladders that do not hang on the spend, so that a larger one finds again what a smaller one bought.
The largest trial has one of the sizes least, and 4, 5, 6, 7, 8, 10, 12, … (four to a doubling) above it; the smaller
ones have least, 4·least, 16·least, …, up to a third of it. Rung after rung down there are four times fewer rows and
twice as many candidates (successive halving, Jamieson & Talwalkar 2016).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, fsum

from foretune.errors import ConfigError
from foretune.settings.groups import FEWEST_ROWS, Recipe
from foretune.trials.spend import EVALUATED, percent, run_passes, whole_run

FEWEST_STEPS = 4  # a run of fewer steps is all warm-up
FACTOR = 4  # between nested sizes
LEAST_COMPARED = 2  # candidates on a rung, where there are several: one alone compares nothing
SHARE_OF_LARGEST = 0.8  # of the budget, at most; by the ladder's steps of a quarter it is never less than half
SHARE_OF_EVALUATION = 5  # one part in so many of a trial may go into evaluating after each epoch


@dataclass(frozen=True)
class Trial:
    """A fine-tune on few rows that is to be made.

    Attributes:
        candidate: Number of the candidate.
        rows: Training rows, the first so many of one order of all.
        seed: Seed of that order, of A, of the order within the run and of dropout; the same for all candidates.
        passes: Cost in sample passes.
        evaluations: Evaluations: one after each epoch, or one at the end.
    """

    candidate: int
    rows: int
    seed: int
    passes: float
    evaluations: int


@dataclass(frozen=True)
class TrialPlan:
    """What a spend buys.

    Attributes:
        trials: Those with the fewest rows first, among them the best candidate first.
        budget: Sample passes that may be spent.
        passes: Sample passes of all trials.
        note: In words: what is spent, and of what.
    """

    trials: tuple[Trial, ...]
    budget: float
    passes: float
    note: str


@dataclass(frozen=True)
class Extent:
    """How large the run and its data are.

    Attributes:
        run_rows: Training rows N of the run that is forecast.
        known_rows: Rows that trials may train on.
        eval_rows: Rows of one evaluation.
        outputs: Classes, labels or columns C.
    """

    run_rows: int
    known_rows: int
    eval_rows: int
    outputs: int

    @property
    def most(self) -> int:
        """Rows of a trial, at most: half of the run's, for more is nearly the run itself."""
        return min(self.run_rows // 2, self.known_rows)


def fewest_rows(outputs: int) -> int:
    """Say how many rows a trial has at least, whatever its recipe.

    Args:
        outputs: Classes, labels or columns C.

    Returns:
        max(32, 2 C).
    """
    return max(FEWEST_ROWS, 2 * outputs)


def smallest(recipe: Recipe, outputs: int) -> int:
    """Say how many rows a trial of a recipe has at least.

    Args:
        recipe: How it trains.
        outputs: Classes, labels or columns C.

    Returns:
        The least n' ≥ max(32, 2 C) with epochs · ⌈n' / batch size⌉ ≥ 4 steps.
    """
    full = ceil(FEWEST_STEPS / recipe.epochs) - 1  # batches of an epoch before the last
    return max(fewest_rows(outputs), full * recipe.train_batch_size + 1)


def plan_trials(
    recipes: Sequence[Recipe],
    extent: Extent,
    share: float,
    *,
    order: Sequence[int] | None = None,
    early: Sequence[int] = (),
    done: Sequence[Trial] = (),
    seed: int = 0,
) -> TrialPlan:
    """Choose the trials that a spend buys. A pure function: the same arguments give the same plan.

    The largest trial of the best candidate takes as many rows as the budget pays for, 80% of it where there are smaller
    trials beside it; at least half of the budget, unless the rows run out first. The rungs below take what is left, the
    largest first, each for two candidates or more where there are several. For a second stage give the trials that were
    made as `done` and the candidates in the order that they showed: all that is left goes into the largest trial of the
    one that is the best now.

    Args:
        recipes: How each candidate trains.
        extent: Rows of the run, rows that are known, rows of an evaluation, outputs.
        share: Share of one full run, that of the dearest recipe, that may be spent.
        order: Candidates that may have trials, the best first; None for all as they stand.
        early: Candidates that have one of the smallest trials each, as far as the budget goes, before any has a larger
            one: those that only trials tell something of, and what they are compared with.
        done: Trials that are paid for; they are part of the plan.
        seed: Seed of the trials.

    Returns:
        The plan, without trials for a share of 0.

    Raises:
        ConfigError: If the share is above 0 and buys no trial, or the run is too small for any.
    """
    order = range(len(recipes)) if order is None else order
    whole = whole_run(recipes, extent.run_rows)
    budget = share * whole
    if not share or not recipes:
        return TrialPlan((), 0.0, 0.0, "")
    best = order[0]
    offers = [_trial(best, rows, recipes[best], extent, seed) for rows in _sizes(recipes[best], extent)]
    if not offers:
        raise ConfigError(
            f"spend = {percent(share)}: the smallest trial takes {smallest(recipes[best], extent.outputs):,} rows, and "
            f"a run of {extent.run_rows:,} rows has trials of {extent.most:,} at most; leave --spend out"
        )
    if not done and offers[0].passes > budget:
        raise ConfigError(
            f"spend = {percent(share)} buys no trial: the smallest, {offers[0].rows:,} rows and an evaluation on "
            f"{extent.eval_rows:,}, costs {percent(offers[0].passes / whole)} of the run of {extent.run_rows:,} rows; "
            "raise --spend, lower --eval-samples or leave it out"
        )
    nested = (FACTOR - 1) * offers[0].rows  # from here on there are smaller trials to pay for

    def price(offer: Trial) -> float:
        return offer.passes if done or offer.rows < nested else offer.passes / SHARE_OF_LARGEST

    chosen = [*done]
    for trial in _early(recipes, extent, early, seed):
        if not _is_there(trial, chosen) and _cost([*chosen, trial]) <= budget:
            chosen.append(trial)
        if _is_there(trial, chosen):
            offers = [offer for offer in offers if offer.rows >= nested]  # what is hardly larger tells nothing more
    left = budget - _cost(chosen)
    largest = max((offer for offer in offers if price(offer) <= left), key=lambda offer: offer.rows, default=None)
    if largest is not None:
        rungs = [[largest], *_rungs(recipes, extent, order, largest)]
    else:
        rungs = [_early(recipes, extent, order, seed)] if early else []
    for rung in rungs:
        wanted = [trial for trial in rung if not _is_there(trial, chosen)]
        n_paid = max(n for n in range(len(wanted) + 1) if _cost([*chosen, *wanted[:n]]) <= budget)
        if n_paid >= min(len(wanted), LEAST_COMPARED) or largest is None:  # then early ones are there to compare with
            chosen += wanted[:n_paid]
    place = {candidate: position for position, candidate in enumerate(order)}
    chosen.sort(key=lambda trial: (trial.rows, place.get(trial.candidate, len(place)), trial.candidate))
    return TrialPlan(tuple(chosen), budget, _cost(chosen), _note(chosen, share, recipes, extent))


def affordable(recipes: Sequence[Recipe], extent: Extent, share: float) -> tuple[Recipe, ...]:
    """Say of which recipes a spend buys a trial.

    Args:
        recipes: Recipes of all candidates, the dearest of which is what the share is of.
        extent: Rows of the run, rows that are known, rows of an evaluation, outputs.
        share: Share of one full run that may be spent, above 0.

    Returns:
        Each of them once.

    Raises:
        ConfigError: If there is none, with what the smallest trial of all costs.
    """
    each = tuple(dict.fromkeys(recipes))
    found = tuple(recipe for number, recipe in enumerate(each) if _buys(each, number, extent, share))
    if not found:
        cheapest = min(range(len(each)), key=lambda at: each[at].epochs * smallest(each[at], extent.outputs))
        plan_trials(each, extent, share, order=[cheapest])  # which is refused
    return found


def _buys(recipes: Sequence[Recipe], number: int, extent: Extent, share: float) -> bool:
    sizes = _sizes(recipes[number], extent)[:1]
    budget = share * whole_run(recipes, extent.run_rows)
    return any(_trial(number, rows, recipes[number], extent, 0).passes <= budget for rows in sizes)


def _early(recipes: Sequence[Recipe], extent: Extent, early: Sequence[int], seed: int) -> list[Trial]:
    """The smallest trial of the first, for all that can have it; none where one would be compared with nothing."""
    if len(early) < LEAST_COMPARED:
        return []
    rows = smallest(recipes[early[0]], extent.outputs)
    able = [number for number in early if smallest(recipes[number], extent.outputs) <= rows <= extent.most]
    return [_trial(number, rows, recipes[number], extent, seed) for number in able]


def _rungs(recipes: Sequence[Recipe], extent: Extent, order: Sequence[int], largest: Trial) -> Iterable[list[Trial]]:
    """Smaller trials, the rung below the largest first: each for twice as many candidates."""
    sizes, rows = [], smallest(recipes[largest.candidate], extent.outputs)
    while rows * (FACTOR - 1) <= largest.rows:
        sizes.append(rows)
        rows *= FACTOR
    for rung, rows in enumerate(reversed(sizes), start=1):
        able = [number for number in order[: 2**rung] if rows >= smallest(recipes[number], extent.outputs)]
        yield [_trial(number, rows, recipes[number], extent, largest.seed) for number in able]


def _sizes(recipe: Recipe, extent: Extent) -> list[int]:
    """Sizes of the largest trial: steps of a quarter at most, from the smallest trial to the most rows."""
    least, most = smallest(recipe, extent.outputs), extent.most
    if least > most:
        return []
    ladder = (mantissa << doubling for doubling in range(most.bit_length()) for mantissa in (4, 5, 6, 7))
    return sorted({least, most, *(rows for rows in ladder if least < rows < most)})


def _trial(candidate: int, rows: int, recipe: Recipe, extent: Extent, seed: int) -> Trial:
    every = run_passes(rows, recipe.epochs, extent.eval_rows, recipe.epochs)
    cheap = SHARE_OF_EVALUATION * recipe.epochs * extent.eval_rows <= EVALUATED * every
    evaluations = recipe.epochs if cheap else 1
    passes = run_passes(rows, recipe.epochs, extent.eval_rows, evaluations)
    return Trial(candidate, rows, seed, passes, evaluations)


def _is_there(trial: Trial, chosen: Iterable[Trial]) -> bool:
    return any((trial.candidate, trial.rows, trial.seed) == (one.candidate, one.rows, one.seed) for one in chosen)


def _cost(trials: Iterable[Trial]) -> float:
    return fsum(trial.passes for trial in trials)


def _note(trials: Sequence[Trial], share: float, recipes: Sequence[Recipe], extent: Extent) -> str:
    whole = whole_run(recipes, extent.run_rows)
    several = len({recipe.epochs for recipe in recipes}) > 1
    run = f"one run of {extent.run_rows:,} rows"
    run += f" by the dearest recipe, {max(recipe.epochs for recipe in recipes)} epochs" if several else ""
    spent = f"{percent(_cost(trials) / whole)} of {percent(share)} asked for, of the {whole:,} sample passes of {run}"
    if trials and max(trial.rows for trial in trials) == extent.most:
        return f"{spent}; no trial takes more than {extent.most:,} rows"
    return spent
