"""The trials of a ranking: small ones for several finalists, then the largest for the one that is the best by them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import fsum
from typing import Any

from foretune.engines import Engine, serial
from foretune.ranking.rank import OnProgress
from foretune.ranking.rows import Spent
from foretune.report.tables import Table
from foretune.settings.groups import Recipe
from foretune.trials.bench import Bench, Candidate
from foretune.trials.carry import describe_plan, run_trials, seconds_per_pass
from foretune.trials.plan import Trial, TrialPlan, affordable, plan_trials
from foretune.trials.run import Tried
from foretune.trials.spend import whole_run
from foretune.trials.store import Store, find, trial_key

TriedEach = tuple[tuple[Tried, ...], ...]  # of each candidate its trials, those with the fewest rows first


@dataclass(frozen=True)
class Telling:
    """Who is told how the trials go.

    Attributes:
        on_plan: Called with what is planned, before it is made: all trials, then what became of the largest.
        on_progress: Called with the sample passes done and those in all, of the trials that are made now.
        on_note: Called with a sentence on a kept trial that is damaged.
    """

    on_plan: Callable[[Table], None] | None = None
    on_progress: Callable[[float, float], None] | None = None
    on_note: Callable[[str], None] | None = None


@dataclass(frozen=True)
class Finalists:
    """The rows of a ranking as candidates for trials.

    Attributes:
        bench: Model, data and rows.
        candidates: In the order of the ranking.
        store: Where trials are kept.
        share: Share of one full run that may be spent.
        early: Numbers of those that have a small trial each before any has a large one.
        engine: Who makes the trials.
    """

    bench: Bench
    candidates: tuple[Candidate, ...]
    store: Store
    share: float
    early: tuple[int, ...] = ()
    engine: Engine = serial

    @property
    def recipes(self) -> list[Recipe]:
        """How each candidate trains."""
        return [candidate.recipe for candidate in self.candidates]

    def plan(self, order: Sequence[int], done: Sequence[Trial] = ()) -> TrialPlan:
        """Choose the trials.

        Args:
            order: Candidates that may have some, the best first.
            done: Trials that are paid for.

        Returns:
            The plan.
        """
        seed, early = self.bench.batching.seed, [number for number in self.early if number in order]
        extent = self.bench.extent()
        return plan_trials(self.recipes, extent, self.share, order=order, early=early, done=done, seed=seed)

    def all_kept(self, trials: Sequence[Trial]) -> bool:
        """Tell whether nothing is left to make.

        Args:
            trials: Trials.

        Returns:
            Whether all of them are kept.
        """
        keys = [trial_key(self.store, self.bench, self.candidates[trial.candidate], trial) for trial in trials]
        return all(find(self.store, key, self.bench.kind) is not None for key in keys)

    def spent(self, plan: TrialPlan) -> Spent:
        """Say what a plan takes.

        Args:
            plan: All trials.

        Returns:
            Its cost, of one full run by the dearest recipe.
        """
        whole = whole_run(self.recipes, self.bench.extent().run_rows)
        return Spent(plan.passes / whole, plan.passes, plan.note)


def telling_to(on_progress: OnProgress) -> Telling:
    """Tell a ranking's listener how its trials go.

    Args:
        on_progress: Called with what is done now, how much of it is done and how much there is.

    Returns:
        Who is told.
    """
    what = "sample passes of the trials"
    return Telling(on_progress=lambda done, total: on_progress(what, round(done), round(total)))


def seconds_of(tried: Sequence[Sequence[Tried]]) -> float:
    """Add up what trials took, now or before.

    Args:
        tried: Of each candidate its trials.

    Returns:
        Seconds.
    """
    return fsum(one.seconds for of_candidate in tried for one in of_candidate)


def in_stages(
    finalists: Finalists, told: Telling, places: Callable[[TriedEach], Sequence[Any]]
) -> tuple[TrialPlan, TriedEach]:
    """Make the small trials, for the best candidates, and then the largest, for the one that is the best by them.

    Args:
        finalists: Candidates.
        told: Who is told how it goes.
        places: Gives each candidate a key by what the trials showed: the least stands first.

    Returns:
        The plan of all trials, and the trials.

    Raises:
        ConfigError: If the spend buys no trial.
        KeyboardInterrupt: With what became of the work; finished trials are kept.
    """
    expected = seconds_per_pass(finalists.bench)

    def show(plan: TrialPlan, more: str = "") -> None:
        if told.on_plan is not None:
            table = describe_plan(
                finalists.bench, finalists.candidates, plan, finalists.store, seconds_per_pass=expected
            )
            told.on_plan(replace(table, caption=f"{table.caption}{more}"))

    recipes = finalists.recipes
    paid = set(affordable(recipes, finalists.bench.extent(), finalists.share))
    order = [number for number, recipe in enumerate(recipes) if recipe in paid]
    plan = finalists.plan(order)
    small, largest = _by_stage(plan)
    known = finalists.all_kept(small)
    if not known:
        show(plan, " The largest is for the one that is the best after the others." if largest else "")
    made = 0.0
    if small:
        first = replace(plan, trials=tuple(small), passes=fsum(trial.passes for trial in small))
        tried, made = _carry_out(finalists, first, told, 0.0, largest)
        keys = places(tried)
        order.sort(key=lambda number: keys[number])
        shown, plan = plan, next(_with_more(finalists, order, small), first)
        known = known or plan != shown
    if known:
        show(plan)
    tried, made = _carry_out(finalists, plan, told, made, 0.0)
    if made and told.on_progress is not None:
        told.on_progress(made, made)  # where the largest is kept, less is made than the first stage took for granted
    return plan, tried


def _by_stage(plan: TrialPlan) -> tuple[list[Trial], float]:
    """The small trials, and the sample passes of the largest; 0 where all have as many rows."""
    *small, largest = plan.trials
    if small and small[-1].rows == largest.rows:
        return [*small, largest], 0.0
    return small, largest.passes


def _with_more(finalists: Finalists, order: Sequence[int], done: Sequence[Trial]) -> Iterator[TrialPlan]:
    """Plans whose largest trial is for the best, for the second best if what is left buys none of that, and so on."""
    for start in range(len(order)):
        plan = finalists.plan([*order[start:], *order[:start]], done)
        if len(plan.trials) > len(done):
            yield plan


def _carry_out(
    finalists: Finalists, plan: TrialPlan, told: Telling, before: float, after: float
) -> tuple[TriedEach, float]:
    """Make the trials of one stage.

    Args:
        finalists: Candidates.
        plan: The stage.
        told: Who is told.
        before: Sample passes that were made in stages before.
        after: Sample passes that are to come after it.

    Returns:
        The trials of each candidate, and the sample passes made until now.
    """
    made = before

    def report(done: float, total: float) -> None:
        nonlocal made
        made = before + done
        if told.on_progress is not None:
            told.on_progress(made, before + total + after)

    tried = run_trials(
        finalists.bench,
        finalists.candidates,
        plan,
        finalists.store,
        engine=finalists.engine,
        on_progress=report,
        on_note=told.on_note,
    )
    return tried, made
