"""Tables of a ranking of a language model's adapters, for people and for programs."""

from math import isnan, nan

from foretune.forecasting.sequence_simulation import APART
from foretune.ranking.equal_size import NEAR
from foretune.ranking.finalists import Quick
from foretune.ranking.sequence_rows import TIE, SequenceRanking, SequenceRow
from foretune.report.tables import Table

MARK = "!"


def sequence_table(ranking: SequenceRanking) -> Table:
    """Lay the finalists out.

    Args:
        ranking: Ranking.

    Returns:
        The table; `=` marks rows that tie with the first, `*` the recommended one, `!` those whose linearised loss is
        another. Learning rate and epochs are there where there are several recipes, trials where something was spent.
    """
    recipes = len(ranking.recipes) > 1
    late = any(row.best_step < row.steps for row in ranking.rows)
    tried = ranking.spent is not None
    header = (
        *("#", "adapter", *(("learning rate", "epochs") if recipes else ())),
        *("eval loss", "perplexity", "token acc %", "linear loss", *(("best step",) if late else ())),
        *(("trial",) if tried else ()),
        *("parameters", "MB", "step"),
    )
    rows = []
    for place, row in enumerate(ranking.rows, start=1):
        loss, perplexity = _level(row, "eval_loss", row.loss, 3), _level(row, "perplexity", row.forecast.order[0], 2)
        rows.append(
            (
                f"{place}{' =' if row.tie else ''}{' *' if row.recommended else ''}",
                row.quick.name,
                *((f"{row.recipe.learning_rate:g}", str(row.recipe.epochs)) if recipes else ()),
                loss,
                perplexity,
                *_simulated(row),
                *((_best(row),) if late else ()),
                *((_trials(row),) if tried else ()),
                f"{row.quick.parameters:,}",
                f"{row.megabytes:.2f}",
                f"{row.compute:.0%}",
            )
        )
    return Table(_caption(ranking, late=late), header, tuple(rows), right_from=2)


def _simulated(row: SequenceRow) -> tuple[str, str]:
    """Token accuracy of the simulated run and the linearised loss, empty where there is none."""
    if row.found is None:
        return "", ""
    return f"{100 * row.found.token_accuracy[-1]:.1f}", f"{row.found.linear_loss:.3f}{f' {MARK}' if row.apart else ''}"


def _level(row: SequenceRow, name: str, value: float, digits: int) -> str:
    """A forecast with its interval, or what puts it into order."""
    if row.forecast.levels is None:
        return "" if row.found is None and isnan(value) else f"{value:.{digits}f}"
    level = row.forecast.levels[name]
    return f"{level.value:.{digits}f} [{level.low:.{digits}f}, {level.high:.{digits}f}]"


def _best(row: SequenceRow) -> str:
    return f"{row.best_step} of {row.steps}" if row.best_step < row.steps else ""


def _trials(row: SequenceRow) -> str:
    """Rows and loss of each trial."""
    said = [
        f"{trial['rows']:,}: {'diverged' if trial['diverged'] else format(trial['outcomes']['eval_loss'], '.3f')}"
        for trial in row.trials
    ]
    return ", ".join(said)


def _caption(ranking: SequenceRanking, *, late: bool) -> str:
    level = any(row.forecast.levels is not None for row in ranking.rows)
    words = [
        "Forecasts with 90 % intervals; without one it is the order alone. eval loss: nats a token at the end."
        if level
        else "Not calibrated for such runs: no level is forecast. eval loss: nats a token at the end, which the rows "
        "are in the order of, from the model with the simulated A and B plugged in.",
        f"'=': within {TIE:g} nats of the first; '*': recommended, the cheapest of these.",
    ]
    if ranking.spent is not None:
        words.append("trial: rows of each real fine-tune, and the eval loss that it ended at.")
    if ranking.compared is not None:
        words.append(f"Order: first those tried on {ranking.compared:,} rows, by that loss, which '=' is of there.")
    if any(row.found is None for row in ranking.rows):
        words.append("Without a simulated run: no forecast; eval loss is what trials tell, empty where there is none.")
    if any(row.apart for row in ranking.rows):
        words.append(f"'{MARK}': the linearised model ends more than {APART:g} nats away.")
    if late:
        words.append("best step: that of the least loss, where it is not the last.")
    words.append("step: cost of a training step, all layers = 100%.")
    if ranking.equal_size is not None:
        words.append(f"Sizes are equal within {NEAR:.0%}: {ranking.equal_size:,} parameters.")
    return " ".join(words)


def sequence_numbers(ranking: SequenceRanking) -> Table:
    """Lay the finalists out for programs: one number in a column.

    Args:
        ranking: Ranking.

    Returns:
        The table.
    """
    header = (
        *("place", "model", "dataset", "adapter", "rank", "learning_rate", "epochs", "steps"),
        *("eval_loss", "eval_perplexity", "eval_token_accuracy", "linear_eval_loss", "train_loss", "best_step"),
        *("parameters", "megabytes", "step_cost", "quick_score", "apart", "tie", "recommended"),
        *("eval_loss_low", "eval_loss_high", "simulated_eval_loss"),
        *(("trial_rows", "trial_eval_loss", "diverged") if ranking.spent is not None else ()),
    )
    rows = []
    for place, row in enumerate(ranking.rows, start=1):
        simulated, found = nan, row.found
        losses = [row.loss, row.forecast.order[0], nan, nan, nan]
        if found is not None:
            simulated = found.run.end.eval_loss
            losses[2:] = found.token_accuracy[-1], found.linear_loss, found.run.end.train_loss
        rows.append(
            (
                *(str(place), ranking.model, ranking.dataset, row.quick.name, _rank(row.quick)),
                *(f"{row.recipe.learning_rate:g}", str(row.recipe.epochs), str(row.steps)),
                *("" if found is None and isnan(value) else f"{value:.6g}" for value in losses),
                *(
                    "" if found is None else str(row.best_step),
                    str(row.quick.parameters),
                    f"{row.megabytes:.6g}",
                    f"{row.compute:.4g}",
                ),
                f"{row.quick.score:.6g}",
                *("yes" if yes else "no" for yes in (row.apart, row.tie, row.recommended)),
                *_ends(row),
                "" if found is None else f"{simulated:.6g}",
                *(_trial_cells(row) if ranking.spent is not None else ()),
            )
        )
    return Table("Finalists.", header, tuple(rows), right_from=4)


def _rank(entry: Quick) -> str:
    return "" if entry.rank is None else str(entry.rank)


def _ends(row: SequenceRow) -> tuple[str, str]:
    """Ends of the interval, empty where there is none."""
    if row.forecast.levels is None:
        return "", ""
    level = row.forecast.levels["eval_loss"]
    return f"{level.low:.6g}", f"{level.high:.6g}"


def _trial_cells(row: SequenceRow) -> tuple[str, str, str]:
    """The largest trial, and whether one diverged."""
    if not row.trials:
        return "", "", ""
    last = row.trials[-1]
    return str(last["rows"]), f"{last['outcomes']['eval_loss']:.6g}", "no" if row.diverged is None else "yes"


def sequence_candidates(ranking: SequenceRanking) -> Table:
    """List all candidates with the score that they were screened by, for programs.

    Args:
        ranking: Ranking.

    Returns:
        The table.
    """
    rows = [
        (
            *(ranking.model, ranking.dataset, entry.name, _rank(entry), str(entry.parameters)),
            f"{entry.score:.6g}",
        )
        for entry in ranking.quick
    ]
    header = ("model", "dataset", "adapter", "rank", "parameters", "quick_score")
    return Table("Every candidate.", header, tuple(rows), right_from=3)
