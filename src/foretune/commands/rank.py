"""`foretune rank`."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from foretune.commands.loading import (
    classifiers_only,
    in_processes,
    is_language,
    load_language_alone,
    one_process,
    open_data,
    say_where,
)
from foretune.errors import ConfigError
from foretune.settings.commands import ADAPTER_FILE, CHOSEN, METHOD_ROWS, KernelSample, RankSettings, Search, Trials
from foretune.settings.groups import Columns, DataConfig, Loading, ModelConfig, Recipes

if TYPE_CHECKING:
    from rich.console import Console

    from foretune.forecasting.calibration import Calibration
    from foretune.processes.group import Processes
    from foretune.ranking.rank import Loaded
    from foretune.ranking.report import RankRun
    from foretune.ranking.rows import Ranking
    from foretune.readers.folder import Splits
    from foretune.trials.stages import Telling

_ALONE = "foretune rank takes language models one at a time yet: name one --model and one --dataset"


def rank(
    *,
    model: Annotated[tuple[str, ...], Parameter(group=Group("Model"))],
    loading: Annotated[Loading | None, Parameter(name="*", group=Group("Model"))] = None,
    dataset: Annotated[tuple[str, ...], Parameter(group=Group("Data"))],
    columns: Annotated[Columns | None, Parameter(name="*", group=Group("Data"))] = None,
    search: Annotated[Search | None, Parameter(name="*", group=Group("Candidates"))] = None,
    sample: Annotated[KernelSample | None, Parameter(name="*", group=Group("Sample"))] = None,
    recipes: Annotated[Recipes | None, Parameter(name="*", group=Group("Training"))] = None,
    memory: Annotated[str | None, Parameter(group="Run")] = RankSettings.memory,
    trials: Annotated[Trials | None, Parameter(name="*", group=Group("Trials"))] = None,
    calibration: Annotated[Path | None, Parameter(group="Run")] = None,
    choose: Annotated[int | None, Parameter(group="Run")] = None,
    output: Annotated[Path | None, Parameter(group="Run")] = None,
    config: Annotated[Path | None, Parameter(group="Run")] = None,
    json: Annotated[bool, Parameter(group="Run")] = False,
) -> None:
    """Rank LoRA placements, ranks and recipes by forecast accuracy, from one pass over a few labelled samples.

    Example: foretune rank --model ./MiniLM --dataset ./sst2 --ranks 4 8 --learning-rate 1e-3 3e-3 --output ranking

    Then: foretune tune --config ranking/chosen.yaml --output tuned

    Adapters of a language model (--task causal-lm, seq2seq) are ranked by the forecast loss, or by the simulated one.

    Args:
        model: Folders or hub ids of the pretrained models.
        loading: Where they run and how precise.
        dataset: Folders or files (csv, tsv, jsonl, json, parquet, save_to_disk), or hub ids.
        columns: What of them.
        search: Adapters to choose from.
        sample: What is known of the data.
        recipes: The runs that are forecast.
        memory: Memory that what the pass over the samples keeps may take, such as 4GB; by default half of what is free,
            of a language model 2GB. What does not fit of a classifier goes through files.
        trials: What may be trained before, and where; one share for all finalists of a model and a data set together.
        calibration: The calibration.json of a study's report, from finished runs of your own; without it foretune's.
        choose: Row of the table whose adapter_config.json and chosen.yaml are written; without it the recommended one.
        output: New folder for ranking.csv, .md, .tex, candidates.csv, heatmap.png, adapter_config.json and chosen.yaml.
        config: YAML file with any of these flags by name; the command line wins.
        json: Print result.json to stdout instead of the table.
    """
    from foretune.ranking.report import RankRun

    models = tuple(ModelConfig(name, **vars(loading or Loading())) for name in model)
    data = tuple(DataConfig(name, **vars(columns or Columns())) for name in dataset)
    groups = (search or Search(), sample or KernelSample(), recipes or Recipes(), trials or Trials())
    settings = RankSettings(**{name: value for group in groups for name, value in vars(group).items()}, memory=memory)
    rank_command(RankRun(models, data, settings), output, calibration, choose=choose, as_json=json)


def rank_command(
    run: "RankRun",
    output: Path | None,
    calibration: Path | None = None,
    *,
    choose: int | None = None,
    as_json: bool = False,
) -> None:
    """Rank, save and print.

    Args:
        run: All settings.
        output: Folder of the run, or None to save nothing.
        calibration: Calibration of the forecasts, or None for the one that comes with foretune.
        choose: Row whose configuration is written; None for the recommended one.
        as_json: Whether to print JSON instead of the table.

    Raises:
        ConfigError: If the chosen row does not exist.
    """
    from foretune.engines import choose_engine

    settings = run.settings
    adapters = settings.finalists + METHOD_ROWS * sum(method != "lora" for method in settings.methods)
    most = adapters * len(settings.each()) * len(run.models) * len(run.data)
    if choose is not None and not 1 <= choose <= most:
        raise ConfigError(f"choose = {choose}: rows count from 1, and the table has {most} at most")
    wanted = _Wanted(output, calibration, choose, as_json)
    choose_engine(settings.engine, settings.workers)
    flags = {**run.flags(), "calibration": calibration, "choose": choose}
    with in_processes("rank", flags, output) as processes:
        one_process(processes, run.settings.spend)
        splits = open_data(run.data[0])
        if is_language(run.models[0], run.data[0], splits):
            _rank_language(run, splits, wanted, processes)
        else:
            _rank(run, splits, wanted, processes)


@dataclass(frozen=True)
class _Wanted:
    """What becomes of a ranking, whatever is ranked."""

    output: Path | None
    calibration: Path | None
    choose: int | None
    as_json: bool

    def where(self, place: int, words: str) -> str:
        """Say where the chosen row's configuration lies."""
        if self.output is None:
            return ""
        return f"; row {place}, {words}, in {self.output / ADAPTER_FILE} and {CHOSEN}"

    def check(self, found: object, n_rows: int) -> None:
        """Refuse a row that the table does not have, once everything is saved and printed."""
        if found is not None:
            return
        kept = (
            "nothing was saved" if self.output is None else f"all but {ADAPTER_FILE} is saved to {str(self.output)!r}"
        )
        raise ConfigError(f"choose = {self.choose}: the table has {n_rows} rows; {kept}")


def _rank(run: "RankRun", splits: "Splits", wanted: _Wanted, processes: "Processes") -> None:
    """Rank, save to a free folder that no other run writes to, and print; the splits are the first data set's."""
    from foretune.report.store import finite, to_json
    from foretune.report.terminal import console, print_json, progress

    log = console(stderr=True)
    with log.status("loading"):
        from foretune.forecasting.calibration_file import read_calibration
        from foretune.ranking.rank import load_one, rank_loaded
        from foretune.ranking.recommend import chosen, in_words
        from foretune.ranking.report import Wanted, ranking_content, save_rankings
        from foretune.trials.ranking import check_spend

        calibrated = read_calibration(wanted.calibration)
    rankings = []
    for model in run.models:
        for data in run.data:
            named = f"{Path(model.model).name} on {Path(data.dataset).name}"
            with processes.until_handed_over(), progress(log, named, None) as update:
                update(completed=0, total=1, note="loading")
                with classifiers_only(_ALONE, model, data):
                    loaded = load_one(model, data, run.settings, splits if data is run.data[0] else None)
                check_spend(loaded.classifier, loaded.task, run.settings)

                def show(what: str, done: int, total: int, update=update) -> None:  # type: ignore[no-untyped-def]
                    update(completed=done, total=total, note=what)

                ranking = rank_loaded(loaded, run.settings, calibrated, processes=processes, on_progress=show)
            if processes.is_main:
                rankings.append(_try(ranking, loaded, run, calibrated, log))
    if not processes.is_main:
        return
    for ranking in rankings:
        seconds = ", ".join(f"{name} {value:.1f} s" for name, value in ranking.seconds.items())
        log.print(
            f"{Path(ranking.model).name} on {Path(ranking.dataset).name}: {len(ranking.quick):,} candidates over "
            f"{len(ranking.sites)} modules from {ranking.samples} samples; forecast of "
            f"{'up to ' if len(ranking.recipes) > 1 else ''}{ranking.steps} steps on {ranking.train_rows:,} rows"
            f"{f', {len(ranking.recipes)} recipes' if len(ranking.recipes) > 1 else ''}; {seconds}",
        )
    found = chosen(rankings, wanted.choose)
    if wanted.output is not None:
        kept = Wanted(wanted.choose, own_calibration=wanted.calibration is not None)
        save_rankings(rankings, run, calibrated, wanted.output, kept)
    more = "" if found is None else wanted.where(found[0], in_words(found[2], len(found[1].recipes)))
    say_where(log, wanted.output, more)
    if wanted.as_json:
        print_json(to_json(finite(ranking_content(rankings, run, calibrated, choose=wanted.choose))))
    else:
        _print(rankings)
    wanted.check(found, sum(len(ranking.rows) for ranking in rankings))


def _rank_language(run: "RankRun", splits: "Splits", wanted: _Wanted, processes: "Processes") -> None:
    """The same of a language model."""
    from foretune.report.store import to_json
    from foretune.report.terminal import console, print_json, progress

    settings = run.settings
    if wanted.calibration is not None:
        raise ConfigError(
            f"--calibration {str(wanted.calibration)!r}: language models are ranked by the one that comes with "
            "foretune, leave it out"
        )
    if len(run.models) * len(run.data) > 1:
        raise ConfigError(_ALONE)
    log = console(stderr=True)
    start = time.perf_counter()
    with log.status("loading"):
        from foretune.forecasting.report import print_sequence_plan
        from foretune.ranking.sequence_report import save_sequence_ranking, sequence_content
        from foretune.ranking.sequence_rows import in_words
        from foretune.ranking.sequence_table import sequence_table
        from foretune.ranking.sequences import n_ranked, prepare_ranking, rank_sequences
        from foretune.sequence_plan import describe_sequences
        from foretune.settings.spend import parse_spend
        from foretune.trials.sequence_ranking import check_sequence_spend, try_sequences

        trains = parse_spend(settings.spend) > 0  # trials need the model as it is
        language, task = load_language_alone(run.models[0], run.data[0], splits)
        ready = prepare_ranking(language, task, settings, inplace=not trains)
        check_sequence_spend(ready, settings)
        ready = replace(ready, plan=replace(ready.plan, processes=processes))
    seconds_load = time.perf_counter() - start
    words = f"{len(ready.candidates):,} candidates of ranks up to {ready.template.r}, all of them together"
    print_sequence_plan(log, describe_sequences(ready.plan), words)
    n_sequences = n_ranked(ready, settings)
    with processes.until_handed_over(), progress(log, "sequences through the model", n_sequences) as update:
        ranking = rank_sequences(ready, settings, lambda n: update(advance=n))
    if not processes.is_main:
        return
    if trains:
        with _telling(log) as telling:
            ranking = try_sequences(ranking, ready, settings, telling=telling)
    ranking = replace(ranking, seconds={**ranking.seconds, "load": seconds_load})
    log.print(", ".join(f"{name} {value:.1f} s" for name, value in ranking.seconds.items()))
    found = ranking.chosen(wanted.choose)
    if wanted.output is not None:
        save_sequence_ranking(ranking, run, wanted.output, choose=wanted.choose)
    more = "" if found is None else wanted.where(found[0], in_words(ranking, found[1]))
    say_where(log, wanted.output, more)
    if wanted.as_json:
        print_json(to_json(sequence_content(ranking, run, choose=wanted.choose)))
    else:
        screen = console()
        sequence_table(ranking).show(screen)
        screen.print(
            f"without training: {ranking.base.loss:.3f} nats a token, perplexity {ranking.base.perplexity:.2f}"
        )
        if ranking.spent is not None:
            screen.print(f"trials: {ranking.spent.note}")
        for note in ranking.notes:
            screen.print(f"• {note}", style="yellow")
    wanted.check(found, len(ranking.rows))


def _try(ranking: "Ranking", loaded: "Loaded", run: "RankRun", calibration: "Calibration", log: "Console") -> "Ranking":
    """Show what the spend buys, and make it."""
    from foretune.settings.spend import parse_spend
    from foretune.trials.ranking import try_finalists

    if not parse_spend(run.settings.spend):
        return ranking
    with _telling(log) as telling:
        return try_finalists(ranking, loaded.classifier, loaded.task, run.settings, calibration, telling=telling)


@contextmanager
def _telling(log: "Console") -> "Iterator[Telling]":
    """Show plans, progress and notes of trials."""
    from foretune.report.terminal import progress
    from foretune.trials.stages import Telling

    with progress(log, "sample passes of the trials", None) as update:
        yield Telling(
            on_plan=lambda table: table.show(log),
            on_progress=lambda done, total: update(completed=round(done), total=round(total)),
            on_note=lambda note: log.print(note, style="yellow"),
        )


def _print(rankings: "Sequence[Ranking]") -> None:
    from foretune.ranking.table import ranking_table, written
    from foretune.report.terminal import console

    screen = console()
    ranking_table(rankings).show(screen)
    for ranking in rankings:
        levels = ranking.head_alone.levels
        where = f"{Path(ranking.model).name} on {Path(ranking.dataset).name}: " if len(rankings) > 1 else ""
        metric, constant = ranking.objective.metric, ranking.constant
        alone = "withheld" if levels is None else written(metric, levels[metric.name])
        text = f"{where}{metric.label}{' %' if metric.percent else ''} of the head without adapter: {alone}"
        if len(ranking.recipes) > 1:
            best = ranking.head_recipe
            text += f" (its best recipe: learning rate {best.learning_rate:g}, epochs {best.epochs})"
        if constant is not None:
            what = "the majority class" if ranking.objective.noun == "classes" else "one answer for all"
            text += f"; of {what}: " + (f"{100 * constant:.1f}" if metric.percent else f"{constant:.3f}")
        screen.print(text)
        if ranking.spent is not None:
            screen.print(f"{where}trials: {ranking.spent.note}")
    for note in dict.fromkeys(note for ranking in rankings for note in ranking.notes):
        screen.print(f"• {note}", style="yellow")
