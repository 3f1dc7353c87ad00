"""Tables of a ranking, for people and for programs."""

from collections.abc import Sequence
from pathlib import Path

from foretune.forecasting.calibration import Interval
from foretune.forecasting.cautions import TOLD
from foretune.ranking.equal_size import NEAR
from foretune.ranking.finalists import Quick
from foretune.ranking.rows import Ranking, Row, best_first
from foretune.report.tables import Table
from foretune.tasks.metrics import Metric


def ranking_table(rankings: Sequence[Ranking]) -> Table:
    """Lay the finalists out.

    Args:
        rankings: Rankings of one or several models and data sets.

    Returns:
        The table; `=` marks rows that tie with the first of their model and data set, `*` the recommended one.
        Learning rate and epochs are there where there are several, the best epoch where it is not the last of all,
        trials where something was spent.
    """
    several = len(rankings) > 1
    recipes = _several_recipes(rankings)
    late = any(row.ends_late for ranking in rankings for row in ranking.rows)
    tried, risky = _tried(rankings), _risky(rankings)
    rows = []
    for place, (ranking, row) in enumerate(best_first(rankings), start=1):
        where = (Path(ranking.model).name, Path(ranking.dataset).name) if several else ()
        rows.append(
            (
                f"{place}{' =' if row.tie else ''}{' *' if row.recommended else ''}",
                *where,
                row.quick.name,
                *_recipe(row, shown=recipes),
                *_levels(row),
                *((str(row.best_epoch) if row.ends_late else "",) if late else ()),
                *((_trial(row),) if tried else ()),
                *(("" if row.risk is None else f"{row.risk:.0%}",) if risky else ()),
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
    header = (
        *("#", *names, "adapter", *(("learning rate", "epochs") if recipes else ())),
        *(of_metric, "eval loss", "train loss", *(("best epoch",) if late else ()), *(("trials",) if tried else ())),
        *(("collapse",) if risky else ()),
        *("parameters", "MB", "step", "κ", "quick"),
    )
    return Table(_caption(rankings), header, tuple(rows), right_from=len(names) + 2)


def _several_recipes(rankings: Sequence[Ranking]) -> bool:
    return any(len(ranking.recipes) > 1 for ranking in rankings)


def _recipe(row: Row, *, shown: bool) -> tuple[str, ...]:
    return (f"{row.recipe.learning_rate:g}", str(row.recipe.epochs)) if shown else ()


def _tried(rankings: Sequence[Ranking]) -> bool:
    return any(ranking.spent is not None for ranking in rankings)


def _risky(rankings: Sequence[Ranking]) -> bool:
    """Whether some row is told to collapse."""
    return any((row.risk or 0.0) >= TOLD for ranking in rankings for row in ranking.rows)


def _trial(row: Row) -> str:
    """Rows of the largest trial and what it showed, and what collapsed."""
    if not row.trials:
        return ""
    last = row.trials[-1]
    of_largest = row.said.metric.written(last["outcomes"][row.said.metric.name])
    words = f"{last['rows']:,}: {of_largest}"
    if row.collapsed is None:
        return words
    return f"{words}, collapsed" if row.collapsed == last["rows"] else f"{words}, {row.collapsed:,}: collapsed"


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
        f"{_promise(rankings)} '=': cannot be told from the first of its model and data set; '*': recommended, the "
        f"cheapest of these. {_of_columns(rankings)}step: cost of a training step, all layers = 100%. κ and quick "
        "score: on the samples, "
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


def _of_columns(rankings: Sequence[Ranking]) -> str:
    words = []
    if any(row.ends_late for ranking in rankings for row in ranking.rows):
        words.append("best epoch: of the simulated run, where it is not the last. ")
    if _tried(rankings):
        words.append("trials: rows of the largest real fine-tune, and the main metric that it showed. ")
    if _risky(rankings):
        words.append("collapse: how likely a run at that rate does, which the order allows for. ")
    size = next((ranking.equal_size for ranking in rankings if ranking.equal_size is not None), None)
    if size is not None:
        words.append(f"Sizes are equal within {NEAR:.0%}: {size:,} parameters. ")
    return "".join(words)


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
    recipes = _several_recipes(rankings)
    header = ["place", "model", "dataset", "adapter", "rank", *(("learning_rate", "epochs") if recipes else ())]
    header += [f"{name}{end}" for name in outcomes for end in ("", "_low", "_high")]
    header += ["parameters", "megabytes", "step_cost", "condition_number", "quick_score", "tie", "widening"]
    tried = _tried(rankings)
    header += ["best_epoch", "recommended", *(("trial_rows", "trial_metric", "collapsed") if tried else ())]
    header.append("collapse_probability")
    rows = []
    for place, (ranking, row) in enumerate(best_first(rankings), start=1):
        forecast = row.forecast
        intervals = [None if forecast is None else forecast.get(name) for name in outcomes]
        values = [value for one in intervals for value in ((None,) * 3 if one is None else vars(one).values())]
        cells = [str(place), ranking.model, ranking.dataset, row.quick.name, _rank(row.quick)]
        cells += _recipe(row, shown=recipes)
        cells += ["" if value is None else f"{value:.6g}" for value in values]
        cells += [str(row.quick.parameters), f"{row.megabytes:.6g}", f"{row.compute:.4g}"]
        cells += [f"{row.condition_number:.6g}", f"{row.quick.score:.6g}", "yes" if row.tie else "no"]
        cells.append("" if forecast is None else f"{row.said.reach.widening:.4g}")
        cells += [str(row.best_epoch), "yes" if row.recommended else "no", *(_trial_cells(row) if tried else ())]
        cells.append("" if row.risk is None else f"{row.risk:.4g}")
        rows.append(tuple(cells))
    return Table("Finalists.", tuple(header), tuple(rows), right_from=4)


def _rank(entry: Quick) -> str:
    return "" if entry.rank is None else str(entry.rank)


def _trial_cells(row: Row) -> tuple[str, str, str]:
    if not row.trials:
        return "", "", ""
    last = row.trials[-1]
    value = f"{last['outcomes'][row.said.metric.name]:.6g}"
    return str(last["rows"]), value, "" if row.collapsed is None else f"on {row.collapsed} rows"


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
            _rank(entry),
            str(entry.parameters),
            f"{entry.score:.6g}",
        )
        for ranking in rankings
        for entry in ranking.quick
    ]
    header = ("model", "dataset", "adapter", "rank", "parameters", "quick_score")
    return Table("Every candidate.", header, tuple(rows), right_from=3)
