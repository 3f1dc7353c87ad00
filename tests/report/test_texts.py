"""What is printed, written into tables or drawn is data."""

import csv
import io
import json
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from foretune.report.drawing import save_drawing
from foretune.report.tables import Table
from foretune.report.terminal import Screen, print_facts, print_json, progress
from foretune.report.texts import for_figure, for_json, for_markdown, for_spreadsheet, from_spreadsheet, printable

HOSTILE = [
    "[/a]x",
    "[bold red]x[/]",
    "[link=http://x]y[/link]",
    ":smile:",
    "\x1b[31mred",
    "\x1b]0;title\x07",
    "\x9b31m",
    "a\rb",
    "a\nb",
    "a\tb",
    "\x00",
    "\u202egpj.exe",
    "\u2066x\u2069",
    "\u2028x",
    "\udc80",
    "\ufeffx",
]
CONTROLS = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def is_harmless(text: str) -> bool:
    return not any(unicodedata.category(c) in CONTROLS and c not in "\n\u200c\u200d" for c in text)


@given(st.text(st.characters(codec=None), max_size=20))
def test_printable_leaves_no_controls(text):
    assert is_harmless(printable(text))
    assert "\n" not in printable(text)
    assert printable(printable(text)) == printable(text)


@pytest.mark.parametrize("text", ["größe", "κ λ_max ± …", "数据", "न्यूरॉन", "👩‍🔬"])
def test_other_scripts_stay_as_they_are(text):
    assert printable(text) == text


@given(
    st.dictionaries(st.text(max_size=5), st.text(st.characters(codec="utf-8"), max_size=10), max_size=3), st.booleans()
)
def test_json_reads_the_same_and_holds_no_controls(value, only_ascii):
    shown = for_json(json.dumps(value, ensure_ascii=False, indent=1), only_ascii=only_ascii)
    assert json.loads(shown) == value
    assert is_harmless(shown)
    assert shown.isascii() or not only_ascii


def test_progress_leaves_nothing_in_a_file():
    file = io.StringIO()
    with progress(Screen(file=file), "steps", 3) as update:
        update(advance=1, note="x")
    assert file.getvalue() == ""


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("terminal", [False, True])
def test_everything_that_is_printed_is_data(text, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    file = io.StringIO()
    screen = Screen(file=file, width=60)
    screen._force_terminal = terminal
    screen.is_interactive = terminal
    screen.print(f"saved to {text}", style="red")
    print_facts(screen, [("model", text), (text, "x")])
    Table(f"caption {text}", (text, "b"), ((text, text),)).show(screen)
    with progress(screen, f"of {text}", 3) as update, screen.status("loading"):
        update(completed=1, note=text)
    printed = file.getvalue()
    dropped = printable(text.translate(dict.fromkeys(map(ord, "\a\b\v\f\r"))), keep="\n\t")  # by rich itself
    assert f"saved to {dropped}".expandtabs() in printed
    for sequence in ("\x1b[31m", "\x1b]", "\x9b", "\x07", "\u202e", "\u2066", "\udc80"):
        if not (terminal and sequence == "\x1b[31m"):  # the style's own
            assert sequence not in printed


def test_json_on_a_stream_that_has_no_greek(monkeypatch, capsys):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    print_json('{"κ": "\u202e"}')
    stream.flush()
    assert json.loads(stream.buffer.getvalue()) == {"κ": "\u202e"}


FORMULAS = ["=cmd|' /C calc'!A0", "+1+cmd", "-1+cmd", "-2+3", "@SUM(A1)", "\t=1", "\r=1", " =1", "＝1", "'=1", "=1 [x]"]
NUMBERS = ["-0.5", "+1", "1e-5", "-1,000", "-inf", "+0.85 [+0.60, +0.95]", "-0.12 … 0.40", "-1.5 ± 0.2", "12%", "–", ""]


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_of_a_csv_file_is_a_formula(text, tmp_path):
    Table("", (text, "n"), ((text, "-0.5"),)).write_csv(tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        for cells in csv.reader(file):
            assert cells[0].startswith("'") or "\\" in cells[0][:1]
            assert cells[1] in ("n", "-0.5")
    assert from_spreadsheet(for_spreadsheet(text)) == text


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_stay_numbers(text):
    assert for_spreadsheet(text) == text


@given(st.text(max_size=10) | st.sampled_from(FORMULAS))
def test_a_cell_is_read_back_as_it_was(text):
    assert from_spreadsheet(for_spreadsheet(text)) == text


SPECIAL = "_ & % # $ { } ~ ^ \\ | * < > [a](http://b) ![c](d) <script>x</script> `e` _f_ **g** &amp; $h$"


def test_names_are_no_markup_in_markdown():
    lines = Table("", (SPECIAL, "x"), ((f"a\n{SPECIAL}", "1"),)).markdown().strip().split("\n")
    assert len(lines) == 3
    for line in lines:
        assert line.replace("\\|", "").count("|") == 3  # two columns, whatever the names hold
    for raw in ("<script>", " `e`", " _f_", "**g**", " $h$"):
        assert raw not in lines[2]
    assert "&amp;amp;" in lines[2]
    assert not re.search(r"(?<!\\)\]\(", lines[2])  # no link
    assert for_markdown("λ_max of a_b & c") == "λ_max of a_b & c"


def test_names_are_no_commands_in_latex():
    text = Table(SPECIAL, ("a", "b"), ((SPECIAL, "1"), ("[1]", "*"), ("a\nb", "2"))).latex()
    rows = text.split("\\midrule\n")[1].split("\n\\bottomrule")[0].split("\n")
    assert len(rows) == 3
    assert rows[1].startswith("{}[")  # \\[1] would be a length
    free = rows[0].replace("\\&", "")
    assert free.count("&") == 1
    for special in "_%#$":
        assert free.count(special) == free.count(f"\\{special}")
    for command in ("textbackslash{}", "textasciitilde{}", "textasciicircum{}", "textbar{}", "textless{}"):
        assert f"\\{command}" in free


def drawn(path, name):
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 10], [1, 2], label=for_figure(name))
    axes.set(title=for_figure(name), xscale="log")
    axes.set_xticks([1], [for_figure(name)])
    axes.legend()
    save_drawing(figure, path)
    return axes.get_legend().get_texts()


@pytest.mark.parametrize("name", ["$x$", "$\\frac$", "$a$ $b", "_hidden", "a\nb", "数据", "x" * 5000, *HOSTILE])
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_names_are_no_formulas_in_figures(name, suffix, tmp_path):
    texts = drawn(tmp_path / f"a.{suffix}", name)
    assert len(texts) == 1  # no name keeps a line out of the legend
    assert (tmp_path / f"a.{suffix}").stat().st_size > 0


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_two_drawings_of_the_same_numbers_are_the_same_bytes(suffix, tmp_path):
    for name in "ab":
        drawn(tmp_path / f"{name}.{suffix}", "x")
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
