"""`foretune rank`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from foretune.errors import ConfigError
from foretune.forecasting.training import Training
from foretune.ranking.settings import Candidates, RankConfig, RankData, RankModels, RankSample


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
    from foretune.store import check_free, finite, make_folder, to_json
    from foretune.terminal import console, print_json, progress

    most = config.candidates.finalists * len(config.models.model) * len(config.data.dataset)
    if not 1 <= choose <= most:
        raise ConfigError(f"choose = {choose}: rows count from 1, and the table has {most} at most")
    if output is not None:
        check_free(output)
    log = console(stderr=True)
    with log.status("loading"):
        from foretune.forecasting.calibration import read_calibration
        from foretune.ranking.ranks import rank_one
        from foretune.ranking.report import ranking_content, ranking_table, save_rankings

        calibrated = read_calibration(calibration)
    rankings = []
    for model in config.models.model:
        for dataset in config.data.dataset:
            with progress(log, f"{Path(model).name} on {Path(dataset).name}", None) as update:

                def news(what: str, done: int, total: int, update=update) -> None:  # type: ignore[no-untyped-def]
                    update(completed=done, total=total, note=what)

                rankings.append(rank_one(config, model, dataset, calibrated, on_news=news))
    n_rows = sum(len(ranking.rows) for ranking in rankings)
    if choose > n_rows:
        raise ConfigError(f"choose = {choose}: the table has {n_rows} rows")
    for ranking in rankings:
        seconds = ", ".join(f"{name} {value:.1f} s" for name, value in ranking.seconds.items())
        log.print(
            f"{Path(ranking.model).name} on {Path(ranking.dataset).name}: {len(ranking.quick):,} candidates over "
            f"{len(ranking.sites)} modules from {ranking.samples} samples; forecast of {ranking.steps} steps on "
            f"{ranking.train_rows:,} rows; {seconds}",
        )
    if output is not None:
        make_folder(output)
        written = save_rankings(rankings, config, calibrated, output, choose=choose)
        log.print(f"saved to {output}; adapter of row {choose} in {written}")
    else:
        log.print("nothing saved: name a folder with --output", style="dim")
    if as_json:
        print_json(to_json(finite(ranking_content(rankings, config, calibrated))))
        return
    screen = console()
    ranking_table(rankings).show(screen)
    for ranking in rankings:
        alone = ranking.head_alone["accuracy"]
        where = f"{Path(ranking.model).name} on {Path(ranking.dataset).name}: " if len(rankings) > 1 else ""
        screen.print(
            f"{where}head without adapter: {alone.value:.1%} [{alone.low:.1%}, {alone.high:.1%}]; "
            f"majority class: {ranking.majority:.1%}",
        )
    for note in dict.fromkeys(note for ranking in rankings for note in ranking.notes):
        screen.print(f"• {note}", style="yellow")
