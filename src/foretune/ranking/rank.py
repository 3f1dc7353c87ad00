"""Rank the adapters of one model on one data set: one pass, a quick score for all, a simulated run for the best."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peft import LoraConfig

from foretune.errors import KernelError
from foretune.forecasting.calibration import Calibration, Interval, RunForecast, apply_calibration, tied
from foretune.forecasting.calibration_file import shipped_calibration
from foretune.forecasting.linearise import linearise
from foretune.forecasting.schedule import schedule_of
from foretune.forecasting.simulated_runs import SimulatedRun, case_values, kind_of, n_steps, runs_of, simulate_runs
from foretune.models.classifier import Classifier, load_model, own_classifier
from foretune.models.placement import lora_config
from foretune.models.sites import Site
from foretune.ntk.spectrum import spectrum
from foretune.problem import Plan, prepare, settings_of_pass
from foretune.ranking.adapter import module_names
from foretune.ranking.budget import BYTES_PER_PARAMETER, fitting, parse_budget
from foretune.ranking.candidates import Candidate, label
from foretune.ranking.finalists import Quick, choose_finalists, price_candidates
from foretune.ranking.left_out import leave_out, list_candidates
from foretune.ranking.module_kernels import module_kernels
from foretune.ranking.quick_score import Blocks, quick_scores
from foretune.settings.commands import KernelSample, RankSettings
from foretune.settings.groups import AdapterConfig, DataConfig, ModelConfig
from foretune.tasks.load import Task, load_task
from foretune.tasks.objective import Objective, Targets

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Row:
    """A finalist of the ranking.

    Attributes:
        quick: Candidate and quick score.
        said: Forecast, and whether the run lies within what the calibration has seen.
        simulated: The simulated run, before calibration.
        condition_number: κ of the kernel averaged over draws of A.
        megabytes: Size of the adapter's file in 10⁶ bytes.
        compute: Cost of a training step relative to one that goes back through all layers.
        tie: Whether its main metric cannot be told from that of the first row.
    """

    quick: Quick
    said: RunForecast
    simulated: SimulatedRun
    condition_number: float
    megabytes: float
    compute: float
    tie: bool

    @property
    def forecast(self) -> Mapping[str, Interval] | None:
        """Forecasts by outcome, `eval_loss`, the main metric and, inside, `train_loss`, each with its 90% interval.

        None where they are withheld: `said.reach.reasons` says why, and the order of the rows is all there is.
        """
        return self.said.levels


@dataclass(frozen=True)
class Ranking:
    """Ranked adapters of one model on one data set.

    Attributes:
        model: Model as given.
        dataset: Data set as given.
        modules: Names of all modules of the model, which itself is not kept.
        template: peft's configuration of all modules, from which a candidate's is made.
        sites: Every module that can be adapted.
        rows: Finalists, the best first.
        quick: All candidates, by quick score.
        single: Quick score of every module alone, at the largest of the ranks, whether it fits the budget or not.
        head_alone: Forecast of the head without an adapter.
        constant: Main metric of one prediction for all, the best for the evaluation samples: of classes the share of
            the most frequent one. None where it is not defined.
        samples: Labelled training samples.
        train_rows: Training rows of the run that is forecast.
        objective: Kind of task.
        steps: Steps of the run.
        notes: What to keep in mind when reading it.
        seconds: Of `load`, `pass`, `quick` and `simulate`.
    """

    model: str
    dataset: str
    modules: tuple[str, ...]
    template: LoraConfig
    sites: tuple[Site, ...]
    rows: tuple[Row, ...]
    quick: tuple[Quick, ...]
    single: NDArray[np.float64]
    head_alone: RunForecast
    constant: float | None
    samples: int
    train_rows: int
    objective: Objective
    steps: int
    notes: tuple[str, ...]
    seconds: Mapping[str, float]


def rank_one(
    model: ModelConfig,
    data: DataConfig,
    settings: RankSettings,
    calibration: Calibration,
    *,
    on_progress: OnProgress | None = None,
) -> Ranking:
    """Load one model and one data set, and rank its adapters.

    Args:
        model: Model.
        data: Data set.
        settings: Settings.
        calibration: Calibration of the forecasts.
        on_progress: Called with what is done now, how much of it is done and how much there is.

    Returns:
        The ranking.
    """
    clock = time.perf_counter()
    if on_progress is not None:
        on_progress("loading", 0, 1)
    task = load_task(data)
    _check_rows(task, settings)
    classifier = load_model(model, task.objective, settings.seed)
    seconds = time.perf_counter() - clock
    ranking = _rank(classifier, task, settings, calibration, on_progress)
    spent = {**ranking.seconds, "load": ranking.seconds["load"] + seconds}
    return replace(ranking, model=model.model, dataset=data.dataset, seconds=spent)


def rank(
    model: Any,
    tokenizer: Any,
    task: Task,
    *,
    settings: RankSettings | None = None,
    calibration: Calibration | None = None,
    on_progress: OnProgress | None = None,
) -> Ranking:
    """Rank the adapters of the user's own model on the user's own data; the model is left as it is.

    Args:
        model: transformers sequence classifier in eval mode, without an adapter.
        tokenizer: Its tokenizer.
        task: Data, from `load_task` or `task_from_datasets`.
        settings: Settings; None takes the defaults.
        calibration: Calibration of the forecasts; None takes the one that comes with foretune.
        on_progress: Called with what is done now, how much of it is done and how much there is.

    Returns:
        The ranking.

    Raises:
        ForetuneError: If the settings do not fit the model or the data.
    """
    classifier = own_classifier(model, tokenizer, task.objective, bare=True)
    return _rank(classifier, task, settings or RankSettings(), calibration or shipped_calibration(), on_progress)


def _rank(
    classifier: Classifier, task: Task, settings: RankSettings, calibration: Calibration, on_progress: OnProgress | None
) -> Ranking:
    report = on_progress or (lambda *_: None)
    seconds = {}
    clock = time.perf_counter()
    ready = _prepared(classifier, task, settings)
    plan = ready.plan
    seconds["load"] = time.perf_counter() - clock
    clock = time.perf_counter()
    n = len(plan.train.features)
    texts = 2 * n + (0 if plan.evaluation is None else len(plan.evaluation.features))
    linearised = linearise(plan, on_batch=_counter(report, "texts through the model", texts))
    seconds["pass"] = time.perf_counter() - clock
    clock = time.perf_counter()
    report("pricing candidates", 0, 1)
    blocks = module_kernels(linearised, settings.ranks)
    quick = price_candidates(settings, blocks, ready.candidates, ready.name)
    finalists = choose_finalists(quick, blocks.sites, settings.finalists)
    seconds["quick"] = time.perf_counter() - clock
    clock = time.perf_counter()
    schedule = schedule_of(settings, plan.train_rows, seed=settings.seed)
    starts = [
        linearised.start([]),
        *(linearised.start(entry.candidate.sites, entry.candidate.rank) for entry in finalists),
    ]
    on_step = _counter(report, "steps of simulated runs", n_steps(starts, schedule, nested=n))
    alone, *simulated_runs = simulate_runs(linearised, starts, schedule, nested=True, on_step=partial(on_step, 1))
    seconds["simulate"] = time.perf_counter() - clock
    said_alone, *said = (
        apply_calibration(calibration, case_values(simulated), plan.reduction.name, run=run)
        for simulated, run in zip([alone, *simulated_runs], runs_of(kind_of(plan, schedule), starts), strict=True)
    )
    rows = [
        _row(entry, simulated, blocks, forecast, settings, ready)
        for entry, simulated, forecast in zip(finalists, simulated_runs, said, strict=True)
    ]
    return Ranking(
        model=classifier.source,
        dataset=task.source,
        modules=module_names(classifier.model),
        template=ready.template,
        sites=linearised.sites,
        rows=_ordered(rows, calibration),
        quick=tuple(sorted(quick, key=lambda entry: (-entry.score, entry.parameters, entry.name))),
        single=_single(blocks),
        head_alone=said_alone,
        constant=_constant_metric(task.objective, linearised.evaluation.targets.cpu().numpy()),
        samples=linearised.train.factors.n,
        train_rows=schedule.train_rows,
        objective=task.objective,
        steps=schedule.steps,
        notes=(
            *_of_checkpoint(classifier),
            *ready.notes,
            *dict.fromkeys(forecast.reach.verdict for forecast in said if forecast.reach.reasons),
        ),
        seconds=seconds,
    )


def _counter(report: OnProgress, what: str, total: int) -> Callable[[int], None]:
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        report(what, done, total)

    return count


def _constant_metric(objective: Objective, targets: Targets) -> float | None:
    """Main metric of the best prediction that is the same for all."""
    constant = np.broadcast_to(objective.constant(targets), (len(targets), objective.n_outputs))
    reached = objective.main(constant, targets)
    return reached if np.isfinite(reached) else None


def _of_checkpoint(classifier: Classifier) -> tuple[str, ...]:
    new = (f"new: {', '.join(classifier.new)} from {classifier.head_source}",) if classifier.new else ()
    return (*new, *classifier.notes)


@dataclass(frozen=True)
class _Prepared:
    """What is ranked; positions in `model_sites` of the plan's adapters, which are those that a candidate uses."""

    plan: Plan
    template: LoraConfig
    candidates: tuple[Candidate, ...]  # of the plan's adapters
    model_sites: tuple[Site, ...]
    positions: tuple[int, ...]
    notes: tuple[str, ...]

    def of_model(self, candidate: Candidate) -> Candidate:
        # names and costs are those in the whole model, whatever the user leaves to choose from
        return Candidate(tuple(self.positions[position] for position in candidate.sites), candidate.rank)

    def name(self, candidate: Candidate) -> str:
        return label(self.of_model(candidate), self.model_sites)


def _prepared(classifier: Classifier, task: Task, settings: RankSettings) -> _Prepared:
    """Everything that can go wrong before the work starts: candidates, budget, samples."""
    _check_rows(task, settings)
    adapter = AdapterConfig(
        ("all-linear",), r=max(settings.ranks), alpha=settings.alpha, rslora=settings.rslora, init=settings.init
    )
    template = lora_config(classifier.model, adapter)
    of_pass = settings_of_pass(task, settings, draws=settings.draws, sigma=settings.sigma)
    plan = prepare(classifier, task, template, of_pass)
    plan, notes = leave_out(plan, settings)
    sites = plan.adapted.sites
    candidates = list_candidates(sites, settings)
    if settings.budget is not None:
        fitting(
            candidates, sites, parse_budget(settings.budget)
        )  # a budget that nothing fits is refused before the pass
    used = sorted({position for candidate in candidates for position in candidate.sites})
    adapters = tuple(plan.adapted.adapters[position] for position in used)
    renumbered = tuple(
        Candidate(tuple(used.index(at) for at in candidate.sites), candidate.rank) for candidate in candidates
    )
    plan = replace(plan, adapted=replace(plan.adapted, adapters=adapters))
    return _Prepared(plan, template, renumbered, sites, tuple(used), notes)


def _check_rows(task: Task, sample: KernelSample) -> None:
    task.objective.check_count(sample.samples)
    task.objective.check_rows(task.train.labels)


def _row(
    entry: Quick,
    simulated: SimulatedRun,
    blocks: Blocks,
    said: RunForecast,
    settings: RankSettings,
    ready: _Prepared,
) -> Row:
    kernel = blocks.kernels([entry.candidate])[0]
    try:
        kappa = spectrum(kernel, sigma=settings.sigma, epsilon=float(np.finfo(np.float32).eps)).condition_number
    except KernelError:
        kappa = float("nan")
    return Row(
        quick=entry,
        said=said,
        simulated=simulated,
        condition_number=kappa,
        megabytes=entry.parameters * BYTES_PER_PARAMETER / 1e6,
        compute=_compute(ready.of_model(entry.candidate), ready.model_sites),
        tie=False,
    )


def _compute(candidate: Candidate, sites: Sequence[Site]) -> float:
    """A step's cost: the whole way forward, and back down to the lowest adapted layer; both ways through all = 1."""
    layers = sorted({site.layer for site in sites if site.layer is not None})
    used = [sites[position].layer for position in candidate.sites]
    reached = [layer for layer in used if layer is not None]
    if not layers or not reached:
        return 0.5
    return (1.0 + (len(layers) - layers.index(min(reached))) / len(layers)) / 2.0


def _ordered(rows: Sequence[Row], calibration: Calibration) -> tuple[Row, ...]:
    ordered = sorted(rows, key=lambda row: (*row.said.key, row.quick.parameters))
    return tuple(
        replace(row, tie=place > 0 and tied(calibration, ordered[0].said, row.said))
        for place, row in enumerate(ordered)
    )


def _single(blocks: Blocks) -> NDArray[np.float64]:
    rank = blocks.ranks[-1]
    return quick_scores(blocks, [Candidate((position,), rank) for position in range(len(blocks.sites))])
