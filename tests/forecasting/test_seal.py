"""The hash of a forecast stands for what it says, and for nothing else."""

import copy
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.forecasting.seal import content_hash, is_unaltered

SAID = {
    "made": "2026-03-01T12:00:00+00:00",
    "weights": "0123456789abc",
    "end": {"accuracy": {"value": 0.1 + 0.2, "low": 1e-17, "high": None}},
    "details": {"data": {"fingerprint": "f"}},
    "settings": {"epochs": 3, "learning_rate": 4e-4, "text_column": ["ä", "b"]},
    "trials": [{"rows": 64, "seconds": 1.5}],
}
SEALED = {**SAID, "hash": content_hash(SAID)}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def test_it_is_a_sha256_that_anybody_can_take():
    said = copy.deepcopy(SAID)
    del said["trials"][0]["seconds"]
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    assert content_hash(SAID) == hashlib.sha256(text.encode()).hexdigest()


@given(st.dictionaries(st.text(), VALUES))
def test_it_outlives_the_file(content):
    content.pop("hash", None)
    written = json.loads(json.dumps({**content, "hash": content_hash(content)}, ensure_ascii=True))
    assert is_unaltered(dict(reversed(written.items())))


def test_how_it_was_computed_does_not_count():
    later = {**copy.deepcopy(SEALED), "seconds": {"total": 9.0}, "versions": {"python": "3"}}
    later["trials"][0]["seconds"] = 2.5
    assert is_unaltered(later)


@pytest.mark.parametrize(
    "path",
    [("made",), ("weights",), ("end", "accuracy", "value"), ("details", "data", "fingerprint"), ("settings", "epochs"),
     ("trials", 0, "rows"), ("hash",)],
)  # fmt: skip
def test_whatever_is_changed_shows(path):
    assert is_unaltered(SEALED)
    for change in (lambda value: [value], lambda _: None, lambda _: float("nan")):
        content = copy.deepcopy(SEALED)
        place = content
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = change(place[path[-1]])
        assert not is_unaltered(content)


def test_what_is_added_or_taken_away_shows():
    assert not is_unaltered({**SEALED, "note": None})
    assert not is_unaltered({name: value for name, value in SEALED.items() if name != "made"})
    assert not is_unaltered(SAID)
