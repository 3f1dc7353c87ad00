"""Tables of a ranking of a language model's adapters, for people and for programs."""

from foretune.forecasting.sequence_simulation import APART
from foretune.ranking.equal_size import NEAR
from foretune.ranking.sequence_rows import TIE, SequenceRanking, SequenceRow
from foretune.report.tables import Table

MARK = "!"


def sequence_table(ranking: SequenceRanking) -> Table:
    """Lay the finalists out.

    Args:
        ranking: Ranking.

    Returns:
        The table; `=` marks rows that tie with the first, `*` the recommended one, `!` those whose linearised loss is
        another. Learning rate and epochs are there where there are several recipes.
    """
    recipes = len(ranking.recipes) > 1
    late = any(row.best_step < row.steps for row in ranking.rows)
    header = (
        *("#", "adapter", *(("learning rate", "epochs") if recipes else ())),
        *("eval loss", "perplexity", "token acc %", "linear loss", *(("best step",) if late else ())),
        *("parameters", "MB", "step"),
    )
    rows = []
    for place, row in enumerate(ranking.rows, start=1):
        end = row.found.run.end
        rows.append(
            (
                f"{place}{' =' if row.tie else ''}{' *' if row.recommended else ''}",
                row.quick.name,
                *((f"{row.recipe.learning_rate:g}", str(row.recipe.epochs)) if recipes else ()),
                f"{end.eval_loss:.3f}",
                f"{end.eval_metric:.2f}",
                f"{100 * row.found.token_accuracy[-1]:.1f}",
                f"{row.found.linear_loss:.3f}{f' {MARK}' if row.found.apart else ''}",
                *((_best(row),) if late else ()),
                f"{row.quick.parameters:,}",
                f"{row.megabytes:.2f}",
                f"{row.compute:.0%}",
            )
        )
    return Table(_caption(ranking, late=late), header, tuple(rows), right_from=2)


def _best(row: SequenceRow) -> str:
    return f"{row.best_step} of {row.steps}" if row.best_step < row.steps else ""


def _caption(ranking: SequenceRanking, *, late: bool) -> str:
    words = [
        "Simulated runs, not calibrated: no level is forecast. eval loss: nats a token at the end, of the model with "
        f"the simulated A and B plugged in. '=': within {TIE:g} nats of the first; '*': recommended, the cheapest of "
        "these."
    ]
    if any(row.found.apart for row in ranking.rows):
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
    )
    rows = []
    for place, row in enumerate(ranking.rows, start=1):
        end, found = row.found.run.end, row.found
        losses = (end.eval_loss, end.eval_metric, found.token_accuracy[-1], found.linear_loss, end.train_loss)
        rows.append(
            (
                *(str(place), ranking.model, ranking.dataset, row.quick.name, str(row.quick.candidate.rank)),
                *(f"{row.recipe.learning_rate:g}", str(row.recipe.epochs), str(row.steps)),
                *(f"{value:.6g}" for value in losses),
                *(str(row.best_step), str(row.quick.parameters), f"{row.megabytes:.6g}", f"{row.compute:.4g}"),
                f"{row.quick.score:.6g}",
                *("yes" if yes else "no" for yes in (row.found.apart, row.tie, row.recommended)),
            )
        )
    return Table("Finalists.", header, tuple(rows), right_from=4)


def sequence_candidates(ranking: SequenceRanking) -> Table:
    """List all candidates with the score that they were screened by, for programs.

    Args:
        ranking: Ranking.

    Returns:
        The table.
    """
    rows = [
        (
            *(ranking.model, ranking.dataset, entry.name, str(entry.candidate.rank), str(entry.parameters)),
            f"{entry.score:.6g}",
        )
        for entry in ranking.quick
    ]
    header = ("model", "dataset", "adapter", "rank", "parameters", "quick_score")
    return Table("Every candidate.", header, tuple(rows), right_from=3)
