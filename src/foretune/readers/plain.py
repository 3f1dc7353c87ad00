"""Text files: what is none is named, and the encoding is known or asked for."""

import codecs
import gzip
import re
import zlib
from pathlib import Path

from foretune.errors import DataError, border
from foretune.readers.table import named

# Bytes that a file of another kind begins with, what it is and what to do.
_KINDS = (
    (b"version https://git-lfs.github.com", "a git-lfs pointer, not the data: run `git lfs pull`"),
    (b"PK\x03\x04", "a zip archive or an Excel workbook: unpack it, or save the sheet as CSV UTF-8"),
    (b"\xd0\xcf\x11\xe0", "an Excel workbook: save the sheet as CSV UTF-8"),
    (b"PAR1", "a parquet file: let its name end in .parquet"),
    (b"ARROW1", "an arrow file: save it as parquet, or give the folder that save_to_disk wrote"),
    (b"\xff\xff\xff\xff", "an arrow stream: save it as parquet, or give the folder that save_to_disk wrote"),
    (b"BZh", "compressed with bzip2: unpack it with bunzip2"),
    (b"\xfd7zXZ", "compressed with xz: unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it with unzstd"),
    (b"7z\xbc\xaf", "a 7-Zip archive: unpack it"),
    (b"SQLite format 3", "an SQLite data base: export the table as csv"),
    (b"%PDF", "a PDF: save the table as csv"),
    (b"\x80\x04\x95", "a Python pickle: save the table as csv"),
)
_PAGE = re.compile(rb"\s*<(!doctype\s+html|html)\b", re.IGNORECASE)
# UTF-32 before UTF-16, whose mark is the beginning of its own.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CONTENT = re.compile(rb"[^ \t\r\n\0]")
_C1 = re.compile(rb"[\x80-\x9f]")


def check_kind(path: Path, head: bytes) -> None:
    """Refuse a file that is no table, whatever its name says.

    Args:
        path: File, for messages.
        head: Its first bytes.

    Raises:
        DataError: Saying what it is.
    """
    for start, kind in _KINDS:
        if head.startswith(start):
            raise DataError(f"{named(path)} is {kind}")
    if _PAGE.match(head):
        raise DataError(f"{named(path)} is a web page, not the data: download the file itself")


def read_plain(path: Path) -> str:
    """Read a text file: UTF-8, or UTF-16 and UTF-32 with a byte order mark, also compressed with gzip.

    Args:
        path: File.

    Returns:
        Its text, line ends as they are.

    Raises:
        DataError: If it cannot be read, is empty, or is in another encoding.
    """
    with border(DataError, f"cannot read {named(path)}"):
        raw = path.read_bytes()
    if raw.startswith(b"\x1f\x8b"):
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{named(path)} is cut or damaged (gzip): fetch it again") from error
    if _CONTENT.search(raw) is None:
        state = "only blanks" if raw else "empty"
        raise DataError(f"file {named(path)} has no rows: it is {state}")
    mark, encoding = next(((mark, name) for mark, name in _MARKS if raw.startswith(mark)), (b"", "utf-8"))
    if not mark:
        check_kind(path, raw[:256])
        _check_wide(path, raw[:4096])
    try:
        text = raw[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(_encoding(path, raw[len(mark) :], error)) from error
    if not text or text.isspace():
        raise DataError(f"file {named(path)} has no rows: it is only blanks")
    return text


def _check_wide(path: Path, head: bytes) -> None:
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) > 3 / 8 * len(head) and min(even, odd) < len(head) / 20:
        guess = "UTF-16LE" if odd > even else "UTF-16BE"
        raise DataError(
            f"{named(path)} is not UTF-8, it looks like {guess} without a byte order mark: save it as UTF-8 "
            f"(iconv -f {guess} -t UTF-8)"
        )


def _encoding(path: Path, raw: bytes, error: UnicodeDecodeError) -> str:
    line = raw.count(b"\n", 0, error.start) + 1
    if error.encoding != "utf-8":
        return f"{named(path)} is cut or damaged ({error.encoding}, line {line}): fetch it again"
    if error.reason == "unexpected end of data":
        return f"{named(path)} is cut in the middle of a character (line {line}): fetch it again"
    high = sum(byte > 127 for byte in raw[:65536])
    letters = sum(chr(byte).isalpha() for byte in raw[:65536] if byte < 128)
    where = f"byte 0x{raw[error.start]:02x} in line {line}"
    if high > letters:
        return (
            f"{named(path)} is not UTF-8 ({where}): save it as UTF-8 from its own encoding (such as GB18030 or cp1251)"
        )
    guess = "cp1252" if _C1.search(raw) else "latin-1 or cp1252"
    return f"{named(path)} is not UTF-8 ({where}), it looks like {guess}: save it as UTF-8 (iconv -f cp1252 -t UTF-8)"
