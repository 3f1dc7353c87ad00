"""A line holds whatever a name may be, and gives it back as it can be printed."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.ledger.entries import COLUMNS, COUNTED, STATES, Entry, Told, cells_of, entry_from
from foretune.ledger.files import append, read_ledger
from foretune.report.texts import printable
from foretune.tasks.metrics import METRICS
from made_entries import LINE, line

NASTY = st.text(
    alphabet=st.characters(codec=None, exclude_categories=()) | st.sampled_from(",\"'\n\r\t\x1b=+-@\u202e#")
)
NUMBER = st.none() | st.floats(allow_nan=False, allow_infinity=False)
KNOWN = st.floats(allow_nan=False, allow_infinity=False)
COUNT = st.none() | st.integers(0, 10**9)


@st.composite
def entries(draw):
    state = draw(st.sampled_from(STATES))
    value = KNOWN if state in COUNTED else NUMBER
    told = st.builds(Told, value, value, value, NUMBER)
    metric = draw(st.sampled_from([metric.name for metrics in METRICS.values() for metric in metrics]))
    texts = {field.name: draw(NASTY) for field in dataclasses.fields(Entry) if field.type is str}
    return Entry(
        **{**texts, "metric": metric},
        rows=draw(COUNT),
        known_rows=draw(COUNT),
        spend=draw(NUMBER),
        main=draw(told),
        eval_loss=draw(told),
        state=state,
    )


@given(entries())
def test_a_line_comes_back(entry):
    assert entry_from(cells_of(entry)) == entry


@given(st.lists(entries(), max_size=4))
def test_a_file_gives_back_its_lines_each_on_one(tmp_path_factory, given_entries):
    path = tmp_path_factory.mktemp("ledger") / "ledger.csv"
    unlike = {entry.key: entry for entry in given_entries}
    assert append(given_entries, path) == len(unlike)
    assert read_ledger(path) == tuple(unlike.values())
    if unlike:
        text = path.read_bytes().decode("utf-8")
        assert len(text.split("\n")) == len(unlike) + 2  # the header, and nothing after the last
        assert printable(text, keep="\n") == text  # safe for a terminal


def test_formulas_are_none_in_a_spreadsheet():
    cells = cells_of(line(model="=HYPERLINK(1)", dataset="-0.5"))
    assert (cells["model"], cells["dataset"]) == ("'=HYPERLINK(1)", "-0.5")


def test_the_columns_are_all_that_a_line_says():
    assert tuple(cells_of(LINE)) == COLUMNS
    assert cells_of(LINE)["eval_loss_real"] == "0.4"
    assert cells_of(LINE)["spend"] == "0.02"


@pytest.mark.parametrize(
    ("column", "cell"),
    [("state", "fine"), ("metric", "luck"), ("low", "x"), ("real", "nan"), ("high", "inf"), ("rows", "1.5"),
     ("forecast", ""), ("eval_loss_low", "")],
)  # fmt: skip
def test_a_cell_that_no_line_holds_is_refused(column, cell):
    with pytest.raises(ValueError, match=r"."):
        entry_from({**cells_of(LINE), column: cell})
