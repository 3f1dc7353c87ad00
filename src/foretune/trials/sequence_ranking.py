"""A ranking of a language model's adapters whose first rows are tried, and then ordered by what that showed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from foretune.engines import choose_engine
from foretune.forecasting.calibration import RunForecast
from foretune.forecasting.sequence_calibration import SequenceCalibration
from foretune.forecasting.sequence_levels import Levels, levels_of
from foretune.language.rows import LanguageTask
from foretune.models.language_model import LanguageModel
from foretune.ranking.rank import OnProgress
from foretune.ranking.sequence_methods import by_trials
from foretune.ranking.sequence_report import sequence_adapter
from foretune.ranking.sequence_rows import (
    SequenceRanking,
    SequenceRow,
    compared_rows,
    comparison_of,
    in_order,
    in_words,
    notes_of,
    place_of,
)
from foretune.ranking.sequences import SequenceCandidates, n_ranked, prepare_ranking, rank_sequences
from foretune.settings.commands import RankSettings
from foretune.settings.spend import parse_spend
from foretune.trials.bench import Candidate, bench_of_plan
from foretune.trials.compared import compared_early, to_try
from foretune.trials.forecast import record
from foretune.trials.plan import affordable
from foretune.trials.run import Tried
from foretune.trials.stages import Finalists, Telling, TriedEach, in_stages, seconds_of, telling_to
from foretune.trials.store import open_store


def rank_language(
    language: LanguageModel, task: LanguageTask, settings: RankSettings, *, on_progress: OnProgress | None = None
) -> SequenceRanking:
    """Rank the adapters of a language model, with the trials that its spend buys; the model is left as it is.

    Args:
        language: Model and tokenizer, without an adapter.
        task: Data.
        settings: Settings.
        on_progress: Called with what is done now, how much of it is done and how much there is.

    Returns:
        The ranking.

    Raises:
        ForetuneError: If the settings do not fit the model or the data.
    """
    tell = on_progress or (lambda *_: None)
    ready = prepare_ranking(language, task, settings)
    check_sequence_spend(ready, settings)
    total, done = n_ranked(ready, settings), 0

    def passed(count: int) -> None:
        nonlocal done
        done += count
        tell("sequences through the model", done, total)

    ranking = rank_sequences(ready, settings, passed)
    return try_sequences(ranking, ready, settings, telling=telling_to(tell))


def check_sequence_spend(ready: SequenceCandidates, settings: RankSettings) -> None:
    """Refuse a spend that buys no trial, and what cannot make trials, before the pass over the sequences.

    Args:
        ready: What is ranked.
        settings: Settings of the ranking.

    Raises:
        ConfigError: Naming the spend, and what the smallest trial costs; or if Ray is wanted and not installed.
    """
    choose_engine(settings.engine, settings.workers)
    share = parse_spend(settings.spend)
    if share:
        affordable(settings.each(), bench_of_plan(ready.plan).extent(), share)


def try_sequences(
    ranking: SequenceRanking,
    ready: SequenceCandidates,
    settings: RankSettings,
    *,
    telling: Telling | None = None,
    calibration: SequenceCalibration | None = None,
) -> SequenceRanking:
    """Spend a share of one full run on trials of a ranking's rows, and put them into order again.

    The small trials come first, for the first rows of the ranking. The largest is for the row that is the first by
    them. Losses of trials on different numbers of rows do not compare: those with a trial on the largest number of
    rows on which several were tried are ordered by it, and all others keep their simulated place behind them.

    Args:
        ranking: Ranking without trials.
        ready: What was ranked, with adapters on a copy of the model.
        settings: Settings that it was made with.
        telling: Who is told how it goes; None tells nobody.
        calibration: Calibration; None takes the one that comes with foretune.

    Returns:
        The ranking with trials; as it is for a spend of 0.

    Raises:
        ConfigError: If the spend is none, or buys no trial.
        KeyboardInterrupt: With what became of the work; finished trials are kept.
    """
    share = parse_spend(settings.spend)
    if not share:
        return ranking
    bench, ranking = bench_of_plan(ready.plan), replace(ranking, rows=to_try(ranking.rows))
    candidates = tuple(
        Candidate(in_words(ranking, row), sequence_adapter(ranking, row.quick), row.recipe) for row in ranking.rows
    )
    engine = choose_engine(settings.engine, settings.workers)
    finalists = Finalists(bench, candidates, open_store(bench), share, compared_early(ranking.rows), engine)

    levels = levels_of(ready.plan, calibration)

    def places(tried: TriedEach) -> list[Any]:
        rows = _with_trials(ranking.rows, tried, levels)
        compared = comparison_of(rows)
        return [place_of(row, compared) for row in rows]

    plan, tried = in_stages(finalists, telling or Telling(), places)
    rows = in_order(_with_trials(ranking.rows, tried, levels), equal_sizes=ranking.equal_size is not None)
    of_before = set(_notes(ranking, ranking.rows))
    kept = [note for note in ranking.notes if note not in of_before]
    return replace(
        ranking,
        rows=rows,
        notes=(*kept, *_notes(ranking, rows)),
        seconds={**ranking.seconds, "trials": seconds_of(tried)},
        spent=finalists.spent(plan),
        compared=compared_rows(rows),
    )


def _with_trials(rows: Sequence[SequenceRow], tried: Sequence[Sequence[Tried]], levels: Levels) -> list[SequenceRow]:
    """Rows with their trials, and the forecasts that are made with these."""

    def forecast(row: SequenceRow, of_row: Sequence[Tried]) -> RunForecast:
        if row.found is None or not of_row:
            return row.forecast
        return levels.forecast(row.found, row.run, [one.shown for one in of_row])

    pairs = zip(rows, tried, strict=True)
    return by_trials(
        [replace(row, trials=tuple(map(record, of_row)), forecast=forecast(row, of_row)) for row, of_row in pairs]
    )


def _notes(ranking: SequenceRanking, rows: Sequence[SequenceRow]) -> tuple[str, ...]:
    return notes_of(rows, ranking.base, ranking.samples, ranking.train_rows)
