"""The report of a study: correlations and regrets as tables, scatter plots, the cells as CSV."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np

from foretune.errors import StoreError
from foretune.evaluation.plots import scatter_figure
from foretune.evaluation.predictors import OUTCOMES, QUANTITIES, Outcome, Quantity
from foretune.evaluation.records import Record, target_losses, write_records
from foretune.evaluation.regret import Choice, regrets
from foretune.evaluation.statistics import COEFFICIENTS, SCOPES, Correlation, Layers, Scope, correlate
from foretune.report.figures import save_figure
from foretune.report.store import make_folder, write_whole
from foretune.report.tables import Table

SCOPE_WORDS: dict[Scope, str] = {
    "all": "over all cells",
    "across": "across data sets",
    "within": "within a data set",
}
DRAWN = ("condition_number", "trace", "alignment", "forecast_eval_loss", "forecast_eval_accuracy")


@dataclass(frozen=True)
class Finding:
    """One coefficient of one quantity with one outcome.

    Attributes:
        quantity: Quantity.
        outcome: Outcome.
        coefficient: `spearman`, `kendall` or `pearson`.
        scope: `all`, `across` or `within`.
        estimate: Its value.
        low: Lower end of the 95% interval; NaN without.
        high: Upper end.
        p: Of a permutation test.
        points: Points that it rests on.
        cells: Cells that it rests on.
        established: Whether the interval leaves 0 out and p < 0.05.
    """

    quantity: Quantity
    outcome: Outcome
    coefficient: str
    scope: Scope
    estimate: float
    low: float
    high: float
    p: float
    points: int
    cells: int
    established: bool


@dataclass(frozen=True)
class StudyReport:
    """What a study's cells say.

    Attributes:
        records: Cells.
        findings: Correlations.
        choices: Regret of each rule that chooses a placement, the least first.
        left_out: Cells left out because their training diverged.
    """

    records: tuple[Record, ...]
    findings: tuple[Finding, ...]
    choices: tuple[Choice, ...]
    left_out: int

    def finding(self, quantity: str, outcome: str, coefficient: str, scope: Scope) -> Finding | None:
        """Look one coefficient up.

        Args:
            quantity: Name of the quantity.
            outcome: Name of the outcome.
            coefficient: Name of the coefficient.
            scope: Scope.

        Returns:
            The finding; None if it is undefined in this study.
        """
        for held in self.findings:
            names = (held.quantity.name, held.outcome.name, held.coefficient, held.scope)
            if names == (quantity, outcome, coefficient, scope):
                return held
        return None


def summarise(
    records: Sequence[Record],
    *,
    quantities: Sequence[Quantity] = QUANTITIES,
    resamples: int = 2000,
    seed: int = 0,
) -> StudyReport:
    """Compare what was known before training with what came of it.

    Pearson's coefficient takes the logarithm of quantities that are scales, where all are positive.

    Args:
        records: Cells.
        quantities: Which to compare.
        resamples: Draws of the bootstrap.
        seed: Its seed.

    Returns:
        The report.

    Raises:
        StoreError: If there are fewer than two cells that did not diverge.
    """
    held = [record for record in records if not record.facts["diverged"]]
    if len(held) < 2:
        raise StoreError(f"{len(held)} cells that did not diverge: a report needs at least 2")
    findings: list[Finding] = []
    for some, outcomes, part in _complete(held, quantities):
        findings += _findings(part, some, outcomes, resamples, seed)
    order = [(q.name, o.name, c, s) for s in SCOPES for c in COEFFICIENTS for o in OUTCOMES for q in QUANTITIES]
    place = {key: index for index, key in enumerate(order)}
    findings.sort(key=lambda f: place[f.quantity.name, f.outcome.name, f.coefficient, f.scope])
    return StudyReport(tuple(held), tuple(findings), regrets(held), len(records) - len(held))


def _complete(
    records: Sequence[Record], quantities: Sequence[Quantity]
) -> list[tuple[list[Quantity], list[Outcome], list[Record]]]:
    """Group quantities and outcomes by the cells that have them, so that all of a group rest on the same cells."""
    parts: dict[frozenset[int], tuple[list[Quantity], list[Outcome], list[Record]]] = {}
    for quantity in quantities:
        for outcome in OUTCOMES:
            have = frozenset(
                index
                for index, record in enumerate(records)
                if record.quantities[quantity.name] is not None and record.outcomes[outcome.name] is not None
            )
            if len(have) < 2:
                continue
            held = parts.setdefault(have, ([], [], [records[index] for index in sorted(have)]))
            if quantity not in held[0]:
                held[0].append(quantity)
            if outcome not in held[1]:
                held[1].append(outcome)
    return list(parts.values())


def _findings(
    records: Sequence[Record], quantities: Sequence[Quantity], outcomes: Sequence[Outcome], resamples: int, seed: int
) -> list[Finding]:
    x = np.array([[_value(record.quantities[quantity.name]) for quantity in quantities] for record in records])
    y = np.array([[_value(record.outcomes[outcome.name]) for outcome in outcomes] for record in records])
    logarithmic = np.array([quantity.logarithmic for quantity in quantities]) & (x > 0).all(axis=0)
    x = np.where(logarithmic, np.log(np.where(logarithmic, x, 1.0)), x)  # ranks do not change
    groups = {group: index for index, group in enumerate(sorted({record.group for record in records}))}
    units = {unit: index for index, unit in enumerate(sorted({record.unit for record in records}))}
    families = {kin: index for index, kin in enumerate(sorted({record.kin for record in records}))}
    layers = Layers(
        np.array([groups[record.group] for record in records]),
        np.array([units[record.unit] for record in records]),
        np.array([families[record.kin] for record in records]),
    )
    findings = []
    for (coefficient, scope), held in correlate(x, y, layers, resamples=resamples, seed=seed).items():
        for i, quantity in enumerate(quantities):
            for j, outcome in enumerate(outcomes):
                if isfinite(held.estimate[i, j]):
                    findings.append(_finding(held, i, j, quantity, outcome, coefficient, scope, len(records)))
    return findings


def _finding(
    held: Correlation,
    i: int,
    j: int,
    quantity: Quantity,
    outcome: Outcome,
    coefficient: str,
    scope: Scope,
    cells: int,
) -> Finding:
    return Finding(
        quantity,
        outcome,
        coefficient,
        scope,
        round(float(held.estimate[i, j]), 10),  # so that -0.125 is written one way
        float(held.low[i, j]),
        float(held.high[i, j]),
        float(held.p[i, j]),
        int(held.points[i, j]),
        cells,
        bool(held.established[i, j]),
    )


def _value(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def correlation_table(report: StudyReport, coefficient: str, scope: Scope) -> Table:
    """Lay out one coefficient in one scope: a row for each quantity, a column for each outcome.

    Args:
        report: Report.
        coefficient: Name of the coefficient.
        scope: Scope.

    Returns:
        The table; its caption says what the intervals are.
    """
    rows = []
    counts: set[tuple[int, int]] = set()
    for quantity in QUANTITIES:
        cells = [quantity.label]
        for outcome in OUTCOMES:
            held = report.finding(quantity.name, outcome.name, coefficient, scope)
            cells.append("–" if held is None else finding_in_words(held))
            if held is not None:
                counts.add((held.points, held.cells))
        if set(cells[1:]) != {"–"}:
            rows.append(tuple(cells))
    points = _span([point for point, _ in counts])
    cells_ = _span([cell for _, cell in counts])
    what = {"all": "points", "across": "data sets", "within": "placements in data sets"}[scope]
    names = {"spearman": "Spearman's ρ", "kendall": "Kendall's τ-b", "pearson": "Pearson's r (log scale for scales)"}
    caption = (
        f"{names[coefficient]} {SCOPE_WORDS[scope]}, with 95% bootstrap intervals; {cells_} cells, {points} {what}. "
        "In parentheses: not established, the interval holds 0, or a permutation test gives p ≥ 0.05."
    )
    return Table(caption, ("at initialisation", *(outcome.label for outcome in OUTCOMES)), tuple(rows))


def _span(values: Sequence[int]) -> str:
    if not values:
        return "no"
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def finding_in_words(held: Finding) -> str:
    """Write a coefficient with its interval; in parentheses where it is not established.

    Args:
        held: Finding.

    Returns:
        Such as `+0.85 [+0.60, +0.95]`.
    """
    interval = f" [{held.low:+.2f}, {held.high:+.2f}]" if isfinite(held.low) else " [no interval]"
    text = f"{held.estimate:+.2f}{interval}"
    return text if held.established else f"({text})"


def long_table(report: StudyReport) -> Table:
    """List every coefficient, one in a row, for other programs.

    Args:
        report: Report.

    Returns:
        The table.
    """
    header = ("scope", "coefficient", "quantity", "outcome", "estimate", "low", "high", "p", "points", "cells")
    rows = tuple(
        (
            held.scope,
            held.coefficient,
            held.quantity.name,
            held.outcome.name,
            f"{held.estimate:.4f}",
            f"{held.low:.4f}" if isfinite(held.low) else "",
            f"{held.high:.4f}" if isfinite(held.high) else "",
            f"{held.p:.4f}",
            str(held.points),
            str(held.cells),
            "yes" if held.established else "no",
        )
        for held in report.findings
    )
    return Table("Every coefficient.", (*header, "established"), rows, right_from=4)


def regret_table(report: StudyReport) -> Table:
    """Lay out what each rule for choosing a placement costs.

    Args:
        report: Report.

    Returns:
        The table.
    """
    rows = tuple(
        (
            choice.rule,
            f"{100 * choice.regret:.2f}",
            "–" if choice.low is None or choice.high is None else f"{100 * choice.low:.2f} … {100 * choice.high:.2f}",
            f"{choice.hits:.0%}",
            str(choice.groups),
        )
        for choice in report.choices
    )
    seeds = {record.seed for record in report.records}
    valued = (
        "the best placement is found on the other seeds and valued on the one left out"
        if len(seeds) > 1
        else "one seed, so that the best placement is partly the luckiest"
    )
    caption = f"Accuracy lost by the placement that each rule chooses, in points, mean over data sets; {valued}."
    return Table(caption, ("rule", "points lost", "95% interval", "best one chosen", "data sets"), rows)


def notes(report: StudyReport) -> list[str]:
    """Say what the tables do not show.

    Args:
        report: Report.

    Returns:
        Sentences.
    """
    said = []
    groups = {record.group for record in report.records}
    if report.left_out:
        said.append(f"{report.left_out} cells are left out: their training diverged.")
    if 1 < len(groups) < 5:
        said.append(
            f"{len(groups)} data sets: nothing can be established across data sets, since even a perfect order of "
            f"{len(groups)} points has p = 2/{len(groups)}! or more."
        )
    for group in sorted(groups):
        accuracies = [record.outcomes["accuracy"] for record in report.records if record.group == group]
        majority = next(record.facts["majority_accuracy"] for record in report.records if record.group == group)
        held = [value for value in accuracies if value is not None]
        if majority is not None and held and max(held) <= majority + 0.01:
            said.append(f"{group[1]}: no placement got more than a point past the majority class ({majority:.1%}).")
    targets = ", ".join(f"{group[1]} {loss:.3f}" for group, loss in sorted(target_losses(report.records).items()))
    if targets:
        said.append(f"Steps to loss: to the training loss that every run of the data set reaches ({targets}).")
    return said


def save_report(report: StudyReport, folder: Path) -> list[Path]:
    """Write the cells, the tables and the figure.

    Args:
        report: Report.
        folder: Folder; files of an earlier report are replaced.

    Returns:
        The files.
    """
    make_folder(folder)
    write_records(report.records, folder)
    paths = [folder / "cells.csv", folder / "curves.csv"]
    for coefficient in COEFFICIENTS:
        for scope in SCOPES:
            paths += correlation_table(report, coefficient, scope).save(folder, f"{coefficient}-{scope}")
    paths.append(folder / "correlations.csv")
    write_whole(paths[-1], long_table(report).write_csv)
    paths += regret_table(report).save(folder, "regret")
    drawn = [quantity for quantity in QUANTITIES if quantity.name in DRAWN]
    paths += save_figure(scatter_figure(report.records, drawn), folder, "scatter")
    return paths
