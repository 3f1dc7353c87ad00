"""Adapter methods beside LoRA in a ranking of a language model: quick scores of placements, and rows without a run.

Nothing simulates their runs, so that they have no forecast; trials (`--spend`) tell where they stand.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import exp, fsum, inf, isfinite, nan, sqrt

from torch import Tensor

from foretune.errors import ConfigError, KernelError, border
from foretune.forecasting.calibration import RunForecast
from foretune.forecasting.reach import Reach
from foretune.forecasting.sequence_levels import Levels
from foretune.models.adapted import AdaptedModel
from foretune.models.groups import read_groups
from foretune.models.language_model import LanguageModel
from foretune.models.placement import place
from foretune.ntk.sequence_groups import mean_gradients
from foretune.ranking.candidates import Candidate
from foretune.ranking.finalists import Quick, best_of_method
from foretune.ranking.methods import VIRTUAL_TOKENS, Placement, told_by_trials, with_steps
from foretune.ranking.sequence_rows import SequenceRow
from foretune.sequence_plan import OnBatch, SequencePlan, TokenRows, sequence_batches
from foretune.settings.commands import RankSettings
from foretune.settings.groups import Recipe


def check_positions(language: LanguageModel, placements: Sequence[Sequence[Placement]], longest: int) -> None:
    """Refuse virtual tokens for which the model has no positions left.

    Args:
        language: Model, without an adapter.
        placements: Of each method.
        longest: Most tokens of a sequence.

    Raises:
        ConfigError: Naming the method and the length that fits.
    """
    limit = language.position_limit
    for of_method in placements:
        method = of_method[0].method
        if method.on == "model" and limit is not None and longest + VIRTUAL_TOKENS > limit:
            raise ConfigError(
                f"methods = {method.name}: {VIRTUAL_TOKENS} virtual tokens before {longest} others are more than the "
                f"{limit} positions of the model: use --max-length {max(1, limit - VIRTUAL_TOKENS)}"
            )


def price_sequences(
    plan: SequencePlan,
    placements: Sequence[Sequence[Placement]],
    settings: RankSettings,
    n_sites: int,
    on_batch: OnBatch | None = None,
) -> tuple[Quick, ...]:
    """Score placements of methods beside LoRA as `gradient_scores` does LoRA's, from exact gradients.

    With G and E the mean gradients a token of the known sequences and of those to predict, ⟨G, E⟩ / √parameters: what a
    first step of gradient descent lowers the loss by. Methods want other rates, so that it compares placements of one
    method alone.

    Args:
        plan: Model without adapters, and the sequences.
        placements: Of each method, their modules among the plan's.
        settings: Settings.
        n_sites: Modules of the plan.
        on_batch: Called with the number of sequences after each batch.

    Returns:
        Of each method the best placements within the budget.

    Raises:
        ConfigError: If a budget fits none of a method's placements.
        KernelError: If the model does not run with a method.
    """
    found: list[Quick] = []
    for of_method in placements:
        scored = [_scored(plan, placement, settings, n_sites, on_batch) for placement in of_method]
        found += (scored[at] for at in best_of_method(scored, settings.budget))
    return tuple(found)


def _scored(
    plan: SequencePlan, placement: Placement, settings: RankSettings, n_sites: int, on_batch: OnBatch | None
) -> Quick:
    method = placement.method.name
    placed = place(plan.language.model, placement.config, seed=settings.seed)
    adapted = replace(read_groups(placed), head={})
    parameters = sum(group.site.others for group in adapted.groups)
    on_placed = replace(plan, placed=placed, adapted=adapted)
    with border(KernelError, f"the model does not run with {method}"):
        known, predicted = (
            _mean(on_placed, adapted, tokens, on_batch) for tokens in (plan.known, plan.rows.evaluation)
        )
    score = fsum(float((g.double() * e.double()).sum()) for g, e in zip(known, predicted, strict=True))
    return Quick(
        placement.candidate or Candidate(tuple(range(n_sites)), 1),
        placement.name,
        parameters,
        score / sqrt(parameters),
        method=method,
        config=placement.config,
        modules=placement.modules,
    )


def _mean(plan: SequencePlan, adapted: AdaptedModel, tokens: TokenRows, on_batch: OnBatch | None) -> tuple[Tensor, ...]:
    return mean_gradients(adapted, sequence_batches(plan, tokens, on_batch=on_batch))


def unsimulated(entry: Quick, recipe: Recipe, levels: Levels, cost: float) -> SequenceRow:
    """Make the row of a method beside LoRA: nothing is forecast of it.

    Args:
        entry: Placement.
        recipe: How it trains.
        levels: Plan and calibration.
        cost: What a training step costs, relative to one through all layers.

    Returns:
        The row, which stands behind those with a simulated run.
    """
    run = levels.run(recipe, levels.plan.train_rows, 0.0)
    reach = Reach(inf, (f"no run of {entry.method} is simulated",))
    said = RunForecast(None, (nan, nan), reach, kind=levels.plan.language.kind, calibrated=False)
    return SequenceRow(replace(entry, config=with_steps(entry.config, run.steps)), recipe, run, None, said, cost)


def by_trials(rows: Sequence[SequenceRow]) -> list[SequenceRow]:
    """Give rows without a simulated run the loss that their trials tell.

    With y the loss of the largest trial of such a row, on n rows, and p_i and y_i forecast and loss of the k rows that
    have a simulated run, did not diverge and were tried on n rows as well,

        p = y + (1/k) Σ_i (p_i − y_i),

    what those still gain from n rows on; p = y where there is no such row.

    Args:
        rows: Rows with their trials.

    Returns:
        The same rows; those that have a simulated run or no trial as they are.
    """
    return [row if row.found is not None or not row.trials else _told(row, rows) for row in rows]


def _told(row: SequenceRow, rows: Sequence[SequenceRow]) -> SequenceRow:
    size = int(row.trials[-1]["rows"])
    shown = row.ended_at(size)
    others = [
        (other.loss, other.ended_at(size)) for other in rows if other.found is not None and other.diverged is None
    ]
    gaps = [said - ended for said, ended in others if ended is not None and isfinite(said - ended)]
    loss = nan if shown is None or row.diverged is not None else shown + (fsum(gaps) / len(gaps) if gaps else 0.0)
    return replace(row, forecast=replace(row.forecast, order=(exp(loss) if loss < 700 else inf, loss)))


def notes_of_methods(methods: Sequence[str], spend: str) -> tuple[str, ...]:
    """Say what is known of methods beside LoRA.

    Args:
        methods: Their names.
        spend: What may be spent on trials.

    Returns:
        Sentences.
    """
    if not methods:
        return ()
    return (
        f"{', '.join(methods)}: no run is simulated and nothing forecast; the quick score chooses among placements of "
        f"one method; {told_by_trials(spend)}.",
    )
