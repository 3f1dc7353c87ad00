"""Files of a ranking."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from peft import PeftConfig

from foretune.forecasting.calibration import CALIBRATION, Calibration
from foretune.models.adapter_file import save_adapter as save_config
from foretune.ranking.adapter import candidate_config, write_config
from foretune.ranking.figure import heat_map
from foretune.ranking.finalists import Quick
from foretune.ranking.recommend import chosen
from foretune.ranking.rows import Ranking, Row
from foretune.ranking.table import numbers_table, quick_table, ranking_table
from foretune.report.provenance import versions
from foretune.report.store import Writer, finite, plain_text, write_json, write_run
from foretune.settings.commands import (
    ADAPTER_FILE,
    CHOSEN,
    Budget,
    Configuration,
    ForecastSettings,
    KernelSample,
    RankSettings,
    Search,
    Trials,
    fields_of,
)
from foretune.settings.groups import Columns, DataConfig, Loading, ModelConfig, Recipe, Recipes, Sample

SCHEMA = 1


@dataclass(frozen=True)
class RankRun:
    """One run of `foretune rank`.

    Attributes:
        models: Models.
        data: Data sets.
        settings: How the adapters of each model on each data set are ranked.
    """

    models: tuple[ModelConfig, ...]
    data: tuple[DataConfig, ...]
    settings: RankSettings

    def to_dict(self) -> dict[str, Any]:
        """Lay out as in `result.json`.

        Returns:
            Settings by name, in groups.
        """
        return {
            "models": {"model": [one.model for one in self.models], **fields_of(self.models[0], Loading)},
            "data": {"dataset": [one.dataset for one in self.data], **fields_of(self.data[0], Columns)},
            "candidates": fields_of(self.settings, Search),
            "sample": fields_of(self.settings, KernelSample) | fields_of(self.settings, Budget),
            "training": fields_of(self.settings, Recipes),
            "trials": fields_of(self.settings, Trials),
        }

    def flags(self) -> dict[str, Any]:
        """Flatten to the flags' names, as in `config.yaml`.

        Returns:
            Settings by name; lists for tuples.
        """
        joined = {name: value for group in self.to_dict().values() for name, value in group.items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in joined.items()}


@dataclass(frozen=True)
class Wanted:
    """What a ranking's folder holds beside the ranking.

    Attributes:
        choose: Row of the table, from 1, whose `adapter_config.json` and `chosen.yaml` are written; None for the
            recommended one.
        own_calibration: Whether the calibration was given, so that a replay needs it.
    """

    choose: int | None = None
    own_calibration: bool = False


def ranking_content(
    rankings: Sequence[Ranking], run: RankRun, calibration: Calibration, *, choose: int | None = None
) -> dict[str, Any]:
    """Lay rankings out as in `result.json`.

    Args:
        rankings: Rankings.
        run: All settings.
        calibration: What the forecasts were calibrated with.
        choose: Row of the table, from 1, that was chosen; None for the recommended one.

    Returns:
        JSON-ready values.
    """
    return {
        "schema": SCHEMA,
        "rankings": [_content(ranking) for ranking in rankings],
        "chosen": _chosen(rankings, choose),
        "calibration": {"source": calibration.source, "outputs": list(calibration.outputs)},
        "settings": run.to_dict(),
        "versions": versions(),
    }


def _chosen(rankings: Sequence[Ranking], choose: int | None) -> dict[str, Any] | None:
    found = chosen(rankings, choose)
    if found is None:
        return None
    place, ranking, row = found
    where = {"place": place, "model": ranking.model, "dataset": ranking.dataset}
    return {**where, "adapter": row.quick.name, "recipe": vars(row.recipe)}


def _content(ranking: Ranking) -> dict[str, Any]:
    return {
        "model": ranking.model,
        "dataset": ranking.dataset,
        "samples": ranking.samples,
        "train_rows": ranking.train_rows,
        "objective": ranking.objective.to_dict(),
        ranking.objective.noun: ranking.objective.n_outputs,
        "steps": ranking.steps,
        f"{ranking.objective.constant_name}_{ranking.objective.metric.name}": ranking.constant,
        "candidates": len(ranking.quick),
        "head_alone": ranking.head_alone.to_dict()["levels"],
        **({} if len(ranking.recipes) == 1 else {"head_recipe": vars(ranking.head_recipe)}),
        **({} if ranking.equal_size is None else {"equal_size": ranking.equal_size}),
        "spend": 0.0 if ranking.spent is None else ranking.spent.share,
        "trial_passes": 0.0 if ranking.spent is None else ranking.spent.passes,
        "rows": [_row(ranking, row) for row in ranking.rows],
        "notes": list(ranking.notes),
        "seconds": dict(ranking.seconds),
    }


def _row(ranking: Ranking, row: Row) -> dict[str, Any]:
    said = row.said.to_dict()
    return {
        "adapter": row.quick.name,
        "method": row.quick.method,
        "modules": list(row.quick.modules)
        if row.quick.config is not None
        else [ranking.sites[position].name for position in row.quick.candidate.sites],
        "rank": row.quick.rank,
        **({} if len(ranking.recipes) == 1 else {"recipe": vars(row.recipe), "steps": row.steps}),
        "forecast": said["levels"],
        "reach": said["reach"],
        "simulated": None
        if row.forecast is None or row.simulated is None
        else row.simulated.end.to_dict(row.simulated.metric),  # no level either
        "best_epoch": row.best_epoch,
        "update_rate": row.update_rate,
        "parameters": row.quick.parameters,
        "megabytes": row.megabytes,
        "step_cost": row.compute,
        "condition_number": row.condition_number,
        "quick_score": row.quick.score,
        "tie": row.tie,
        "recommended": row.recommended,
        "trials": [dict(trial) for trial in row.trials],
        "collapsed": row.collapsed,
        "collapse_probability": row.risk,
    }


def save_rankings(
    rankings: Sequence[Ranking], run: RankRun, calibration: Calibration, folder: Path, wanted: Wanted
) -> None:
    """Write a run folder, whole or not at all: tables, figures, numbers and the chosen row's configuration.

    Args:
        rankings: Rankings.
        run: All settings.
        calibration: What the forecasts were calibrated with.
        folder: New or empty folder.
        wanted: What else was asked for. Where the table has no such row, neither `adapter_config.json`
            nor `chosen.yaml` is written.
    """
    table = ranking_table(rankings)
    content = finite(ranking_content(rankings, run, calibration, choose=wanted.choose))
    given = {**run.flags(), "choose": wanted.choose}
    writers: dict[str, Writer] = {
        "ranking.csv": numbers_table(rankings).write_csv,
        "ranking.md": lambda path: plain_text(path, table.markdown()),
        "ranking.tex": lambda path: plain_text(path, table.latex()),
        "candidates.csv": quick_table(rankings).write_csv,
        "result.json": lambda path: write_json(path, content),
    }
    for index, ranking in enumerate(rankings):
        name = "heatmap.png" if len(rankings) == 1 else f"heatmap-{index + 1}.png"
        writers[name] = partial(heat_map, ranking)
    if wanted.own_calibration:
        given["calibration"] = CALIBRATION  # beside config.yaml, wherever that lies
        writers[CALIBRATION] = lambda path: write_json(path, calibration.to_dict())
    writers["config.yaml"] = flags_file("Replay: foretune rank --config config.yaml --output NEW_FOLDER", given)
    found = chosen(rankings, wanted.choose)
    if found is not None:
        place, ranking, row = found
        adapter = adapter_of(ranking, row.quick)
        writers[ADAPTER_FILE] = lambda path: save_config(adapter, path)
        run_it = f"The run of row {place}: foretune tune --config {CHOSEN} --output NEW_FOLDER"
        writers[CHOSEN] = flags_file(run_it, configuration_of(ranking, row, run).to_dict())
    write_run(folder, writers)


def flags_file(comment: str, given: Mapping[str, Any]) -> Writer:
    """Lay out settings as a file that `--config` reads.

    Args:
        comment: What it is for.
        given: Settings by the flags' names.

    Returns:
        The file's writer.
    """
    header = f"# foretune {versions()['foretune']}. {comment}\n"
    text = header + yaml.safe_dump(dict(given), sort_keys=False, allow_unicode=True)
    return lambda path: plain_text(path, text)


def configuration_of(ranking: Ranking, row: Row, run: RankRun) -> Configuration[ForecastSettings]:
    """Say which run a row is, as `foretune tune` and `foretune forecast` take it.

    Args:
        ranking: Its ranking.
        row: Row.
        run: All settings.

    Returns:
        Model, data, what is known of them and the row's recipe, with the adapter in a file beside them.
    """
    model, data = replace(run.models[0], model=ranking.model), replace(run.data[0], dataset=ranking.dataset)
    return configuration_with(row.recipe, replace(run, models=(model,), data=(data,)))


def configuration_with(recipe: Recipe, run: RankRun) -> Configuration[ForecastSettings]:
    """Say which run a recipe is, with the adapter in a file beside it.

    Args:
        recipe: Recipe.
        run: All settings, with one model and one data set.

    Returns:
        Model, data, what is known of them and the recipe.
    """
    settings = ForecastSettings(**fields_of(run.settings, Sample), **fields_of(run.settings, Budget), **vars(recipe))
    return Configuration(run.models[0], run.data[0], Path(ADAPTER_FILE), settings)


def adapter_of(ranking: Ranking, entry: Quick) -> PeftConfig:
    """Make peft's configuration of a candidate.

    Args:
        ranking: Its ranking.
        entry: Candidate.

    Returns:
        The configuration.
    """
    if entry.config is not None:
        return entry.config
    return candidate_config(entry.candidate, ranking.sites, ranking.template, ranking.modules)


def save_adapter(ranking: Ranking, entry: Quick, folder: Path | str) -> Path:
    """Write the `adapter_config.json` of a candidate.

    Args:
        ranking: Its ranking.
        entry: Candidate.
        folder: Folder, made unless it is there.

    Returns:
        The file.
    """
    return write_config(adapter_of(ranking, entry), Path(folder))
