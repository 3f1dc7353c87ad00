"""Rank the adapters of one model on one data set: one pass, a quick score for all, a simulated run for the best."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite

import numpy as np
from numpy.typing import NDArray
from peft import LoraConfig

from foretune.errors import KernelError
from foretune.forecasting.calibration import Calibration, RunForecast, apply_calibration
from foretune.forecasting.linearise import linearise
from foretune.forecasting.simulated_runs import case_values
from foretune.models.classifier import Classifier, load_model
from foretune.models.placement import lora_config
from foretune.models.sites import Site
from foretune.ntk.spectrum import spectrum
from foretune.problem import Plan, prepare, settings_of_pass
from foretune.processes.group import ALONE, Processes
from foretune.ranking.adapter import module_names
from foretune.ranking.budget import BYTES_PER_PARAMETER, fitting, parse_budget, parse_parameters
from foretune.ranking.candidates import Candidate, label
from foretune.ranking.equal_size import equal_sizes, missed
from foretune.ranking.finalists import Quick, choose_finalists, price_candidates
from foretune.ranking.left_out import leave_out, list_candidates
from foretune.ranking.method_pass import Priced, Scene, list_placements, price_methods
from foretune.ranking.method_rows import method_rows
from foretune.ranking.methods import Placement
from foretune.ranking.module_kernels import module_kernels
from foretune.ranking.quick_score import Blocks, quick_scores
from foretune.ranking.recipes import RecipeRuns, after_epochs, best_epoch, check_runs, notes_of, simulate_recipes
from foretune.ranking.recommend import marked
from foretune.ranking.rows import Ranking, Row, ordered
from foretune.ranking.step_cost import step_cost
from foretune.readers.folder import Splits
from foretune.settings.commands import KernelSample, RankSettings
from foretune.settings.groups import AdapterConfig, DataConfig, ModelConfig
from foretune.tasks.load import Task, task_of
from foretune.tasks.sources import open_source

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Loaded:
    """A model and a data set, ready to be ranked.

    Attributes:
        classifier: Model and tokenizer.
        task: Data.
        model: Model as given.
        dataset: Data set as given.
        seconds: What loading took.
    """

    classifier: Classifier
    task: Task
    model: str
    dataset: str
    seconds: float


def load_one(model: ModelConfig, data: DataConfig, settings: RankSettings, splits: Splits | None = None) -> Loaded:
    """Load one model and one data set.

    Args:
        model: Model.
        data: Data set.
        settings: Settings.
        splits: Splits of the data set; None to find them.

    Returns:
        Both.
    """
    clock = time.perf_counter()
    task = task_of(open_source(data) if splits is None else splits, data)
    _check_rows(task, settings)
    classifier = load_model(model, task.objective, settings.seed)
    return Loaded(classifier, task, model.model, data.dataset, time.perf_counter() - clock)


def rank_loaded(
    loaded: Loaded,
    settings: RankSettings,
    calibration: Calibration,
    *,
    processes: Processes = ALONE,
    on_progress: OnProgress | None = None,
) -> Ranking:
    """Rank the adapters of one model on one data set, without training.

    Args:
        loaded: Both.
        settings: Settings.
        calibration: Calibration of the forecasts.
        processes: Who shares the pass; the first one ranks.
        on_progress: Called with what is done now, how much of it is done and how much there is.

    Returns:
        The ranking.
    """
    ranking = rank_adapters(
        loaded.classifier, loaded.task, settings, calibration, processes=processes, on_progress=on_progress
    )
    spent = {**ranking.seconds, "load": ranking.seconds["load"] + loaded.seconds}
    return replace(ranking, model=loaded.model, dataset=loaded.dataset, seconds=spent)


def rank_adapters(
    classifier: Classifier,
    task: Task,
    settings: RankSettings,
    calibration: Calibration,
    *,
    processes: Processes = ALONE,
    on_progress: OnProgress | None = None,
) -> Ranking:
    """Rank the adapters of a model, without training; the model is left as it is.

    Args:
        classifier: Model and tokenizer, without an adapter.
        task: Data.
        settings: Settings; what may be spent is for `foretune.trials.ranking`.
        calibration: Calibration of the forecasts.
        processes: Who shares the pass; the first one ranks.
        on_progress: Called with what is done now, how much of it is done and how much there is.

    Returns:
        The ranking.

    Raises:
        ForetuneError: If the settings do not fit the model or the data.
        HandedOver: In all processes but the first.
    """
    report = on_progress or (lambda *_: None)
    seconds = {}
    clock = time.perf_counter()
    ready = _prepared(classifier, task, settings)
    plan = replace(ready.plan, processes=processes)
    seconds["load"] = time.perf_counter() - clock
    clock = time.perf_counter()
    n = len(plan.train.features)
    texts = 2 * n + (0 if plan.evaluation is None else len(plan.evaluation.features))
    linearised = linearise(plan, on_batch=_counter(report, "texts through the model", texts))
    seconds["pass"] = time.perf_counter() - clock
    clock = time.perf_counter()
    report("pricing candidates", 0, 1)
    blocks = module_kernels(linearised, ready.ranks)
    quick = price_candidates(settings, blocks, ready.candidates, ready.name) if "lora" in settings.methods else []
    finalists = choose_finalists(quick, blocks.sites, settings.finalists)
    seconds["quick"] = time.perf_counter() - clock
    clock = time.perf_counter()
    scene = Scene(classifier, task, settings, plan, linearised, ready.placements)
    others = price_methods(scene, report)
    seconds["pass"] += time.perf_counter() - clock
    clock = time.perf_counter()
    starts = [
        linearised.start([]),
        *(linearised.start(entry.candidate.sites, entry.candidate.rank) for entry in finalists),
        *(entry.start for entry in others.priced if entry.start is not None),
    ]
    by_recipe = simulate_recipes(
        others.linearised,
        starts,
        settings,
        plan,
        lambda total: partial(_counter(report, "steps of simulated runs", total), 1),
    )
    seconds["simulate"] = time.perf_counter() - clock
    kappas = _kappas(blocks, finalists, settings)
    made = [_rows(runs, (finalists, kappas), others.priced, calibration, ready) for runs in by_recipe]
    constant = task.objective.constant_metric(linearised.evaluation.targets.cpu().numpy())
    rows = marked(
        ordered(
            [_at_risk(row, alone, constant, calibration) for alone, of_recipe in made for row in of_recipe], calibration
        ),
        equal_sizes=ready.equal_size is not None,
    )
    said_alone, head_recipe = min(
        ((alone, runs.recipe) for (alone, _), runs in zip(made, by_recipe, strict=True)), key=lambda pair: pair[0].key
    )
    recipes = tuple(runs.recipe for runs in by_recipe)
    return Ranking(
        model=classifier.source,
        dataset=task.source,
        modules=module_names(classifier.model),
        template=ready.template,
        sites=linearised.sites,
        recipes=recipes,
        rows=rows,
        quick=tuple(
            sorted(
                [*quick, *(entry.quick for entry in others.priced)],
                key=lambda entry: (-entry.score, entry.parameters, entry.name),
            )
        ),
        single=_single(blocks),
        head_alone=said_alone,
        head_recipe=head_recipe,
        head_runs=tuple(runs.head_alone for runs in by_recipe),
        constant=constant,
        samples=linearised.train.factors.n,
        train_rows=plan.train_rows,
        objective=task.objective,
        steps=max(runs.steps for runs in by_recipe),
        equal_size=ready.equal_size,
        notes=(
            *_of_checkpoint(classifier),
            *ready.notes,
            *others.notes,
            *notes_of(rows, recipes, calibration.risk),
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
    placements: tuple[tuple[Placement, ...], ...]  # of each method beside LoRA
    equal_size: int | None
    notes: tuple[str, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Different ranks of the candidates."""
        return tuple(sorted({candidate.rank for candidate in self.candidates}))

    def of_model(self, candidate: Candidate) -> Candidate:
        # names and costs are those in the whole model, whatever the user leaves to choose from
        return Candidate(tuple(self.positions[position] for position in candidate.sites), candidate.rank)

    def name(self, candidate: Candidate) -> str:
        return label(self.of_model(candidate), self.model_sites)


def _prepared(classifier: Classifier, task: Task, settings: RankSettings) -> _Prepared:
    """Everything that can go wrong before the work starts: candidates, sizes, samples, how many runs."""
    _check_rows(task, settings)
    size = None if settings.equal_size is None else parse_parameters("equal_size", settings.equal_size)
    largest = max(settings.ranks) if size is None else _largest_rank(classifier, task, settings, size)
    plan, template, notes = _placed(classifier, task, settings, largest)
    sites = plan.adapted.sites
    candidates = list_candidates(sites, settings)
    if size is not None:
        placements, candidates = candidates, equal_sizes(candidates, sites, size)
        notes = (*notes, *missed(len(placements) - len(candidates), len(placements), size))
    if settings.budget is not None:
        fitting(
            candidates, sites, parse_budget(settings.budget)
        )  # a budget that nothing fits is refused before the pass
    check_runs(settings, len(candidates))
    used = sorted({position for candidate in candidates for position in candidate.sites})
    adapters = tuple(plan.adapted.adapters[position] for position in used)
    renumbered = tuple(
        Candidate(tuple(used.index(at) for at in candidate.sites), candidate.rank) for candidate in candidates
    )
    plan = replace(plan, adapted=replace(plan.adapted, adapters=adapters))
    beside = list_placements(settings.methods, renumbered, plan.adapted.sites, template, classifier.model)
    return _Prepared(plan, template, renumbered, sites, tuple(used), beside, size, notes)


def _largest_rank(classifier: Classifier, task: Task, settings: RankSettings, size: int) -> int:
    """Rank of the pass of equal sizes, which is known once the modules are."""
    sites = _placed(classifier, task, settings, 1)[0].adapted.sites
    return max(candidate.rank for candidate in equal_sizes(list_candidates(sites, settings), sites, size))


def _placed(
    classifier: Classifier, task: Task, settings: RankSettings, rank: int
) -> tuple[Plan, LoraConfig, tuple[str, ...]]:
    """The plan of the pass with adapters of one rank on all modules that can carry one."""
    adapter = AdapterConfig(("all-linear",), r=rank, alpha=settings.alpha, rslora=settings.rslora, init=settings.init)
    template = lora_config(classifier.model, adapter)
    of_pass = settings_of_pass(task, settings, draws=settings.draws, sigma=settings.sigma, memory=settings.memory)
    plan, notes = leave_out(prepare(classifier, task, template, of_pass), settings)
    return plan, template, notes


def _check_rows(task: Task, sample: KernelSample) -> None:
    task.objective.check_count(sample.samples)
    task.objective.check_rows(task.train.labels)


def _kappas(blocks: Blocks, finalists: Sequence[Quick], settings: RankSettings) -> list[float]:
    kappas = []
    for entry in finalists:
        kernel = blocks.kernels([entry.candidate])[0]
        try:
            found = spectrum(kernel, sigma=settings.sigma, epsilon=float(np.finfo(np.float32).eps))
            kappas.append(found.condition_number)
        except KernelError:
            kappas.append(float("nan"))
    return kappas


def _rows(
    runs: RecipeRuns,
    lora: tuple[Sequence[Quick], Sequence[float]],
    priced: Sequence[Priced],
    calibration: Calibration,
    ready: _Prepared,
) -> tuple[RunForecast, list[Row]]:
    """What is said of the head alone, and of every finalist and placement of other methods, under one recipe."""
    output, (finalists, kappas) = ready.plan.reduction.name, lora
    count = 1 + len(finalists)

    def cost(candidate: Candidate) -> float:
        return step_cost(ready.of_model(candidate), ready.model_sites)

    alone, *said = (
        apply_calibration(calibration, case_values(simulated), output, run=run)
        for simulated, run in zip(runs.simulated[:count], runs.kinds[:count], strict=True)
    )
    rows = [
        Row(
            quick=entry,
            recipe=runs.recipe,
            steps=runs.steps,
            said=forecast,
            simulated=simulated,
            best_epoch=best_epoch(*after_epochs(simulated.trajectory, runs.recipe.epochs), simulated.metric),
            update_rate=run.update_rate or 0.0,
            condition_number=kappa,
            megabytes=entry.parameters * BYTES_PER_PARAMETER / 1e6,
            compute=cost(entry.candidate),
            run=run,
        )
        for entry, forecast, simulated, run, kappa in zip(
            finalists, said, runs.simulated[1:count], runs.kinds[1:count], kappas, strict=True
        )
    ]
    beside = replace(runs, simulated=runs.simulated[count:], kinds=runs.kinds[count:])
    return alone, [*rows, *method_rows(priced, beside, calibration, ready.plan, cost)]


def _at_risk(row: Row, alone: RunForecast, constant: float | None, calibration: Calibration) -> Row:
    """Add how likely the run collapses, and where it ends then."""
    if calibration.risk is None or calibration.kind != row.said.kind or not row.update_rate:
        return row
    better = row.said.metric.better
    free = [value for value in (constant, alone.order[0]) if value is not None and isfinite(value)]
    floor = max(free, key=lambda value: better * value, default=None)
    return replace(row, risk=calibration.risk.probability(row.update_rate, row.steps), floor=floor)


def _single(blocks: Blocks) -> NDArray[np.float64]:
    rank = blocks.ranks[-1]
    return quick_scores(blocks, [Candidate((position,), rank) for position in range(len(blocks.sites))])
