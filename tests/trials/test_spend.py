"""Spends are shares of one run; passes count what they say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.errors import ConfigError
from foretune.settings.groups import Recipe
from foretune.settings.spend import parse_spend
from foretune.trials.spend import percent, run_passes, whole_run


@pytest.mark.parametrize(
    ("text", "share"),
    [("2%", 0.02), ("0.02", 0.02), ("0", 0.0), ("5 %", 0.05), (" 0.5% ", 0.005), ("100%", 1.0), ("1", 1.0),
     ("1e-2", 0.01), (".5", 0.5), ("0%", 0.0)],
)  # fmt: skip
def test_shares_are_read(text, share):
    assert parse_spend(text) == pytest.approx(share, rel=1e-15)


@pytest.mark.parametrize(
    "text",
    ["-1%", "-0.02", "101%", "1.01", "2", "nan", "inf", "NaN%", "all", "2%%", "%", "", " ", "2 runs", "1e99", "٢%",
     "0x1", "1_0", "9" * 400],
)  # fmt: skip
def test_everything_else_is_refused(text):
    with pytest.raises(ConfigError, match=r"^spend = .*: .*(share|100%)") as caught:
        parse_spend(text)
    assert len(str(caught.value)) < 200


@given(st.text(max_size=12))
def test_any_text_is_a_share_or_refused(text):
    try:
        share = parse_spend(text)
    except ConfigError:
        return
    assert 0 <= share <= 1


def test_passes():
    assert run_passes(100, 3, 30, 2) == 320  # 300 trained, 60 evaluated
    assert whole_run([Recipe(epochs=3), Recipe(epochs=5)], 1000) == 5000


def test_shares_are_written():
    assert [percent(share) for share in (0.004, 0.0131, 0.2, 1.0)] == ["0.4%", "1.3%", "20%", "100%"]
