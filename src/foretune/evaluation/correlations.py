"""The report of a study: correlations and regrets as tables, scatter plots, the cells as CSV."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

from foretune.errors import StoreError
from foretune.evaluation.plots import scatter_figure
from foretune.evaluation.predictors import PREDICTORS, Outcome, Predictor, outcomes_of, predictor_named, predictors_of
from foretune.evaluation.records import Record, by_kind, record_writers, target_losses
from foretune.evaluation.regret import Regret, regrets
from foretune.evaluation.statistics import COEFFICIENTS, SCOPES, Layers, Scope, correlate
from foretune.report.figures import figure_writers
from foretune.report.store import Writer
from foretune.report.tables import Table
from foretune.tasks.metrics import Kind, Metric, main_metric

SCOPE_WORDS: dict[Scope, str] = {
    "all": "over all cells",
    "across": "across data sets",
    "within": "within a data set",
}
_DRAWN = (  # the last with the name of the main metric
    "condition_number",
    "trace",
    "alignment",
    "kernel_regression_eval_loss",
    "kernel_regression_eval_{}",
)


@dataclass(frozen=True)
class Finding:
    """One coefficient of one predictor with one outcome.

    Attributes:
        predictor: Predictor.
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

    predictor: Predictor
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
    """What a study's cells of one kind of task say.

    Attributes:
        records: Cells.
        findings: Correlations.
        regrets: Regret of each rule that chooses a placement, the least first.
        left_out: Cells left out because their training diverged.
    """

    records: tuple[Record, ...]
    findings: tuple[Finding, ...]
    regrets: tuple[Regret, ...]
    left_out: int

    @property
    def kind(self) -> Kind:
        """Kind of task of the cells."""
        return self.records[0].kind

    @property
    def metric(self) -> Metric:
        """Main metric of the kind."""
        return main_metric(self.kind)

    def finding(self, predictor: str, outcome: str, coefficient: str, scope: Scope) -> Finding | None:
        """Look one coefficient up.

        Args:
            predictor: Name of the predictor.
            outcome: Name of the outcome.
            coefficient: Name of the coefficient.
            scope: Scope.

        Returns:
            The finding; None if it is undefined in this study.
        """
        for finding in self.findings:
            names = (finding.predictor.name, finding.outcome.name, finding.coefficient, finding.scope)
            if names == (predictor, outcome, coefficient, scope):
                return finding
        return None


def summarise(
    records: Sequence[Record],
    *,
    predictors: Sequence[Predictor] = PREDICTORS,
    resamples: int = 2000,
    seed: int = 0,
) -> StudyReport:
    """Compare what was known before training with what came of it.

    Pearson's coefficient takes the logarithm of predictors that are scales, where all are positive.

    Args:
        records: Cells of one kind of task.
        predictors: Which to compare, of those that the kind has.
        resamples: Draws of the bootstrap.
        seed: Its seed.

    Returns:
        The report.

    Raises:
        StoreError: If there are fewer than two cells that did not diverge, or they are of several kinds of task.
    """
    kinds = list(by_kind(records))
    if len(kinds) > 1:
        raise StoreError(f"cells of {' and '.join(kinds)} have no metric in common: summarise each kind of `by_kind`")
    finished = [record for record in records if not record.facts["diverged"]]
    if len(finished) < 2:
        raise StoreError(f"{len(finished)} cells that did not diverge: a report needs at least 2")
    findings: list[Finding] = []
    for some, outcomes, cells in _complete(finished, predictors):
        findings += _findings(cells, some, outcomes, resamples, seed)
    known = outcomes_of(finished[0].kind)
    order = [(p.name, o.name, c, s) for s in SCOPES for c in COEFFICIENTS for o in known for p in PREDICTORS]
    place = {key: index for index, key in enumerate(order)}
    findings.sort(key=lambda f: place[f.predictor.name, f.outcome.name, f.coefficient, f.scope])
    return StudyReport(tuple(finished), tuple(findings), regrets(finished), len(records) - len(finished))


def _complete(
    records: Sequence[Record], predictors: Sequence[Predictor]
) -> list[tuple[list[Predictor], list[Outcome], list[Record]]]:
    """Group predictors and outcomes by the cells that have them, so that all of a group rest on the same cells."""
    complete: dict[frozenset[int], tuple[list[Predictor], list[Outcome], list[Record]]] = {}
    kind = records[0].kind
    for predictor in [predictor for predictor in predictors if predictor.kind in (None, kind)]:
        for outcome in outcomes_of(kind):
            have = frozenset(
                index
                for index, record in enumerate(records)
                if record.quantities[predictor.name] is not None and record.outcomes[outcome.name] is not None
            )
            if len(have) < 2:
                continue
            some, outcomes, _ = complete.setdefault(have, ([], [], [records[index] for index in sorted(have)]))
            if predictor not in some:
                some.append(predictor)
            if outcome not in outcomes:
                outcomes.append(outcome)
    return list(complete.values())


def _findings(
    records: Sequence[Record], predictors: Sequence[Predictor], outcomes: Sequence[Outcome], resamples: int, seed: int
) -> list[Finding]:
    x = np.array([[_value(record.quantities[predictor.name]) for predictor in predictors] for record in records])
    y = np.array([[_value(record.outcomes[outcome.name]) for outcome in outcomes] for record in records])
    logarithmic = np.array([predictor.logarithmic for predictor in predictors]) & (x > 0).all(axis=0)
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
    for (coefficient, scope), correlation in correlate(x, y, layers, resamples=resamples, seed=seed).items():
        for i, predictor in enumerate(predictors):
            for j, outcome in enumerate(outcomes):
                if isfinite(correlation.estimate[i, j]):
                    findings.append(
                        Finding(
                            predictor=predictor,
                            outcome=outcome,
                            coefficient=coefficient,
                            scope=scope,
                            estimate=round(float(correlation.estimate[i, j]), 10),  # so that -0.125 is written one way
                            low=float(correlation.low[i, j]),
                            high=float(correlation.high[i, j]),
                            p=float(correlation.p[i, j]),
                            points=int(correlation.points[i, j]),
                            cells=len(records),
                            established=bool(correlation.established[i, j]),
                        )
                    )
    return findings


def _value(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def correlation_table(report: StudyReport, coefficient: str, scope: Scope) -> Table:
    """Lay out one coefficient in one scope: a row for each predictor, a column for each outcome.

    Args:
        report: Report.
        coefficient: Name of the coefficient.
        scope: Scope.

    Returns:
        The table; its caption says what the intervals are.
    """
    rows = []
    counts: set[tuple[int, int]] = set()
    outcomes = outcomes_of(report.kind)
    for predictor in predictors_of(report.kind):
        cells = [predictor.label]
        for outcome in outcomes:
            finding = report.finding(predictor.name, outcome.name, coefficient, scope)
            cells.append("–" if finding is None else finding_in_words(finding))
            if finding is not None:
                counts.add((finding.points, finding.cells))
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
    return Table(caption, ("at initialisation", *(outcome.label for outcome in outcomes)), tuple(rows))


def _span(values: Sequence[int]) -> str:
    if not values:
        return "no"
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def finding_in_words(finding: Finding) -> str:
    """Write a coefficient with its interval; in parentheses where it is not established.

    Args:
        finding: Finding.

    Returns:
        Such as `+0.85 [+0.60, +0.95]`.
    """
    interval = f" [{finding.low:+.2f}, {finding.high:+.2f}]" if isfinite(finding.low) else " [no interval]"
    text = f"{finding.estimate:+.2f}{interval}"
    return text if finding.established else f"({text})"


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
            finding.scope,
            finding.coefficient,
            finding.predictor.name,
            finding.outcome.name,
            f"{finding.estimate:.4f}",
            f"{finding.low:.4f}" if isfinite(finding.low) else "",
            f"{finding.high:.4f}" if isfinite(finding.high) else "",
            f"{finding.p:.4f}",
            str(finding.points),
            str(finding.cells),
            "yes" if finding.established else "no",
        )
        for finding in report.findings
    )
    return Table("Every coefficient.", (*header, "established"), rows, right_from=4)


def regret_table(report: StudyReport) -> Table:
    """Lay out what each rule for choosing a placement costs.

    Args:
        report: Report.

    Returns:
        The table.
    """
    unit, digits = (100, 2) if report.metric.percent else (1, 4)
    rows = tuple(
        (
            regret.rule,
            f"{unit * regret.mean:.{digits}f}",
            "–"
            if regret.low is None or regret.high is None
            else f"{unit * regret.low:.{digits}f} … {unit * regret.high:.{digits}f}",
            f"{regret.hits:.0%}",
            str(regret.groups),
        )
        for regret in report.regrets
    )
    seeds = {record.seed for record in report.records}
    valued = (
        "the best placement is found on the other seeds and valued on the one left out"
        if len(seeds) > 1
        else "one seed, so that the best placement is partly the luckiest"
    )
    metric = report.metric
    in_points = ", in points" if metric.percent else ""
    caption = (
        f"{capitalised(metric.label)} lost by the placement that each rule chooses{in_points}, mean over data sets; "
        f"{valued}."
    )
    lost = "points lost" if metric.percent else "lost"
    return Table(caption, ("rule", lost, "95% interval", "best one chosen", "data sets"), rows)


def capitalised(label: str) -> str:
    """Write a metric's label as the start of a sentence.

    Args:
        label: Label.

    Returns:
        The same, its first letter large.
    """
    return label[:1].upper() + label[1:]


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
        values = [record.outcomes[report.metric.name] for record in report.records if record.group == group]
        majority = next(record.facts["majority_accuracy"] for record in report.records if record.group == group)
        known = [value for value in values if value is not None]
        if majority is not None and known and max(known) <= majority + 0.01:
            said.append(f"{group[1]}: no placement got more than a point past the majority class ({majority:.1%}).")
    targets = ", ".join(f"{group[1]} {loss:.3f}" for group, loss in sorted(target_losses(report.records).items()))
    if targets:
        said.append(f"Steps to loss: to the training loss that every run of the data set reaches ({targets}).")
    return said


def report_writers(report: StudyReport) -> dict[str, Writer]:
    """Lay out the cells, the tables and the figure.

    Args:
        report: Report.

    Returns:
        A writer for each file.
    """
    writers = record_writers(report.records)
    for coefficient in COEFFICIENTS:
        for scope in SCOPES:
            writers |= correlation_table(report, coefficient, scope).writers(f"{coefficient}-{scope}")
    writers["correlations.csv"] = long_table(report).write_csv
    writers |= regret_table(report).writers("regret")
    return writers | figure_writers(
        scatter_figure(report.records, [predictor_named(name.format(report.metric.name)) for name in _DRAWN]), "scatter"
    )
