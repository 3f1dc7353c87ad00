"""The summary against sums that are written out."""

import math
from io import StringIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.ledger.entries import STATES, Told
from foretune.ledger.report import print_ledger
from foretune.ledger.summary import summarise_ledger
from foretune.report.terminal import Screen
from made_entries import LINE, line

SHARE = st.floats(0.01, 0.99)
TOLD = st.builds(Told, SHARE, SHARE, SHARE, st.none() | SHARE)
LINES = st.lists(
    st.builds(
        line,
        model=st.sampled_from("ab"),
        dataset=st.sampled_from("cd"),
        metric=st.sampled_from(["accuracy", "spearman"]),
        state=st.sampled_from(STATES),
        run=st.sampled_from("01234"),
        main=TOLD,
        eval_loss=TOLD,
    ),
    max_size=12,
)


def wilson(k, n, z=1.959963984540054):
    centre, half = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return centre - half, centre + half


def check(accuracy, told, *, relative):
    known = [one for one in told if one.real is not None]
    units = [one.real if relative else 1.0 for one in known]
    errors = [(one.forecast - one.real) / unit for one, unit in zip(known, units, strict=True)]
    widths = [(one.high - one.low) / unit for one, unit in zip(known, units, strict=True)]
    assert accuracy.known == len(known)
    for value, numbers in ((accuracy.error, [abs(e) for e in errors]), (accuracy.bias, errors),
                           (accuracy.width, widths)):  # fmt: skip
        assert value == (pytest.approx(sum(numbers) / len(numbers)) if numbers else None)
    assert accuracy.inside == sum(one.low <= one.real <= one.high for one in known)
    assert accuracy.covered == accuracy.inside / len(told)
    assert (accuracy.low, accuracy.high) == pytest.approx(wilson(accuracy.inside, len(told)), abs=1e-9)


@given(LINES)
def test_a_summary_is_that_of_its_lines(entries):
    summary = summarise_ledger(entries)
    chosen = {}
    for entry in entries:  # each run once: the first of a user's, the last of a study's
        if entry.state == "ok":
            chosen.setdefault(("ok", entry.run), entry)
        if entry.state == "held out":
            chosen[("held out", entry.run)] = entry
    lines = list(chosen.values())
    for groups in (summary.groups, summary.totals):
        assert sum(group.runs for group in groups) == len(lines)
    for group in (*summary.groups, *summary.totals):
        part = [
            entry
            for entry in lines
            if (entry.state, entry.metric) == (group.state, group.metric)
            and group.model in (None, entry.model)
            and group.dataset in (None, entry.dataset)
        ]
        assert group.runs == len(part)
        check(group.main, [entry.main for entry in part], relative=False)
        check(group.eval_loss, [entry.eval_loss for entry in part], relative=True)
    assert sum(summary.left_out.values()) + len(lines) == len(entries)
    assert set(summary.left_out) <= {"altered", "late", "other run", "withheld", "made again"}
    for state in ("altered", "late", "other run", "withheld"):
        assert summary.left_out.get(state, 0) == sum(entry.state == state for entry in entries)


def test_by_hand():
    inside, outside = line(), line(run="2", main=Told(0.6, 0.5, 0.7, 0.75), eval_loss=Told(0.5, 0.4, 0.6, None))
    (group,) = summarise_ledger([inside, outside, line(state="late", run="3")]).totals
    assert group.main.error == pytest.approx((0.05 + 0.15) / 2)
    assert group.main.bias == pytest.approx((-0.05 - 0.15) / 2)
    assert group.main.width == pytest.approx(0.2)
    assert (group.main.inside, group.main.covered) == (1, 0.5)
    assert (group.eval_loss.known, group.eval_loss.inside) == (1, 1)  # one that diverged is outside, and in no mean
    assert group.eval_loss.error == pytest.approx(0.25)
    assert np.isclose(group.eval_loss.width, 0.75 / 0.4)


def printed(entries):
    file = StringIO()
    print_ledger(Screen(file=file), summarise_ledger(entries))
    return " ".join(file.getvalue().split())


def test_it_is_printed_in_points_where_the_metric_is_a_share():
    other = line(run="2", dataset="e", metric="spearman", task="regression", eval_loss=Told(0.5, 0.4, 0.6, None))
    text = printed([LINE, other, line(state="altered", run="4"), line(hash="9")])
    for words in ("5.0 pts", "-5.0 pts", "20.0 pts", "-0.050", "Spearman", "25.0%", "100% [21%, 100%]", "all",
                  "not finite: 1", "1 forecast altered", "1 forecast of a run that counts already"):  # fmt: skip
        assert words in text, words
    assert "Held-out" not in text
    assert "Held-out" in printed([line(state="held out")])


@pytest.mark.parametrize(("real", "inside"), [(0.7, 1), (0.9, 1), (0.699, 0), (0.901, 0), (None, 0)])
def test_the_ends_are_inside(real, inside):
    (group,) = summarise_ledger([line(main=Told(0.8, 0.7, 0.9, real))]).totals
    assert group.main.inside == inside
