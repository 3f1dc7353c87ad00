"""`foretune rank`."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from foretune.errors import ConfigError
from foretune.settings.groups import ADAPTER_FILE
from foretune.settings.ranking import Candidates, RankConfig, RankData, RankModels, RankSample
from foretune.settings.run import Training

if TYPE_CHECKING:
    from foretune.ranking.rank import Ranking


def rank(
    *,
    models: Annotated[RankModels, Parameter(name="*", group=Group("Model"))],
    data: Annotated[RankData, Parameter(name="*", group=Group("Data"))],
    candidates: Annotated[Candidates | None, Parameter(name="*", group=Group("Candidates"))] = None,
    sample: Annotated[RankSample | None, Parameter(name="*", group=Group("Sample"))] = None,
    training: Annotated[Training | None, Parameter(name="*", group=Group("Training"))] = None,
    calibration: Annotated[Path | None, Parameter(group="Run")] = None,
    choose: Annotated[int, Parameter(group="Run")] = 1,
    output: Annotated[Path | None, Parameter(group="Run")] = None,
    config: Annotated[Path | None, Parameter(group="Run")] = None,
    json: Annotated[bool, Parameter(group="Run")] = False,
) -> None:
    """Rank LoRA placements and ranks by forecast accuracy, from one pass over a few labelled samples.

    Example: foretune rank --model ./MiniLM --dataset ./sst2 --ranks 4 8 --budget 500k --output ranking

    Then: foretune tune --model ./MiniLM --dataset ./sst2 --adapter-config ranking

    Args:
        models: Models.
        data: Data sets.
        candidates: Adapters to choose from.
        sample: What is known of the data.
        training: The run that is forecast.
        calibration: The calibration.json of a study's report, from finished runs of your own; without it foretune's.
        choose: Row of the table whose adapter_config.json is written.
        output: New folder for ranking.csv, .md, .tex, candidates.csv, heatmap.png and adapter_config.json.
        config: YAML file with any of these flags by name; the command line wins.
        json: Print result.json to stdout instead of the table.
    """
    run_config = RankConfig(models, data, candidates or Candidates(), sample or RankSample(), training or Training())
    rank_command(run_config, output, calibration, choose=choose, as_json=json)


def rank_command(
    config: RankConfig, output: Path | None, calibration: Path | None = None, *, choose: int = 1, as_json: bool = False
) -> None:
    """Rank, save and print.

    Args:
        config: All settings.
        output: Folder of the run, or None to save nothing.
        calibration: Calibration of the forecasts, or None for the one that comes with foretune.
        choose: Row whose adapter configuration is written.
        as_json: Whether to print JSON instead of the table.

    Raises:
        ConfigError: If the chosen row does not exist.
    """
    from foretune.report.folders import hold
    from foretune.report.store import check_free

    most = config.candidates.finalists * len(config.models.model) * len(config.data.dataset)
    if not 1 <= choose <= most:
        raise ConfigError(f"choose = {choose}: rows count from 1, and the table has {most} at most")
    with ExitStack() as stack:
        if output is not None:
            stack.enter_context(hold(output))
            check_free(output)
        _rank(config, output, calibration, choose=choose, as_json=as_json)


def _rank(config: RankConfig, output: Path | None, calibration: Path | None, *, choose: int, as_json: bool) -> None:
    """Rank, save to a free folder that no other run writes to, and print."""
    from foretune.report.store import finite, to_json
    from foretune.report.terminal import console, print_json, progress

    log = console(stderr=True)
    with log.status("loading"):
        from foretune.forecasting.calibration import read_calibration
        from foretune.ranking.rank import rank_one
        from foretune.ranking.report import Wanted, ranking_content, save_rankings

        calibrated = read_calibration(calibration)
    rankings = []
    for model in config.models.model:
        for dataset in config.data.dataset:
            with progress(log, f"{Path(model).name} on {Path(dataset).name}", None) as update:

                def news(what: str, done: int, total: int, update=update) -> None:  # type: ignore[no-untyped-def]
                    update(completed=done, total=total, note=what)

                rankings.append(rank_one(config, model, dataset, calibrated, on_news=news))
    for ranking in rankings:
        seconds = ", ".join(f"{name} {value:.1f} s" for name, value in ranking.seconds.items())
        log.print(
            f"{Path(ranking.model).name} on {Path(ranking.dataset).name}: {len(ranking.quick):,} candidates over "
            f"{len(ranking.sites)} modules from {ranking.samples} samples; forecast of {ranking.steps} steps on "
            f"{ranking.train_rows:,} rows; {seconds}",
        )
    n_rows = sum(len(ranking.rows) for ranking in rankings)
    if output is not None:
        save_rankings(rankings, config, calibrated, output, Wanted(choose, own_calibration=calibration is not None))
        chosen = f"; adapter of row {choose} in {output / ADAPTER_FILE}" if choose <= n_rows else ""
        log.print(f"saved to {output}{chosen}")
    else:
        log.print("nothing saved: name a folder with --output", style="dim")
    if as_json:
        print_json(to_json(finite(ranking_content(rankings, config, calibrated))))
    else:
        _print(rankings)
    if choose > n_rows:
        kept = "nothing was saved" if output is None else f"all but {ADAPTER_FILE} is saved to {str(output)!r}"
        raise ConfigError(f"choose = {choose}: the table has {n_rows} rows; {kept}")


def _print(rankings: "Sequence[Ranking]") -> None:
    from foretune.ranking.report import ranking_table, written
    from foretune.report.terminal import console

    screen = console()
    ranking_table(rankings).show(screen)
    for ranking in rankings:
        levels = ranking.head_alone.levels
        where = f"{Path(ranking.model).name} on {Path(ranking.dataset).name}: " if len(rankings) > 1 else ""
        metric, constant = ranking.objective.metric, ranking.constant
        alone = "withheld" if levels is None else written(metric, levels[metric.name])
        text = f"{where}{metric.label}{' %' if metric.percent else ''} of the head without adapter: {alone}"
        if constant is not None:
            what = "the majority class" if ranking.objective.noun == "classes" else "one answer for all"
            text += f"; of {what}: " + (f"{100 * constant:.1f}" if metric.percent else f"{constant:.3f}")
        screen.print(text)
    for note in dict.fromkeys(note for ranking in rankings for note in ranking.notes):
        screen.print(f"• {note}", style="yellow")
