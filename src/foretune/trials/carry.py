"""Carry a plan of trials out: what is kept is not made again, what is made is kept at once."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from math import fsum

import torch

from foretune.engines import Engine, Work, fitted, serial
from foretune.report.tables import Table
from foretune.trials.bench import Bench, Candidate
from foretune.trials.plan import Trial, TrialPlan
from foretune.trials.run import Tried, run_trial
from foretune.trials.spend import EVALUATED, percent, whole_run
from foretune.trials.store import Store, find, keep, trial_key, turn

OnProgress = Callable[[float, float], None]
OnStep = Callable[[int, int], None]
_TIMED = 8  # rows


@dataclass(frozen=True)
class TrialJob:
    """A trial to make.

    Attributes:
        candidate: What is tried.
        trial: On how many rows, with which seed.
    """

    candidate: Candidate
    trial: Trial


def make_trial(bench: Bench, job: TrialJob, on_step: OnStep | None) -> tuple[Trial, Tried]:
    """Make a trial, in this process or another one; it is kept by who wants it.

    Args:
        bench: Model, data and rows.
        job: Which trial.
        on_step: Called with the steps done and the steps in all; None for nobody.

    Returns:
        The trial and what came of it.
    """
    return job.trial, run_trial(bench, job.candidate, job.trial, on_step=on_step)


def run_trials(
    bench: Bench,
    candidates: Sequence[Candidate],
    plan: TrialPlan,
    store: Store,
    *,
    engine: Engine = serial,
    on_progress: OnProgress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> tuple[tuple[Tried, ...], ...]:
    """Make the trials of a plan that are not kept, and keep each as soon as it is done.

    One after the other the small ones come first. Side by side the large ones are begun first, which are the last to
    end; the files are written by this process alone, so that no folder need be shared.

    Args:
        bench: Model, data and rows.
        candidates: In the order of their numbers in the plan.
        plan: What is to be made.
        store: Where trials are kept.
        engine: Who makes them.
        on_progress: Called with the sample passes done and those in all, of the trials that are made now: after each
            step where they are made in this process, else after each trial.
        on_note: Called with a sentence on a kept trial that is damaged.

    Returns:
        For each candidate its trials, those with the fewest rows first; none for a candidate without.

    Raises:
        ForetuneError: What a trial raises; finished trials are kept.
        StoreError: If the disk refuses or a process dies; finished trials are kept.
        KeyboardInterrupt: With what became of the work.
    """
    kind = bench.kind
    keys = {trial: trial_key(store, bench, candidates[trial.candidate], trial) for trial in plan.trials}
    found = {trial: find(store, key, kind, on_note=on_note) for trial, key in keys.items()}
    missing = [trial for trial, tried in found.items() if tried is None]
    total = fsum(trial.passes for trial in missing)
    chosen = fitted(engine, len(missing))
    if chosen is not serial:  # all that are made are held at once: in one order, so that no two wait for each other
        missing.sort(key=lambda trial: (-trial.passes, keys[trial]))
    done, begun = 0.0, 0.0  # sample passes: of what has ended, of the trial that was begun last
    held: dict[Trial, ExitStack] = {}

    def report(passes: float) -> None:
        if on_progress is not None:
            on_progress(passes, total)

    def enter(trial: Trial, tried: Tried) -> None:
        nonlocal done
        found[trial] = tried
        held.pop(trial).close()
        done += trial.passes
        report(done)

    def jobs(turns: ExitStack) -> Iterator[TrialJob]:
        nonlocal begun
        for trial in missing:
            report(done)
            held[trial] = turns.enter_context(ExitStack())
            held[trial].enter_context(turn(store, keys[trial]))
            tried = find(store, keys[trial], kind)  # another process may have made it meanwhile
            if tried is not None:
                enter(trial, tried)
                continue
            begun = trial.passes
            yield TrialJob(candidates[trial.candidate], trial)

    def on_step(step: int, steps: int) -> None:
        report(done + begun * step / steps)

    work = Work(make_trial, bench, "trial", on_gpu=next(bench.model.parameters()).device.type != "cpu")
    try:
        with ExitStack() as turns, closing(chosen(work, jobs(turns), on_step)) as made:
            for trial, tried in made:
                about = {**bench.source, "candidate": candidates[trial.candidate].name}
                keep(store, keys[trial], tried, about)
                enter(trial, tried)
    except KeyboardInterrupt as interrupt:
        kept = sum(tried is not None for tried in found.values())
        raise KeyboardInterrupt(
            f"interrupted: {kept} of {len(found)} trials are kept, the same command goes on"
        ) from interrupt
    return tuple(
        tuple(tried for trial, tried in found.items() if trial.candidate == number and tried is not None)
        for number in range(len(candidates))
    )


def describe_plan(
    bench: Bench,
    candidates: Sequence[Candidate],
    plan: TrialPlan,
    store: Store,
    *,
    seconds_per_pass: float | None = None,
) -> Table:
    """Say what a plan buys, before it is carried out.

    Args:
        bench: Model, data and rows.
        candidates: In the order of their numbers in the plan.
        plan: What is to be made.
        store: Where trials are kept.
        seconds_per_pass: Expected seconds of a sample pass; None if that is not known.

    Returns:
        A row for each trial.
    """
    whole = whole_run([candidate.recipe for candidate in candidates], bench.extent().run_rows)
    kind, rows, expected = bench.kind, [], 0.0
    for trial in plan.trials:
        candidate = candidates[trial.candidate]
        tried = find(store, trial_key(store, bench, candidate, trial), kind)
        seconds = None if seconds_per_pass is None else trial.passes * seconds_per_pass
        if tried is not None:
            seconds = 0.0
        expected += seconds or 0.0
        state = "to make" if tried is None else "kept"
        cost = (f"{trial.passes:,.0f}", percent(trial.passes / whole), "–" if seconds is None else f"{seconds:,.0f}")
        rows.append((candidate.name, f"{trial.rows:,}", str(trial.evaluations), *cost, state))
    caption = f"Trials: {plan.note}."
    if seconds_per_pass is not None:
        caption += f" About {expected:,.0f} s."
    header = ("candidate", "rows", "evaluations", "passes", "of one run", "seconds", "state")
    return Table(caption, header, tuple(rows))


def seconds_per_pass(bench: Bench) -> float:
    """Measure what a sample pass takes here: three times the forward pass of a few rows.

    Args:
        bench: Model, data and rows, of which the first few are taken.

    Returns:
        Seconds of forward and backward of one row, roughly: small batches take longer, optimisers something more.
    """
    inputs, n_rows = bench.few(_TIMED)
    seconds = 0.0
    with torch.no_grad():
        for _ in range(2):  # the first one warms up
            start = time.perf_counter()
            bench.model(**inputs)
            if any(tensor.device.type == "cuda" for tensor in inputs.values()):
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
    return EVALUATED * seconds / n_rows
