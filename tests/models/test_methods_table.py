"""docs/methods.md says what the tests cover: its table is that of `methods.METHODS`."""

from pathlib import Path

import pytest

import families
import general_methods
import language_methods
import methods
from foretune.errors import PlacementError
from foretune.models.closed_forms import read_closed_forms
from foretune.models.placement import place

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
BEGIN, END = "<!-- methods -->\n", "<!-- /methods -->"
WORDS = {"fast", "general", "trials", "refused"}


def test_the_page_shows_the_table():
    """If this fails, put `methods.table()` between the two comments."""
    held = PAGE.read_text(encoding="utf-8")
    assert held[held.index(BEGIN) + len(BEGIN) : held.index(END)] == methods.table() + "\n"


def test_the_page_shows_the_general_way():
    """If this fails, put `general_methods.table()` between the two comments."""
    held = PAGE.read_text(encoding="utf-8")
    begin, end = "<!-- general -->\n", "<!-- /general -->"
    assert held[held.index(begin) + len(begin) : held.index(end)] == general_methods.table() + "\n"


def test_the_page_shows_the_general_way_of_language_models():
    """If this fails, put `language_methods.table()` between the two comments."""
    held = PAGE.read_text(encoding="utf-8")
    begin, end = "<!-- language -->\n", "<!-- /language -->"
    assert held[held.index(begin) + len(begin) : held.index(end)] == language_methods.table() + "\n"


def test_the_table_speaks_of_known_families_in_known_words():
    for row in methods.METHODS.values():
        assert {row.default, row.trained, *row.start.values()} <= WORDS
        assert row.start.keys() <= set(methods.FAMILIES)
        assert row.moved or row.trained != "fast"  # what is said of a trained adapter is tried on one


@pytest.mark.parametrize("family", methods.FAMILIES)
@pytest.mark.parametrize("method", methods.METHODS)
def test_every_cell_is_what_happens(method, family):
    row = methods.METHODS[method]
    if row.of(family) == "refused":
        with pytest.raises(PlacementError):
            place(families.build(family), row.config(family), seed=0)
        return
    placed = methods.placed(method, family)
    assert (read_closed_forms(placed, "default") is not None) == (row.of(family) == "fast")
    away = methods.moved(method, placed)
    if row.moved:
        assert (read_closed_forms(away, "default") is not None) == (row.trained == "fast")
