"""Tables and files of a ranking."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig

from foretune.forecasting.calibration import CALIBRATION, Calibration, Interval
from foretune.models.adapter_file import save_adapter as save_config
from foretune.ranking.adapter import candidate_config, write_adapter_config
from foretune.ranking.figure import heat_map
from foretune.ranking.finalists import Quick
from foretune.ranking.rank import Ranking, Row
from foretune.report.provenance import versions
from foretune.report.store import finite, plain_text, write_json, write_run
from foretune.report.tables import Table
from foretune.settings.commands import ADAPTER_FILE, KernelSample, RankSettings, Search, fields_of
from foretune.settings.groups import Columns, DataConfig, Loading, ModelConfig, Recipe
from foretune.tasks.metrics import Metric

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
            "sample": fields_of(self.settings, KernelSample),
            "training": fields_of(self.settings, Recipe),
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
        choose: Row of the table, from 1, whose `adapter_config.json` is written.
        own_calibration: Whether the calibration was given, so that a replay needs it.
    """

    choose: int = 1
    own_calibration: bool = False


def best_first(rankings: Sequence[Ranking]) -> list[tuple[Ranking, Row]]:
    """Put the rows of several rankings into one order: data sets apart, models of one data set together.

    Args:
        rankings: Rankings.

    Returns:
        Rows with their ranking, by data set, then by forecast metric.
    """
    datasets = list(dict.fromkeys(ranking.dataset for ranking in rankings))
    rows = [(ranking, row) for ranking in rankings for row in ranking.rows]
    return sorted(
        rows,
        key=lambda pair: (
            datasets.index(pair[0].dataset),
            *pair[1].said.key,
        ),
    )


def ranking_table(rankings: Sequence[Ranking]) -> Table:
    """Lay the finalists out.

    Args:
        rankings: Rankings of one or several models and data sets.

    Returns:
        The table; `=` marks rows that tie with the first of their model and data set.
    """
    several = len(rankings) > 1
    rows = []
    for place, (ranking, row) in enumerate(best_first(rankings), start=1):
        where = (Path(ranking.model).name, Path(ranking.dataset).name) if several else ()
        rows.append(
            (
                f"{place}{' =' if row.tie else ''}",
                *where,
                row.quick.name,
                *_levels(row),
                f"{row.quick.parameters:,}",
                f"{row.megabytes:.2f}",
                f"{row.compute:.0%}",
                f"{row.condition_number:.4g}",
                f"{row.quick.score:.3f}",
            )
        )
    names = ("model", "data set") if several else ()
    metrics = {ranking.objective.metric for ranking in rankings}
    of_metric = _header(metrics.pop()) if len(metrics) == 1 else "main metric"
    header = ("#", *names, "adapter", of_metric, "eval loss", "train loss", "parameters", "MB", "step", "κ", "quick")
    return Table(_caption(rankings), header, tuple(rows), right_from=len(names) + 2)


def _header(metric: Metric) -> str:
    return f"{metric.label} %" if metric.percent else metric.label


def _promise(rankings: Sequence[Ranking]) -> str:
    withheld = [row.forecast is None for ranking in rankings for row in ranking.rows]
    if not any(row.said.calibrated for ranking in rankings for row in ranking.rows):
        return "Order by the simulated run, not calibrated: no level is forecast of this kind of task."
    if all(withheld):
        return "Order by the simulated run; no level is forecast outside of what the calibration has seen."
    return "Forecast at the end of training, with 90% intervals" + (", where it is given." if any(withheld) else ".")


def _caption(rankings: Sequence[Ranking]) -> str:
    text = (
        f"{_promise(rankings)} '=': cannot be told from the first of its model and data "
        "set. step: cost of a training step, all layers = 100%. κ and quick score: on the samples, "
    )
    if len(rankings) == 1:
        return f"{text}not comparable with other models or data sets."
    if any(row.forecast is None for ranking in rankings for row in ranking.rows):
        across = "Where levels are withheld, the order across models is that of the simulated runs, unchecked"
    else:
        labels = " or ".join(dict.fromkeys(ranking.objective.metric.label for ranking in rankings))
        across = f"Forecast {labels} and losses are comparable across models on one data set"
    return (
        f"{text}comparable within one model and data set only. {across}; across data sets they have other classes and "
        "base rates."
    )


def _levels(row: Row) -> tuple[str, ...]:
    if row.forecast is None:
        return ("withheld",) * 3
    of_training = row.forecast.get("train_loss")
    losses = _three(row.forecast["eval_loss"]), "withheld" if of_training is None else _three(of_training)
    metric = row.said.metric
    return written(metric, row.forecast[metric.name]), *losses


def written(metric: Metric, value: Interval) -> str:
    """Write a metric with its interval, shares in percent.

    Args:
        metric: Metric.
        value: Its value.

    Returns:
        `85.2 [77.7, 90.5]`.
    """
    if metric.percent:
        return f"{100 * value.value:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"
    return _three(value)


def _three(value: Interval) -> str:
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"


def numbers_table(rankings: Sequence[Ranking]) -> Table:
    """Lay the finalists out for programs: one number in a column.

    Args:
        rankings: Rankings.

    Returns:
        The table.
    """
    metrics = dict.fromkeys(ranking.objective.metric.name for ranking in rankings)
    outcomes = (*metrics, "eval_loss", "train_loss")
    header = ["place", "model", "dataset", "adapter", "rank"]
    header += [f"{name}{end}" for name in outcomes for end in ("", "_low", "_high")]
    header += ["parameters", "megabytes", "step_cost", "condition_number", "quick_score", "tie", "widening"]
    rows = []
    for place, (ranking, row) in enumerate(best_first(rankings), start=1):
        forecast = row.forecast
        intervals = [None if forecast is None else forecast.get(name) for name in outcomes]
        values = [value for one in intervals for value in ((None,) * 3 if one is None else vars(one).values())]
        cells = [str(place), ranking.model, ranking.dataset, row.quick.name, str(row.quick.candidate.rank)]
        cells += ["" if value is None else f"{value:.6g}" for value in values]
        cells += [str(row.quick.parameters), f"{row.megabytes:.6g}", f"{row.compute:.4g}"]
        cells += [f"{row.condition_number:.6g}", f"{row.quick.score:.6g}", "yes" if row.tie else "no"]
        cells.append("" if forecast is None else f"{row.said.reach.widening:.4g}")
        rows.append(tuple(cells))
    return Table("Finalists.", tuple(header), tuple(rows), right_from=4)


def quick_table(rankings: Sequence[Ranking]) -> Table:
    """List all candidates with their quick score, for programs.

    Args:
        rankings: Rankings.

    Returns:
        The table.
    """
    rows = [
        (
            ranking.model,
            ranking.dataset,
            entry.name,
            str(entry.candidate.rank),
            str(entry.parameters),
            f"{entry.score:.6g}",
        )
        for ranking in rankings
        for entry in ranking.quick
    ]
    header = ("model", "dataset", "adapter", "rank", "parameters", "quick_score")
    return Table("Every candidate.", header, tuple(rows), right_from=3)


def ranking_content(rankings: Sequence[Ranking], run: RankRun, calibration: Calibration) -> dict[str, Any]:
    """Lay rankings out as in `result.json`.

    Args:
        rankings: Rankings.
        run: All settings.
        calibration: What the forecasts were calibrated with.

    Returns:
        JSON-ready values.
    """
    return {
        "schema": SCHEMA,
        "rankings": [_content(ranking) for ranking in rankings],
        "calibration": {"source": calibration.source, "outputs": list(calibration.outputs)},
        "settings": run.to_dict(),
        "versions": versions(),
    }


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
        "rows": [_row(ranking, row) for row in ranking.rows],
        "notes": list(ranking.notes),
        "seconds": dict(ranking.seconds),
    }


def _row(ranking: Ranking, row: Row) -> dict[str, Any]:
    said = row.said.to_dict()
    return {
        "adapter": row.quick.name,
        "modules": [ranking.sites[position].name for position in row.quick.candidate.sites],
        "rank": row.quick.candidate.rank,
        "forecast": said["levels"],
        "reach": said["reach"],
        "simulated": None
        if row.forecast is None
        else row.simulated.end.to_dict(row.simulated.metric),  # no level either
        "parameters": row.quick.parameters,
        "megabytes": row.megabytes,
        "step_cost": row.compute,
        "condition_number": row.condition_number,
        "quick_score": row.quick.score,
        "tie": row.tie,
    }


def save_rankings(
    rankings: Sequence[Ranking], run: RankRun, calibration: Calibration, folder: Path, wanted: Wanted
) -> None:
    """Write a run folder, whole or not at all: tables, figures, numbers and the chosen row's adapter configuration.

    Args:
        rankings: Rankings.
        run: All settings.
        calibration: What the forecasts were calibrated with.
        folder: New or empty folder.
        wanted: What else was asked for. Where the table has no such row, no `adapter_config.json` is written.
    """
    table = ranking_table(rankings)
    content = finite(ranking_content(rankings, run, calibration))
    given = {**run.flags(), "choose": wanted.choose}
    writers: dict[str, Callable[[Path], None]] = {
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
    header = f"# foretune {versions()['foretune']}. Replay: foretune rank --config config.yaml --output NEW_FOLDER\n"
    text = header + yaml.safe_dump(given, sort_keys=False, allow_unicode=True)
    writers["config.yaml"] = lambda path: plain_text(path, text)
    ordered = best_first(rankings)
    if wanted.choose <= len(ordered):
        ranking, row = ordered[wanted.choose - 1]
        adapter = adapter_of(ranking, row.quick)
        writers[ADAPTER_FILE] = lambda path: save_config(adapter, path)
    write_run(folder, writers)


def adapter_of(ranking: Ranking, entry: Quick) -> LoraConfig:
    """Make peft's configuration of a candidate.

    Args:
        ranking: Its ranking.
        entry: Candidate.

    Returns:
        The configuration.
    """
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
    return write_adapter_config(entry.candidate, ranking.sites, ranking.template, ranking.modules, Path(folder))
