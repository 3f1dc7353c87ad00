"""A ranking whose finalists are tried: small trials for several, the largest for the one that is the best then."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np

from foretune.engines import choose_engine
from foretune.errors import ConfigError
from foretune.forecasting.calibration import Calibration, apply_calibration
from foretune.forecasting.calibration_file import shipped_calibration
from foretune.forecasting.simulated_runs import case_values
from foretune.language.rows import LanguageTask
from foretune.models.classifier import Classifier, own_classifier
from foretune.models.language_model import own_language_model
from foretune.ranking.rank import OnProgress, rank_adapters
from foretune.ranking.recipes import notes_of
from foretune.ranking.recommend import in_words, marked
from foretune.ranking.report import adapter_of
from foretune.ranking.rows import Ranking, Row, Spent, ordered, sort_key
from foretune.ranking.sequence_rows import SequenceRanking
from foretune.settings.commands import RankSettings
from foretune.settings.spend import parse_spend
from foretune.tasks.load import Task
from foretune.trials.bench import Candidate, ClassifierBench, bench_of
from foretune.trials.compared import by_comparison, compared_early, to_try, without_level
from foretune.trials.conclusions import collapsed_at, mean_shift, shifted
from foretune.trials.forecast import record
from foretune.trials.plan import Extent, affordable
from foretune.trials.run import Tried
from foretune.trials.sequence_ranking import rank_language
from foretune.trials.stages import Finalists, Telling, TriedEach, in_stages, seconds_of, telling_to
from foretune.trials.store import open_store


@dataclass(frozen=True)
class _Forecasts:
    """The forecasts of a ranking's rows, and what trials are held against."""

    ranking: Ranking
    calibration: Calibration
    bench: ClassifierBench


def check_spend(classifier: Classifier, task: Task, settings: RankSettings) -> None:
    """Refuse a spend that is none or buys no trial, and what cannot make trials, before any work.

    Args:
        classifier: Model and tokenizer.
        task: Data.
        settings: Settings of the ranking.

    Raises:
        ConfigError: Naming the spend, and what the smallest trial costs; or if Ray is wanted and not installed.
    """
    choose_engine(settings.engine, settings.workers)
    share = parse_spend(settings.spend)
    if share:
        extent: Extent = bench_of(classifier, task, settings, eval_samples=settings.eval_samples).extent()
        affordable(settings.each(), extent, share)


@overload
def rank(
    model: Any,
    tokenizer: Any,
    task: Task,
    *,
    settings: RankSettings | None = None,
    calibration: Calibration | None = None,
    on_progress: OnProgress | None = None,
) -> Ranking: ...


@overload
def rank(
    model: Any,
    tokenizer: Any,
    task: LanguageTask,
    *,
    settings: RankSettings | None = None,
    calibration: None = None,
    on_progress: OnProgress | None = None,
) -> SequenceRanking: ...


def rank(
    model: Any,
    tokenizer: Any,
    task: Task | LanguageTask,
    *,
    settings: RankSettings | None = None,
    calibration: Calibration | None = None,
    on_progress: OnProgress | None = None,
) -> Ranking | SequenceRanking:
    """Rank the adapters of the user's own model on the user's own data; the model is left as it is.

    Args:
        model: transformers sequence classifier in eval mode, or for language causal language model, without an adapter.
        tokenizer: Its tokenizer.
        task: Data, from `load_task` or `task_from_datasets`, or `load_language_task` or `language_task_from_datasets`.
        settings: Settings, among them what may be spent on trials (`spend`), and whether these are made side by side:
            `workers=4` for as many processes of this machine (in a script below `if __name__ == "__main__":`),
            `engine="ray"` for a Ray cluster. None takes the defaults.
        calibration: Calibration of a classifier's forecasts; None takes the one that comes with foretune, as does every
            language model.
        on_progress: Called with what is done now, how much of it is done and how much there is.

    Returns:
        The ranking.

    Raises:
        ConfigError: If a calibration is given for a language model.
        ForetuneError: If the settings do not fit the model or the data.
    """
    wanted = settings or RankSettings()
    if isinstance(task, LanguageTask):
        if calibration is not None:
            raise ConfigError("calibration: language models take the one that comes with foretune, leave it out")
        return rank_language(own_language_model(model, tokenizer, bare=True), task, wanted, on_progress=on_progress)
    calibrated = calibration or shipped_calibration()
    classifier = own_classifier(model, tokenizer, task.objective, bare=True)
    check_spend(classifier, task, wanted)
    ranking = rank_adapters(classifier, task, wanted, calibrated, on_progress=on_progress)
    telling = None if on_progress is None else telling_to(on_progress)
    return try_finalists(ranking, classifier, task, wanted, calibrated, telling=telling)


def try_finalists(
    ranking: Ranking,
    classifier: Classifier,
    task: Task,
    settings: RankSettings,
    calibration: Calibration,
    *,
    telling: Telling | None = None,
) -> Ranking:
    """Spend a share of one full run on trials of a ranking's rows, and forecast them again.

    The small trials come first, for the best rows and, before others, for one of each method whose runs are not
    simulated (`foretune.trials.compared`). The largest is for the row that is the best by the forecasts that
    they are part of. Rows without a trial are shifted as `foretune.trials.conclusions` says.

    Args:
        ranking: Ranking without trials.
        classifier: Model and tokenizer; trials work on copies.
        task: Data.
        settings: Settings that it was made with.
        calibration: Calibration of its forecasts.
        telling: Who is told how it goes; None tells nobody.

    Returns:
        The ranking with trials; as it is for a spend of 0.

    Raises:
        ConfigError: If the spend is none, or buys no trial.
        KeyboardInterrupt: With what became of the work; finished trials are kept.
    """
    share = parse_spend(settings.spend)
    if not share:
        return ranking
    told, ranking = telling or Telling(), replace(ranking, rows=to_try(ranking.rows))
    bench = bench_of(classifier, task, settings, eval_samples=settings.eval_samples)
    candidates = tuple(
        Candidate(in_words(row, len(ranking.recipes)), adapter_of(ranking, row.quick), row.recipe)
        for row in ranking.rows
    )
    forecasts = _Forecasts(ranking, calibration, bench)
    engine = choose_engine(settings.engine, settings.workers)
    finalists = Finalists(bench, candidates, open_store(bench), share, compared_early(ranking.rows), engine)

    def places(tried: TriedEach) -> list[Any]:
        return [sort_key(row) for row in _conclude(forecasts, tried)]

    plan, tried = in_stages(finalists, told, places)
    return _ranked(forecasts, _conclude(forecasts, tried), finalists.spent(plan), tried)


def _conclude(forecasts: _Forecasts, tried: Sequence[Sequence[Tried]]) -> tuple[Row, ...]:
    """What is said of each row now, in the order of the candidates."""
    ranking = forecasts.ranking
    rows = [_with_trials(forecasts, row, of_row) for row, of_row in zip(ranking.rows, tried, strict=True)]
    pairs = [
        (before.said, after.said)
        for before, after in zip(ranking.rows, rows, strict=True)
        if after.trials and after.collapsed is None and not after.said.note and after.quick.config is None
    ]
    by = mean_shift(pairs)
    said = [row if row.trials else replace(row, said=shifted(row.said, by)) for row in rows]
    return by_comparison(said, ranking.train_rows)


def _with_trials(forecasts: _Forecasts, row: Row, tried: Sequence[Tried]) -> Row:
    if not tried:
        return row
    ranking, task = forecasts.ranking, forecasts.bench.task
    objective, shown = task.objective, [one.shown for one in tried]
    output = objective.simulated().name
    said = row.said
    if row.simulated is not None:
        values = case_values(row.simulated)
        with_them = apply_calibration(forecasts.calibration, values, output, run=row.run, shown=shown)
        said = without_level(with_them, row)
    head = ranking.head_runs[ranking.recipes.index(row.recipe)]
    floors = [ranking.constant, largest_within(head, max(one.rows for one in shown))]
    targets = task.train.labels[forecasts.bench.held.training]
    answer = np.broadcast_to(objective.constant(targets), (len(targets), objective.n_outputs))
    collapsed = collapsed_at(shown, objective.metric, floors, objective.mean_loss(answer, targets))
    return replace(row, said=said, trials=tuple(map(record, tried)), collapsed=collapsed)


def largest_within(head: Sequence[tuple[int, float]], rows: int) -> float | None:
    """Say what the head alone reaches on no more rows than a trial has.

    Args:
        head: Its main metric by rising rows.
        rows: Rows of the trial.

    Returns:
        The metric on the most rows that are not more; None where all are more.
    """
    return next((metric for size, metric in reversed(head) if size <= rows), None)


def _ranked(forecasts: _Forecasts, rows: Sequence[Row], spent: Spent, tried: Sequence[Sequence[Tried]]) -> Ranking:
    """Order and mark the rows again, and say what was spent."""
    ranking, calibration = forecasts.ranking, forecasts.calibration
    risk, recipes = calibration.risk, ranking.recipes
    again = marked(ordered(rows, calibration), equal_sizes=ranking.equal_size is not None)
    of_before = set(notes_of(ranking.rows, recipes, risk))
    kept = [note for note in ranking.notes if note not in of_before]
    return replace(
        ranking,
        rows=again,
        notes=(*kept, *notes_of(again, recipes, risk), *_trial_notes(again, calibration, ranking)),
        seconds={**ranking.seconds, "trials": seconds_of(tried)},
        spent=spent,
    )


def _trial_notes(rows: Sequence[Row], calibration: Calibration, ranking: Ranking) -> tuple[str, ...]:
    notes = []
    if calibration.trial_domain is None or calibration.kind != ranking.objective.kind:
        notes.append(
            "The calibration has seen no trials of such runs: they are shown and mark what collapses, and no forecast "
            "hangs on them."
        )
    notes += dict.fromkeys(row.said.note for row in rows if row.said.note)
    collapsed = [row for row in rows if row.collapsed is not None]
    if collapsed:
        names = "; ".join(in_words(row, len(ranking.recipes)) for row in collapsed)
        last = " They stand behind all others." if len(collapsed) < len(rows) else ""
        notes.append(f"Collapsed in a trial: {names}.{last}")
    return tuple(notes)
