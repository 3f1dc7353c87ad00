"""Rank the adapters of a causal language model on one data set: one pass, and a simulated run for the finalists.

What puts the rows into order is their forecast or, where the calibration has not seen the model, the evaluation loss of
the model with the simulated A and B plugged in (`foretune.forecasting.sequence_simulation`).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from peft import LoraConfig

from foretune.errors import ConfigError, shown
from foretune.forecasting.schedule import schedule_of
from foretune.forecasting.sequence_calibration import SequenceCalibration
from foretune.forecasting.sequence_levels import levels_of, speed_of
from foretune.forecasting.sequence_simulation import (
    FIRST,
    LinearisedSequences,
    linearise_sequences,
    plug_steps,
    simulate_sequences,
)
from foretune.language.rows import LanguageTask
from foretune.models.language_model import LanguageModel
from foretune.models.placement import lora_config, place, read_adapters
from foretune.models.sites import Site
from foretune.ranking.adapter import module_names
from foretune.ranking.budget import fitting, n_parameters, parse_budget, parse_parameters
from foretune.ranking.candidates import Candidate, label
from foretune.ranking.equal_size import equal_sizes, missed
from foretune.ranking.finalists import Quick
from foretune.ranking.left_out import leave_out_modules, list_candidates
from foretune.ranking.method_pass import list_placements
from foretune.ranking.methods import Placement
from foretune.ranking.recipes import check_runs
from foretune.ranking.sequence_finalists import choose_spread, gradient_scores
from foretune.ranking.sequence_methods import check_positions, notes_of_methods, price_sequences, unsimulated
from foretune.ranking.sequence_rows import SequenceRanking, SequenceRow, in_order, notes_of
from foretune.ranking.step_cost import lengthened, step_cost
from foretune.sequence_plan import OnBatch, SequencePlan, prepare_sequences
from foretune.settings.commands import RankSettings
from foretune.settings.groups import AdapterConfig


@dataclass(frozen=True)
class SequenceCandidates:
    """What is ranked.

    Attributes:
        plan: The model with adapters of the largest rank on every module that some candidate uses.
        template: peft's configuration of all modules.
        candidates: Placements, by the positions of their modules in the plan.
        model_sites: Every module of the model that can be adapted, from which names and costs are.
        positions: For each module of the plan its position among these.
        equal_size: Parameters that all have, nearly; None where they differ.
        notes: What was left out.
        seconds: What making it took.
        placements: What is priced of each method beside LoRA, by positions of modules in the plan.
    """

    plan: SequencePlan
    template: LoraConfig
    candidates: tuple[Candidate, ...]
    model_sites: tuple[Site, ...]
    positions: tuple[int, ...]
    equal_size: int | None
    notes: tuple[str, ...]
    seconds: float
    placements: tuple[tuple[Placement, ...], ...] = ()

    def of_model(self, candidate: Candidate) -> Candidate:
        """Say a candidate by the positions in the whole model.

        Args:
            candidate: Placement.

        Returns:
            The same one among `model_sites`.
        """
        return Candidate(tuple(self.positions[position] for position in candidate.sites), candidate.rank)

    def n_finalists(self, settings: RankSettings) -> int:
        """Count the candidates whose run is simulated.

        Args:
            settings: Settings.

        Returns:
            How many.
        """
        return min(settings.finalists, len(self.candidates))


def prepare_ranking(
    language: LanguageModel, task: LanguageTask, settings: RankSettings, *, inplace: bool = False
) -> SequenceCandidates:
    """Place adapters on all modules that may carry one, and list the candidates: all that can go wrong before the work.

    Args:
        language: Model and tokenizer, without an adapter.
        task: Data.
        settings: Settings.
        inplace: Whether the adapters may go into the given model instead of a copy.

    Returns:
        What is ranked; of equal sizes or a budget only what fits.

    Raises:
        ConfigError: If methods are asked for and LoRA is not among them.
        ForetuneError: If the settings do not fit the model or the data.
    """
    clock = time.perf_counter()
    if "lora" not in settings.methods:
        raise ConfigError(
            f"methods = {shown(list(settings.methods))}: of a language model only runs of LoRA are simulated, and "
            "the others are held against them: name lora too"
        )
    inplace = inplace and settings.methods == RankSettings.methods  # others need the model without LoRA
    size = None if settings.equal_size is None else parse_parameters("equal_size", settings.equal_size)
    largest = max(settings.ranks) if size is None else _largest_rank(language, settings, size)
    template = _template(language, settings, largest)
    plan = prepare_sequences(language, task, template, settings, inplace=inplace)
    adapted, notes = leave_out_modules(plan.adapted, plan.placed.get_base_model(), settings)
    sites = adapted.sites
    candidates = list_candidates(sites, settings)
    if size is not None:
        placements, candidates = candidates, equal_sizes(candidates, sites, size)
        notes = (*notes, *missed(len(placements) - len(candidates), len(placements), size))
    if settings.budget is not None:
        candidates = fitting(candidates, sites, parse_budget(settings.budget))
    check_runs(settings, len(candidates))
    used = sorted({position for candidate in candidates for position in candidate.sites})
    adapted = replace(adapted, adapters=tuple(adapted.adapters[position] for position in used))
    place_of = {position: place for place, position in enumerate(used)}
    renumbered = tuple(Candidate(tuple(place_of[at] for at in entry.sites), entry.rank) for entry in candidates)
    ready = replace(plan, adapted=adapted)
    listed = list_placements(settings.methods, candidates, sites, template, language.model)
    check_positions(language, listed, plan.rows.max_length)
    beside = tuple(tuple(_renumbered(placement, place_of) for placement in of_method) for of_method in listed)
    spent = time.perf_counter() - clock
    return SequenceCandidates(ready, template, renumbered, sites, tuple(used), size, notes, spent, beside)


def _renumbered(placement: Placement, place_of: Mapping[int, int]) -> Placement:
    """By the positions among the modules of the plan."""
    entry = placement.candidate
    if entry is None:
        return placement
    return replace(placement, candidate=Candidate(tuple(place_of[at] for at in entry.sites), entry.rank))


def _template(language: LanguageModel, settings: RankSettings, rank: int) -> LoraConfig:
    adapter = AdapterConfig(("all-linear",), r=rank, alpha=settings.alpha, rslora=settings.rslora, init=settings.init)
    return lora_config(language.model, adapter)


def _largest_rank(language: LanguageModel, settings: RankSettings, size: int) -> int:
    """Rank of the pass of equal sizes, which is known once the modules are."""
    placed = place(language.model, _template(language, settings, 1), seed=settings.seed)
    adapted, _ = leave_out_modules(read_adapters(placed), placed.get_base_model(), settings)
    return max(entry.rank for entry in equal_sizes(list_candidates(adapted.sites, settings), adapted.sites, size))


def n_ranked(ready: SequenceCandidates, settings: RankSettings) -> int:
    """Count the sequences that go through the model, for a progress bar.

    Args:
        ready: What is ranked.
        settings: Settings.

    Returns:
        The first sequences, the known ones and those to predict; the latter again each time that an adapter is plugged
        in.
    """
    plan, finalists = ready.plan, ready.n_finalists(settings)
    known, predicted = len(plan.known.features), len(plan.rows.evaluation.features)
    looks = [
        finalists * len(plug_steps(schedule_of(recipe, min(known, plan.train_rows), seed=settings.seed)))
        for recipe in settings.each()
    ]
    passes = sum(map(len, ready.placements))
    return min(FIRST, known) + known + predicted * (1 + sum(looks)) + passes * (known + predicted)


def rank_sequences(
    ready: SequenceCandidates,
    settings: RankSettings,
    on_batch: OnBatch | None = None,
    *,
    calibration: SequenceCalibration | None = None,
) -> SequenceRanking:
    """Rank the adapters of a language model, without training.

    Args:
        ready: From `prepare_ranking`.
        settings: The same settings.
        on_batch: Called with the number of sequences after each batch that goes through the model, `n_ranked` in all.
        calibration: Calibration; None takes the one that comes with foretune.

    Returns:
        The ranking.
    """
    plan, seconds = ready.plan, {"load": ready.seconds}
    linearised = linearise_sequences(plan, settings.of_sequences, on_batch=on_batch)
    seconds["pass"] = linearised.seconds
    clock = time.perf_counter()
    quick = _screened(ready, linearised)
    finalists = choose_spread(quick, linearised.sites, ready.n_finalists(settings))
    seconds["quick"] = time.perf_counter() - clock
    clock = time.perf_counter()
    priced = price_sequences(plan, ready.placements, settings, len(linearised.sites), on_batch)
    if priced:
        seconds["methods"] = time.perf_counter() - clock
    clock = time.perf_counter()
    starts = [linearised.start(entry.candidate.sites, entry.candidate.rank) for entry in finalists]
    made: list[SequenceRow] = []
    features = plan.known.features
    mean_length = sum(len(feature["input_ids"]) for feature in features) / len(features)
    levels = levels_of(plan, calibration)
    for recipe in settings.each():
        schedule = schedule_of(recipe, levels.seen(plan.train_rows), seed=settings.seed)
        runs = simulate_sequences(plan, linearised, starts, schedule, on_batch=on_batch)
        for entry, start, found in zip(finalists, starts, runs, strict=True):
            run = levels.run(recipe, plan.train_rows, speed_of(start))
            cost = step_cost(ready.of_model(entry.candidate), ready.model_sites)
            made.append(SequenceRow(entry, recipe, run, found, levels.forecast(found, run), cost))
        for entry in priced:
            cost = step_cost(ready.of_model(entry.candidate), ready.model_sites)
            cost *= lengthened(entry.config, mean_length)
            made.append(unsimulated(entry, recipe, levels, cost))
    seconds["simulate"] = time.perf_counter() - clock
    rows = in_order(made, equal_sizes=ready.equal_size is not None)
    known = linearised.train.sketches
    base, others = linearised.base, [method for method in settings.methods if method != "lora"]
    return SequenceRanking(
        model=plan.language.source,
        dataset=plan.task.source,
        modules=module_names(plan.placed),
        template=ready.template,
        sites=linearised.sites,
        recipes=settings.each(),
        rows=rows,
        quick=(*sorted(quick, key=lambda entry: (-entry.score, entry.parameters, entry.name)), *priced),
        base=base,
        samples=known.n,
        train_rows=plan.train_rows,
        eval_rows=len(plan.rows.evaluation.features),
        kept=known.shares,
        equal_size=ready.equal_size,
        notes=(
            *plan.language.notes,
            *ready.notes,
            *notes_of_methods(others, settings.spend),
            *notes_of(rows, base, known.n, plan.train_rows),
        ),
        seconds=seconds,
        calibration=levels.calibration.source,
    )


def _screened(ready: SequenceCandidates, linearised: LinearisedSequences) -> list[Quick]:
    scores: Sequence[float] = gradient_scores(linearised, ready.candidates).tolist()
    return [
        Quick(entry, label(ready.of_model(entry), ready.model_sites), n_parameters(entry, linearised.sites), score)
        for entry, score in zip(ready.candidates, scores, strict=True)
    ]
