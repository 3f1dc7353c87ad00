import csv
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import drawn
from foretune.errors import StoreError
from foretune.evaluation.correlations import (
    correlation_table,
    finding_in_words,
    notes,
    regret_table,
    report_writers,
    summarise,
)
from foretune.evaluation.plots import scatter_figure
from foretune.evaluation.predictors import PREDICTORS, QUANTITIES, outcomes_of, predictor_named, quantities_of
from foretune.evaluation.records import SECONDS, Record, read_records, record_writers, target_losses
from foretune.evaluation.regret import regrets
from foretune.report.curves import Step
from foretune.report.figures import figure_writers
from foretune.report.store import write_files
from foretune.report.tables import Table, tex
from foretune.study.stored import FACTS, MEASURED, measured


def record(dataset="a", placement="p0", seed=0, accuracy=0.7, model="m", **quantities):
    values = dict.fromkeys(QUANTITIES) | dict.fromkeys(quantities_of("classification"), 1.0) | quantities
    outcomes = dict.fromkeys(MEASURED) | dict.fromkeys(measured("classification"), 0.5)
    outcomes |= {"accuracy": accuracy, "steps_to_loss": 3.0}
    facts = dict.fromkeys(FACTS, 0) | {"majority_accuracy": 0.5, "eval_rows": 100, "steps": 4}
    steps = tuple(Step(i + 1, 1.0 / (i + 1), math.nan, None, math.nan) for i in range(4))
    key = f"{model}-{dataset}-{placement}-{seed}"
    return Record(key, model, dataset, placement, 8, seed, values, outcomes, facts, dict.fromkeys(SECONDS, 1.0), steps)


def study(n_datasets=3, n_placements=5, n_seeds=2, noise=0.0):
    """κ orders the placements of a data set the wrong way round, the trace the right way."""
    rng = np.random.default_rng(0)
    records = []
    for d in range(n_datasets):
        for p in range(n_placements):
            for s in range(n_seeds):
                accuracy = 0.5 + 0.05 * d + 0.03 * p + noise * rng.normal()
                records.append(
                    record(f"d{d}", f"p{p}", s, accuracy, condition_number=10.0 + p, trace=0.1 * (p + 1) + d)
                )
    return records


def test_findings_have_the_signs_that_were_put_in():
    report = summarise(study(), resamples=100)
    assert report.finding("condition_number", "accuracy", "spearman", "within").estimate == pytest.approx(1.0)
    assert report.finding("condition_number", "accuracy", "spearman", "within").established
    assert report.finding("condition_number", "accuracy", "kendall", "across") is None  # the same in every data set
    assert report.finding("trace", "accuracy", "spearman", "across").estimate == pytest.approx(1.0)
    assert not report.finding("trace", "accuracy", "spearman", "across").established  # three data sets
    assert report.finding("alignment", "accuracy", "spearman", "all") is None


def test_pearson_takes_the_logarithm_of_scales():
    records = [record(placement=f"p{i}", accuracy=0.1 * i, trace=10.0**i) for i in range(6)]
    report = summarise(records, resamples=100)
    assert report.finding("trace", "accuracy", "pearson", "all").estimate == pytest.approx(1.0)


def test_a_quantity_that_some_cells_lack_rests_on_the_others():
    records = study(2, 4, 1)
    records[0] = dataclasses.replace(records[0], quantities={**records[0].quantities, "trace": None})
    report = summarise(records, resamples=100)
    assert report.finding("trace", "accuracy", "spearman", "all").cells == 7
    assert report.finding("condition_number", "accuracy", "spearman", "all").cells == 8


def test_what_is_not_established_is_in_parentheses():
    report = summarise(study(), resamples=100)
    good = report.finding("condition_number", "accuracy", "spearman", "within")
    assert finding_in_words(good) == "+1.00 [+1.00, +1.00]"
    bad = report.finding("trace", "accuracy", "spearman", "across")
    assert finding_in_words(bad).startswith("(+1.00")
    table = correlation_table(report, "spearman", "across")
    assert "not established" in table.caption
    assert "3 data sets" in table.caption


def test_diverged_cells_are_left_out_and_said():
    records = study(1, 4, 1)
    records[0] = dataclasses.replace(records[0], facts={**records[0].facts, "diverged": 1})
    report = summarise(records, resamples=100)
    assert report.left_out == 1
    assert any("diverged" in note for note in notes(report))
    with pytest.raises(StoreError, match="needs at least 2"):
        summarise(records[:2], resamples=100)


def test_notes_name_a_data_set_where_nothing_was_learned():
    report = summarise([record("dull", f"p{i}", accuracy=0.505) for i in range(3)], resamples=100)
    assert any("dull: no placement got more than a point past the majority class" in note for note in notes(report))


def regret(records, rule):
    return next(entry for entry in regrets(records) if entry.rule == rule)


def test_regret_of_a_rule_that_is_wrong_right_or_blind():
    records = study(n_seeds=1)
    assert regret(records, "smallest κ").mean == pytest.approx(0.12)
    assert regret(records, "smallest κ").hits == 0
    assert regret(records, "largest trace").mean == pytest.approx(0.0)
    assert regret(records, "largest trace").hits == 1
    assert regret(records, "random placement").mean == pytest.approx(0.06)
    assert regret(records, "largest alignment").mean == pytest.approx(0.06)  # all tied: as good as random
    assert regret(records, "best on the other data sets").mean == pytest.approx(0.0)
    ordered = [entry.mean for entry in regrets(records)]
    assert ordered == sorted(ordered)


def test_what_is_best_elsewhere_does_not_look_at_the_data_set_itself():
    accuracies = {"a": (0.9, 0.5), "b": (0.6, 0.7), "c": (0.6, 0.7)}
    records = [record(d, f"p{p}", accuracy=a) for d, values in accuracies.items() for p, a in enumerate(values)]
    # a: p1 is best on b and c, and loses 0.4; b: on a and c the means are 0.75 and 0.6, so p0, and 0.1 is lost; c alike
    assert regret(records, "best on the other data sets").mean == pytest.approx((0.4 + 0.1 + 0.1) / 3)


def test_regret_is_not_fooled_by_the_luckiest_of_equals():
    """With placements that do not differ, the best of a noisy draw is no better: the true regret is 0."""
    rng = np.random.default_rng(1)
    records = [
        record(f"d{d}", f"p{p}", s, 0.7 + 0.05 * rng.normal()) for d in range(40) for p in range(5) for s in range(2)
    ]
    assert abs(regret(records, "random placement").mean) < 0.01
    one_seed = [cell for cell in records if cell.seed == 0]
    assert regret(one_seed, "random placement").mean > 0.04


def test_regret_with_seeds_by_hand():
    accuracies = {"p0": (0.6, 0.9), "p1": (0.8, 0.7)}
    records = [
        record(placement=p, seed=s, accuracy=a, condition_number=1.0 if p == "p0" else 2.0)
        for p, values in accuracies.items()
        for s, a in enumerate(values)
    ]
    # seed 0 left out: best on seed 1 is p0, worth 0.6 on seed 0; seed 1 left out: best is p1, worth 0.7 on seed 1
    by_kappa = regret(records, "smallest κ")
    assert by_kappa.mean == pytest.approx(((0.6 - 0.6) + (0.7 - 0.9)) / 2)
    assert by_kappa.hits == 1.0  # both have a mean of 0.75
    assert (by_kappa.low, by_kappa.high) == (None, None)


def test_one_placement_is_no_regret():
    assert regrets([record(), record("b")]) == ()
    assert regret_table(summarise([record(), record("b")], resamples=100)).rows == ()


def test_an_unfinished_study_takes_the_seeds_that_all_have():
    records = study(2, 3, 2)[:-1]
    assert regret(records, "largest trace").groups == 2


def test_the_target_loss_is_one_that_every_run_reaches():
    slow = dataclasses.replace(
        record(placement="slow"), steps=tuple(Step(i + 1, 0.9, math.nan, None, math.nan) for i in range(4))
    )
    assert target_losses([record(), slow]) == {("m", "a"): 0.9}
    broken = dataclasses.replace(slow, steps=tuple(dataclasses.replace(s, loss=math.nan) for s in slow.steps))
    assert target_losses([record(), broken]) == {}
    assert target_losses([dataclasses.replace(slow, steps=())]) == {}


def test_records_survive_their_csv(tmp_path):
    records = study(2, 2, 1)
    records[0] = dataclasses.replace(records[0], quantities={**records[0].quantities, "alignment": None})
    write_files(tmp_path, record_writers(records))
    again = read_records(tmp_path)
    assert [record.key for record in again] == [record.key for record in records]
    for first, second in zip(records, again, strict=True):
        assert first.quantities == second.quantities
        assert {k: v for k, v in first.outcomes.items() if k in measured("classification")} == {
            k: v for k, v in second.outcomes.items() if k in measured("classification")
        }
        assert [step.loss for step in second.steps] == pytest.approx([step.loss for step in first.steps], rel=1e-4)
    (tmp_path / "cells.csv").write_text("key,model\n1,m\n", encoding="utf-8")
    with pytest.raises(StoreError, match=r"cells\.csv.* is damaged: cells\.csv has no column"):
        read_records(tmp_path)


def test_a_report_is_written_in_every_format(tmp_path):
    report = summarise(study(noise=0.01), resamples=100)
    paths = write_files(tmp_path / "report", report_writers(report))
    assert {path.name for path in paths} == {path.name for path in (tmp_path / "report").iterdir()}
    table = correlation_table(report, "kendall", "within")
    assert (tmp_path / "report" / "kendall-within.md").read_text(encoding="utf-8") == table.markdown()
    assert (tmp_path / "report" / "kendall-within.tex").read_text(encoding="utf-8") == table.latex()
    with (tmp_path / "report" / "regret.csv").open(encoding="utf-8") as file:
        assert [tuple(row) for row in csv.reader(file)] == [regret_table(report).header, *regret_table(report).rows]
    with (tmp_path / "report" / "correlations.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report.findings)
    for row in rows:
        finding = report.finding(row["quantity"], row["outcome"], row["coefficient"], row["scope"])
        assert float(row["estimate"]) == pytest.approx(finding.estimate, abs=1e-4)
        assert (row["established"] == "yes") == finding.established
    for ending, start in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")):
        assert (tmp_path / "report" / f"scatter.{ending}").read_bytes().startswith(start)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StoreError, match="cannot write"):
        write_files(tmp_path / "file" / "report", report_writers(report))


def test_the_scatter_plot_shows_every_cell_where_its_numbers_are():
    records = study(2, 3, 1)
    records[0] = dataclasses.replace(records[0], quantities={**records[0].quantities, "trace": None})
    outcomes = outcomes_of("classification")
    figure = scatter_figure(records, [predictor_named("condition_number"), predictor_named("trace")])
    panels = np.array(figure.axes).reshape(len(outcomes), 2)
    for row, outcome in zip(panels, outcomes, strict=True):
        for axes, name in zip(row, ("condition_number", "trace"), strict=True):
            shown = drawn.points(axes)
            for dataset in ("d0", "d1"):
                cells = [cell for cell in records if cell.dataset == dataset and cell.quantities[name] is not None]
                wanted = [(cell.quantities[name], cell.outcomes[outcome.name]) for cell in cells]
                assert shown[dataset] == pytest.approx(np.array(wanted))
        assert row[0].get_ylabel() == outcome.label
    assert [axes.get_xlabel() for axes in panels[-1]] == ["κ", "trace"]
    assert [axes.get_xscale() for axes in panels[0]] == ["log", "linear"]  # one trace is not known


@pytest.mark.parametrize("dataset", ["a", "$x$ _y", "_hidden"])
def test_the_same_cells_give_the_same_files(dataset, tmp_path):
    records = [record(dataset, "p0"), record(dataset, "p1"), record("b", "p0")]
    for name in ("first", "again"):
        figure = scatter_figure(records, PREDICTORS[:1])
        paths = write_files(tmp_path / name, figure_writers(figure, "scatter"))
    assert len(figure.legends[0].get_texts()) == 2  # whatever the names are
    for path in paths:
        assert path.read_bytes() == (tmp_path / "first" / path.name).read_bytes()


TABLE = Table("κ of 50% & more", ("a_b", "ρ"), (("x|y", "+0.5"), ("–", "1 ± 2")))


def test_tables_in_every_format(tmp_path):
    assert TABLE.markdown() == "κ of 50% & more\n\n| a_b | ρ |\n| --- | ---: |\n| x\\|y | +0.5 |\n| – | 1 ± 2 |\n"
    latex = TABLE.latex()
    assert r"\caption{$\kappa$ of 50\% \& more}" in latex
    assert r"a\_b & $\rho$ \\" in latex
    assert r"-- & 1 $\pm$ 2 \\" in latex
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == 1
    write_files(tmp_path, TABLE.writers("t"))
    assert (tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()[1] == "x|y,+0.5"


@given(st.text(max_size=30))
def test_latex_has_no_bare_special_characters(text):
    written = tex(text)
    for command in (r"\textbackslash{}", r"\textasciitilde{}", r"\textasciicircum{}"):
        written = written.replace(command, "")
    for character in "&%#_":
        assert written.count(character) == written.count("\\" + character)
