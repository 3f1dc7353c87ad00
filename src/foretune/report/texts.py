r"""Texts of others on their way out: what is printed, written into a table or drawn is data and never an instruction.

Names of files, columns, labels, models and data sets may hold anything: terminal escapes, rich's or LaTeX's markup,
formulas of spreadsheets. Each place that a text goes to has one function here.
"""

import re
import unicodedata

_KEPT = "\u200c\u200d"  # joiners that scripts and emoji need
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats such as bidirectional overrides, surrogates, separators
_NUMBER = r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?%?|[-+]?(?:inf|nan)"
# a number, alone or with its interval or spread, as the tables here write it
_NUMERIC = re.compile(rf"(?:{_NUMBER})(?: \[(?:no interval|(?:{_NUMBER}), (?:{_NUMBER}))\]| (?:…|±) (?:{_NUMBER}))?")
_FORMULA = re.compile(r"[\s']*[=+\-@＝＋－＠]|[\t\r\n]")
_MARKDOWN = re.compile(r"[\\`*<>|~$]|&(?=#?\w+;)|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def printable(text: str, *, keep: str = "") -> str:
    r"""Write out what a terminal would obey or hide.

    Args:
        text: Text.
        keep: Characters to leave, such as line breaks.

    Returns:
        The same with control characters, bidirectional overrides and lone surrogates as escapes.

    Example:
        >>> printable("red \x1b[31m")
        'red \\x1b[31m'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in _HIDDEN and character not in _KEPT and character not in keep
        else character
        for character in text
    )


def for_json(text: str, *, only_ascii: bool = False) -> str:
    r"""Write out the same characters within an encoded JSON text, so that it still reads as before.

    Args:
        text: JSON.
        only_ascii: Whether to write out all that is not ASCII.

    Returns:
        The same JSON, safe to print.

    Example:
        >>> for_json('"\u202e"')
        '"\\u202e"'
    """
    return "".join(
        "".join(f"\\u{unit:04x}" for unit in _units(character))
        if (only_ascii and not character.isascii())
        or (character != "\n" and unicodedata.category(character) in _HIDDEN)
        else character
        for character in text
    )


def _units(character: str) -> list[int]:
    code = character.encode("utf-16-be", errors="surrogatepass")
    return [int.from_bytes(code[index : index + 2]) for index in range(0, len(code), 2)]


def for_spreadsheet(text: str) -> str:
    """Write a cell of a CSV file that people open in a spreadsheet, where a text may be taken for a formula.

    Args:
        text: Number or text.

    Returns:
        Numbers as they are; a text that a program could take for a formula with an apostrophe before it.

    Example:
        >>> for_spreadsheet("=1+1"), for_spreadsheet("-0.5"), for_spreadsheet("+0.85 [+0.60, +0.95]")
        ("'=1+1", '-0.5', '+0.85 [+0.60, +0.95]')
    """
    return f"'{text}" if _FORMULA.match(text) and not _NUMERIC.fullmatch(text) else text


def from_spreadsheet(text: str) -> str:
    """Read such a cell back.

    Args:
        text: Cell.

    Returns:
        The text that was written.

    Example:
        >>> from_spreadsheet("'=1+1"), from_spreadsheet("'tis")
        ('=1+1', "'tis")
    """
    return text[1:] if text.startswith("'") and for_spreadsheet(text[1:]) == text else text


def for_markdown(text: str) -> str:
    r"""Write a text for a table or a caption in Markdown.

    Args:
        text: Text.

    Returns:
        One line in which nothing is markup.

    Example:
        >>> for_markdown("λ_max of *all* | <b>")
        'λ_max of \\*all\\* \\| &lt;b&gt;'
    """
    return _MARKDOWN.sub(lambda match: _ENTITIES.get(match[0], f"\\{match[0]}"), printable(text))


def for_figure(text: str) -> str:
    r"""Write a text for a title, a label or a legend of matplotlib.

    Args:
        text: Text.

    Returns:
        The same, in which `$` begins no formula and `_` does not keep it out of the legend; at most 80 characters.

    Example:
        >>> for_figure("$x$")
        '\\$x\\$'
    """
    shown = printable(text)
    shown = (shown if len(shown) <= 80 else f"{shown[:79]}…").replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
