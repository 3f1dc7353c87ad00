"""Ties: where forecasts cannot be told apart, the cheapest adapter is recommended."""

import csv
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.cli import run
from foretune.forecasting.calibration import Interval, RunForecast
from foretune.forecasting.reach import INSIDE, Reach
from foretune.ranking.candidates import Candidate
from foretune.ranking.finalists import Quick
from foretune.ranking.recommend import chosen, in_words, marked, tie_note
from foretune.ranking.rows import Row, ordered
from foretune.settings.groups import Recipe

import cases
import domains

CALIBRATION = domains.by_hand(domains.everywhere("m"), within=0.2)  # logits within 0.47 tie


def row(accuracy, parameters=100, *, compute=1.0, epochs=1, withheld=False, calibrated=True):
    levels = None if withheld else {"accuracy": Interval(accuracy, accuracy, accuracy)}
    said = RunForecast(levels, (accuracy, 0.5), Reach(9.0, ("far",)) if withheld else INSIDE, calibrated=calibrated)
    quick = Quick(Candidate((0,), 4), "query · r 4", parameters, 0.1)
    recipe = Recipe(epochs=epochs, learning_rate=1e-3)
    return Row(quick, recipe, 10 * epochs, said, None, epochs, 1e-3, 10.0, 0.1, compute)


def ranked(*rows):
    return marked(ordered(rows, CALIBRATION))


def recommended(rows):
    (one,) = (row for row in rows if row.recommended)
    return one


def test_the_first_row_is_recommended_where_nothing_ties():
    rows = ranked(row(0.7, 10), row(0.9, 500), row(0.8, 100))
    assert recommended(rows) is rows[0]
    assert tie_note(rows, 1) == ()


def test_the_cheapest_of_those_that_tie_with_the_first_is_recommended():
    rows = ranked(row(0.90, 500), row(0.89, 100), row(0.88, 200), row(0.6, 10))
    assert [one.tie for one in rows] == [False, True, True, False]
    assert recommended(rows) is rows[1]
    assert tie_note(rows, 1) == ()


def at_risk(accuracy, risk, parameters=100, floor=0.5):
    return replace(row(accuracy, parameters), risk=risk, floor=floor)


def test_what_may_collapse_is_put_into_order_by_what_is_to_be_expected():
    """0.9 with half a chance of 0.5 is 0.7: behind 0.8 with a tenth of it."""
    rows = ranked(at_risk(0.9, 0.5), at_risk(0.8, 0.1), at_risk(0.6, 0.0))
    assert [one.risk for one in rows] == [0.1, 0.5, 0.0]
    assert [one.judged.order[0] for one in rows] == pytest.approx([0.77, 0.7, 0.6])
    assert [one.said.order[0] for one in rows] == [0.8, 0.9, 0.6]  # what is said stays
    unknown = row(0.9)
    assert unknown.judged is unknown.said
    assert replace(unknown, risk=0.5).judged is unknown.said  # nothing is known of where it would end


def test_what_is_told_to_collapse_is_not_recommended_for_its_size():
    rows = ranked(at_risk(0.90, 0.05, 500), at_risk(0.97, 0.21, 10), at_risk(0.89, 0.1, 100))
    assert [one.tie for one in rows] == [False, True, True]
    assert recommended(rows).quick.parameters == 100
    all_risky = ranked(at_risk(0.90, 0.3, 500), at_risk(0.89, 0.3, 10))
    assert recommended(all_risky).quick.parameters == 10


def test_of_equal_sizes_the_cheapest_step_then_the_better_row():
    assert recommended(ranked(row(0.90), row(0.89, compute=0.5), row(0.88, compute=0.7))).compute == 0.5
    assert recommended(ranked(row(0.89, epochs=1), row(0.90, epochs=3), row(0.88, epochs=2))).recipe.epochs == 3
    rows = ranked(row(0.89), row(0.90))
    assert recommended(rows) is rows[0]


def test_where_sizes_are_equal_the_few_parameters_between_them_do_not_count():
    rows = ordered([row(0.90, 100), row(0.89, 95), row(0.88, 110, compute=0.5)], CALIBRATION)
    assert recommended(marked(rows)).quick.parameters == 95
    assert recommended(marked(rows, equal_sizes=True)).compute == 0.5
    assert recommended(marked(rows[:2], equal_sizes=True)).quick.parameters == 100


def test_what_is_not_calibrated_ties_with_nothing():
    rows = ranked(row(0.90, calibrated=False), row(0.90, 10, calibrated=False, epochs=2))
    assert recommended(rows).quick.parameters == 10  # the first of equal forecasts is the smaller adapter
    rows = ranked(row(0.91, calibrated=False), row(0.90, 10, calibrated=False))
    assert recommended(rows) is rows[0]


def test_a_level_that_is_withheld_is_recommended_only_where_the_first_is_withheld():
    rows = ranked(row(0.90, 500), row(0.89, 10, withheld=True), row(0.88, 100))
    assert recommended(rows).quick.parameters == 100
    (note,) = tie_note(rows, 1)
    assert "the cheapest of them with a forecast" in note
    assert recommended(ranked(row(0.90, 500, withheld=True), row(0.89, 10, withheld=True))).quick.parameters == 10


def test_one_sentence_says_that_nothing_can_be_told_apart():
    rows = ranked(row(0.90, 500), row(0.89, 1100), row(0.88, 300))
    (note,) = tie_note(rows, 1)
    assert note.startswith("The placements cannot be told apart on this data set: all 3 rows tie with the first;")
    assert "recommended is the cheapest of them, query · r 4 (300 parameters)." in note
    (note,) = tie_note(rows, 2)
    assert "placements and recipes" in note
    assert "query · r 4, 1 epoch at 0.001 (300" in note
    assert tie_note(rows[:1], 1) == ()
    assert in_words(row(0.9, epochs=3), 2) == "query · r 4, 3 epochs at 0.001"


ROWS = st.builds(
    row,
    st.floats(0.3, 0.95),
    st.integers(1, 5),
    compute=st.sampled_from([0.5, 1.0]),
    epochs=st.integers(1, 3),
    withheld=st.booleans(),
)


@given(st.lists(ROWS, min_size=1, max_size=8))
def test_one_row_is_recommended_and_none_that_ties_is_cheaper(rows):
    rows = ranked(*rows)
    best = recommended(rows)
    assert best is rows[0] or best.tie
    for other in rows:
        if (other is rows[0] or other.tie) and (rows[0].forecast is None or other.forecast is not None):
            assert (other.quick.parameters, other.compute) >= (best.quick.parameters, best.compute)
    assert chosen((), None) is None


@pytest.mark.parametrize(("spread", "all_tie"), [(3.0, True), (1e-9, False)])
def test_the_recommended_adapter_is_written_unless_another_is_chosen(spread, all_tie, tmp_path, capsys):
    model = cases.save(tmp_path / "model")
    path = tmp_path / "calibration.json"
    domains.write(path, model)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["lines"]["accuracy"]["within"] = spread
    path.write_text(json.dumps(content), encoding="utf-8")
    dataset, out = cases.write_reviews(tmp_path / "reviews"), tmp_path / "out"
    assert run(["rank", "--model", model, "--dataset", dataset, "--calibration", str(path), "--samples", "16",
                "--eval-samples", "40", "--draws", "1", "--epochs", "2", "--learning-rate", "3e-2", "--ranks", "1", "4",
                "--train-batch-size", "8", "--finalists", "6", "--output", str(out)]) == 0  # fmt: skip
    captured = capsys.readouterr()
    with (out / "ranking.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    (best,) = (row for row in rows if row["recommended"] == "yes")
    alike = [row for row in rows if row["tie"] == "yes" or row is rows[0]]
    assert int(best["parameters"]) == min(int(row["parameters"]) for row in alike)
    assert (len(alike) == len(rows)) == all_tie
    printed, said = (" ".join(text.split()) for text in (captured.out, captured.err))
    assert ("cannot be told apart on this data set: all 6 rows tie" in printed) == all_tie
    assert f"; row {best['place']}, {best['adapter']}, in" in said
    assert json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))["r"] == int(best["rank"])
    held = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert held["chosen"]["place"] == int(best["place"])
    assert [row["recommended"] for row in held["rankings"][0]["rows"]] == [row is best for row in rows]
    table = (out / "ranking.md").read_text(encoding="utf-8")
    assert sum(line.split("|")[1].strip().endswith("*") for line in table.splitlines() if line.startswith("| ")) == 1
