"""Tables are read as they were written, whatever writes them, or refused in one line that helps."""

import csv
import gzip
import json

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from foretune.errors import DataError
from foretune.settings.groups import DataConfig
from foretune.tasks.load import load_task, task_from_datasets

ODD = [
    '"',
    "'",
    ",",
    ";",
    "|",
    "\t",
    "\n",
    "\r",
    "\r\n",
    "\\",
    "\0",
    "\x0b",
    "\x1c",
    "\x85",
    "\u2028",
    "\ufeff",
    "ü",
    "😀",
]
ODD += ["=1+1", "#", "null", "NA", "nan", "true", "007", "1e3", "-1", "{}", "[]", "a", "word", " ", "text", "label"]
TEXTS = st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=3)), min_size=1, max_size=6).map("".join)
TEXTS = TEXTS.filter(lambda text: text.strip() and not any("\ud800" <= c <= "\udfff" for c in text))
CLASSES = [("neg", "pos"), ("0", "1"), ("-1", "1"), ("true", "false"), ("NA", "null", "b"), ("1", "x"), ("a,b", 'c"d')]
TABLES = (
    st.sampled_from(CLASSES)
    .flatmap(lambda names: st.lists(st.tuples(TEXTS, st.sampled_from(names)), min_size=2, max_size=8))
    .filter(lambda rows: len({label for _, label in rows}) > 1)
)


def load(source, **options):
    return load_task(DataConfig(str(source), **options))


def read(source):
    """Texts and names of labels, row by row."""
    task = load(source)
    return [(text, task.label_names[label]) for text, label in zip(task.train.texts, task.train.labels, strict=True)]


def separated(path, rows, header=("text", "label"), encoding="utf-8", **options):
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file, **options).writerows([header, *rows] if header else rows)
    return path


def spelled(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def records(rows):
    return [{"text": text, "label": label} for text, label in rows]


def columns(rows):
    return {"text": [text for text, _ in rows], "label": [label for _, label in rows]}


WRITERS = {
    "csv": lambda folder, rows: separated(folder / "t.csv", rows),
    "quoted csv": lambda folder, rows: separated(folder / "q.csv", rows, quoting=csv.QUOTE_ALL),
    "unix csv": lambda folder, rows: separated(folder / "u.csv", rows, quoting=csv.QUOTE_ALL, lineterminator="\n"),
    "marked csv": lambda folder, rows: separated(folder / "m.csv", rows, encoding="utf-8-sig"),
    "wide csv": lambda folder, rows: separated(folder / "w.csv", rows, encoding="utf-16"),
    "semicolons": lambda folder, rows: separated(folder / "s.csv", rows, delimiter=";"),
    "pipes": lambda folder, rows: separated(folder / "p.csv", rows, delimiter="|"),
    "tsv": lambda folder, rows: separated(folder / "t.tsv", rows, delimiter="\t"),
    "quoted tsv": lambda folder, rows: separated(folder / "q.tsv", rows, delimiter="\t", quoting=csv.QUOTE_ALL),
    "jsonl": lambda folder, rows: spelled(folder / "t.jsonl", "\n".join(map(json.dumps, records(rows)))),
    "plain jsonl": lambda folder, rows: spelled(
        folder / "p.jsonl", "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records(rows)), "utf-8-sig"
    ),
    "json": lambda folder, rows: spelled(folder / "t.json", json.dumps(records(rows), indent=1)),
    "json data": lambda folder, rows: spelled(folder / "d.json", json.dumps({"version": "1", "data": records(rows)})),
    "json columns": lambda folder, rows: spelled(folder / "c.json", json.dumps(columns(rows))),
    "parquet": lambda folder, rows: pyarrow.parquet.write_table(pyarrow.table(columns(rows)), folder / "t.parquet"),
    "saved": lambda folder, rows: datasets.Dataset.from_dict(columns(rows)).save_to_disk(str(folder / "saved")),
}


@settings(deadline=None, max_examples=25)
@given(rows=TABLES)
@example(rows=[('"', "neg"), ('""', "pos"), ('"a"', "neg"), ('a"\t"', "pos")])
@example(rows=[("a\tb\nc", "0"), ("d", "1"), ("e", "0")])
@example(rows=[("a,b\nc", "0"), ("d", "1"), ("e", "0"), ("f", "1")])
@example(rows=[("42", "0"), ("true", "1"), ("null", "1")])
def test_every_writer_gives_the_same_rows(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    for name, write in WRITERS.items():
        path = write(folder, rows)
        path = {"parquet": folder / "t.parquet", "saved": folder / "saved"}.get(name, path)
        assert read(path) == [(text, label.strip()) for text, label in rows], name


@pytest.mark.parametrize("number", ["42", "1.10", "1e3", "-0", "12345678901234567890123"])
@pytest.mark.parametrize("shape", ["lines", "list", "columns"])
def test_a_number_among_the_texts_of_json_is_the_text_that_spells_it(tmp_path, number, shape):
    content = {
        "lines": '{"text": "a", "label": 0}\n{"text": %s, "label": 1}\n{"text": "c d", "label": 1}\n',
        "list": '[{"text": "a", "label": 0}, {"text": %s, "label": 1}, {"text": "c d", "label": 1}]',
        "columns": '{"text": ["a", %s, "c d"], "label": [0, 1, 1]}',
    }[shape]
    assert read(spelled(tmp_path / "train.jsonl", content % number)) == [("a", "0"), (number, "1"), ("c d", "1")]


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("true", "bool"),
        ("null", "empty text"),
        ("{}", "dict"),
        ('{"a": 1}', "dict"),
        ('["a"]', "list"),
        ("Infinity", "float"),
        ("NaN", "empty text"),
        ('"\\ud800"', "surrogate"),
        ('" "', "empty text"),
    ],
)
def test_what_is_no_text_is_named_by_file_column_and_row(tmp_path, suffix, value, word):
    lines = ['{"text": "a", "label": 0}', f'{{"text": {value}, "label": 1}}', '{"text": "c", "label": 1}']
    content = "\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]"
    with pytest.raises(DataError, match=word) as error:
        load(spelled(tmp_path / f"train.{suffix}", content))
    assert all(word in str(error.value) for word in (f"train.{suffix}", "'text'", "row 1"))


def test_rows_are_named_in_their_own_file(tmp_path):
    spelled(tmp_path / "train_0.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "label": 1}')
    spelled(tmp_path / "train_1.jsonl", '{"text": "c", "label": 0}\n{"text": null, "label": 1}')
    with pytest.raises(DataError, match=r"row 1 of train_1.jsonl"):
        load(tmp_path)
    spelled(tmp_path / "train_1.jsonl", '{"text": "c", "label": 0}\n{"text": "d", "label": null}')
    with pytest.raises(DataError, match=r"label in row 1 of column 'label' of split 'train' \(train_1.jsonl\) is miss"):
        load(tmp_path)


def test_records_need_not_name_every_column(tmp_path):
    lines = ['{"text": "a", "label": "x", "id": 1}', "", '{"label": "y", "text": "b", "more": {"deep": [1]}}']
    assert read(spelled(tmp_path / "train.jsonl", "\r\n".join(lines), "utf-8-sig")) == [("a", "x"), ("b", "y")]
    lines.append('{"text": "c", "lable": "x"}')
    with pytest.raises(DataError, match=r"label in row 2 .*missing"):
        load(spelled(tmp_path / "train.jsonl", "\n".join(lines)))


GOOD = '{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n'
LIST = json.dumps([{"text": "a", "label": 0}, {"text": "b", "label": 1}])
JSON_FAULTS = [
    ("null", "holds null"),
    ("[]", "no rows"),
    ("[null]", "row 0 .* null"),
    ("{}", "no columns"),
    ("42", "bare value"),
    ('"text"', "value"),
    ("true", "boolean"),
    ("[[1, 2], [3, 4]]", "row 0 .*list"),
    (LIST[:-1] + ", null]", "row 2 .*null"),
    (LIST[:-9], "cut|no JSON"),
    (LIST + "]", "no JSON|record"),
    (GOOD + "null\n", "line 3 .*null"),
    (GOOD + "[1]\n", "line 3 .*list"),
    (GOOD + '{"text": "c"', "line 3.*cut"),
    (GOOD + '{"text": "c", "label": 1}{"text": "d", "label": 1}', "line 3"),
    (GOOD.replace('"', "'"), "line 1.*double quotes"),
    (GOOD + "{'text': 'c', 'label': 1}\n", "line 3.*double quotes"),
    ('{"text": "a", "label": 0, "label": 1}\n' + GOOD, "line 1.*'label' stands twice"),
    ('{"text": ["a", "b"], "label": [0]}', "2 and 1 values"),
    ('{"train": %s, "test": %s}' % (LIST, LIST), "several lists"),  # noqa: UP031
    ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    ('{"text": "a", "label": 0}\n{"text": ' + "[" * 100_000, "nested too deeply|no JSON"),
]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize(("content", "message"), JSON_FAULTS, ids=range(len(JSON_FAULTS)))
def test_faulty_json_files(tmp_path, suffix, content, message):
    path = spelled(tmp_path / f"train.{suffix}", content)
    with pytest.raises(DataError, match=message) as error:
        load(path)
    check_message(error, path)


def check_message(error, path):
    message = str(error.value)
    assert path.name in message
    assert len(message) < 300 + len(str(path))
    assert message.isprintable()


RAW = st.lists(st.sampled_from(['"', '""', "a", " ", ",", "b c"]), min_size=1, max_size=5).map("".join)
RAW = RAW.filter(lambda text: text.strip() and text.strip('"'))


@settings(deadline=None, max_examples=100)
@given(st.lists(RAW, min_size=6, max_size=20))
@example(['"open', "b", 'close"', "d", "e", "f"])
@example(['"all"', '"of"', '"them"', '"are"', '"in"', '"quotes"'])
def test_stray_quotes_cost_a_tsv_file_no_row(tmp_path_factory, texts):
    rows = [(text, "ab"[index % 2]) for index, text in enumerate(texts)]
    lines = ["text\tlabel", *("\t".join(row) for row in rows)]
    path = spelled(tmp_path_factory.mktemp("raw") / "train.tsv", "\n".join(lines) + "\n")
    try:
        held = read(path)
    except DataError as error:
        assert "whether quotes belong to the texts" in str(error)  # noqa: PT017
        return
    assert [label for _, label in held] == [label for _, label in rows]
    if any(len(text) < 2 or text[0] != '"' or text[-1] != '"' for text in texts if '"' in text):
        assert [text for text, _ in held] == texts


@settings(deadline=None, max_examples=100)
@given(st.lists(RAW.map(lambda text: text.replace(",", ".")), min_size=6, max_size=20), st.sampled_from(",;|"))
@example(['"open', "b", 'close"', "d", "e", "f"], ",")
@example(["a", '"b', "c", '"d"', "e", 'f"'], ";")
def test_stray_quotes_never_swallow_rows_in_silence(tmp_path_factory, texts, separator):
    lines = [f"text{separator}label", *(f"{text}{separator}{index % 2}" for index, text in enumerate(texts))]
    path = spelled(tmp_path_factory.mktemp("raw") / "train.csv", "\n".join(lines) + "\n")
    try:
        held = read(path)
    except DataError as error:
        assert "row " in str(error)  # noqa: PT017
        return
    assert [label for _, label in held] == [str(index % 2) for index in range(len(texts))]


def test_glue_as_it_was_published(tmp_path):
    rows = [
        ('"Who said that?', "0"),
        ('he said "no" twice', "1"),
        ('a " and a \\" b', "0"),
        ('that is it"', "1"),
        ('"Well", he said', "0"),
        ('"""', "1"),
    ]
    content = "index\tsentence\tlabel\n" + "".join(f"{i}\t{text}\t{label}\n" for i, (text, label) in enumerate(rows))
    assert read(spelled(tmp_path / "train.tsv", content)) == rows
    assert read(spelled(tmp_path / "train.csv", content)) == rows


def test_quotes_around_some_cells_of_a_column_in_a_tsv_file(tmp_path):
    content = 'text\tlabel\n"a b"\t0\n"c d"\t1\n"e"\t0\nf\t1\n'
    with pytest.raises(DataError, match=r"whether quotes belong to the texts of .*row 0"):
        load(spelled(tmp_path / "train.tsv", content))
    content = 'text\tlabel\n"a b"\t0\nc d\t1\ne\t0\nf\t1\n'
    assert read(spelled(tmp_path / "train.tsv", content))[0] == ('"a b"', "0")
    assert read(spelled(tmp_path / "train.csv", content.replace("\t", ",")))[0] == ("a b", "0")


READABLE = [
    ("text;label\na,b;x\nc;y\n", [("a,b", "x"), ("c", "y")]),
    ("text|label\na|x\nb;c|y\n", [("a", "x"), ("b;c", "y")]),
    ("text\tlabel\na,b\tx\nc\ty\n", [("a,b", "x"), ("c", "y")]),
    ("sep=;\ntext;label\na,b;x\nc;y\n", [("a,b", "x"), ("c", "y")]),
    ('sep=,\r\ntext,label\r\n"a,b",x\r\nc,y\r\n', [("a,b", "x"), ("c", "y")]),
    ('text, label\n"a, b", x\nc, y\n', [("a, b", "x"), ("c", "y")]),
    ('label, text\nx, "a, b"\ny,c\n', [("a, b", "x"), ("c", "y")]),
    ("text,label\na,x,\nb,y,\n", [("a", "x"), ("b", "y")]),
    ("text,label,,\na,x,,\nb,y,,\n", [("a", "x"), ("b", "y")]),
    ("text,label,\na,x\nb,y\n", [("a", "x"), ("b", "y")]),
    ("\n\ntext,label\n\na,x\n   \nb,y\n\n", [("a", "x"), ("b", "y")]),
    ("text,label\ra,x\rb,y\r", [("a", "x"), ("b", "y")]),
    ("text,label\na\0b,x\nc,y\n", [("a\0b", "x"), ("c", "y")]),
    ('text,label\n5" nails,x\nsay "no",y\n', [('5" nails', "x"), ('say "no"', "y")]),
    ("text,label\n" + "w " * 200_000 + "a,x\nb,y\n", [("w " * 200_000 + "a", "x"), ("b", "y")]),
    ("text,label\n=1+1,x\n@b,y\n", [("=1+1", "x"), ("@b", "y")]),
]


@pytest.mark.parametrize(("content", "rows"), READABLE, ids=range(len(READABLE)))
def test_dialects_that_leave_no_doubt(tmp_path, content, rows):
    assert read(spelled(tmp_path / "train.csv", content)) == rows


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
def test_encodings_with_a_mark(tmp_path, encoding, suffix):
    rows = [("ünï 😀", "é"), ("b", "y")]
    path = tmp_path / f"train.{suffix}"
    if suffix in ("csv", "tsv"):
        separated(path, rows, encoding=encoding, delimiter="," if suffix == "csv" else "\t")
    else:
        spelled(path, json.dumps(records(rows), ensure_ascii=False), encoding)
    assert read(path) == rows


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_compressed_files(tmp_path, suffix):
    rows = [("a", "x"), ("b", "y")]
    text = "\n".join(map(json.dumps, records(rows))) if suffix == "jsonl" else "text\tlabel\na\tx\nb\ty\n"
    packed = gzip.compress(text.encode())
    spelled(tmp_path / "set" / f"train.{suffix}.gz", packed)
    assert read(tmp_path / "set") == rows == read(tmp_path / "set" / f"train.{suffix}.gz")
    assert read(spelled(tmp_path / f"train.{suffix}", packed)) == rows
    for broken in (packed[:-12], packed[:-4] + b"1234", packed[:20]):
        with pytest.raises(DataError, match="cut or damaged"):
            load(spelled(tmp_path / f"train.{suffix}", broken))


CSV_FAULTS = [
    ("", "no rows.*empty"),
    ("  \n\t\n", "no rows.*blanks"),
    ("\ufeff", "no rows"),
    ("text,label\n", "no rows.*header alone"),
    ("text,label", "no rows.*header alone"),
    ("text,label\na,x\nb\n", r"row 1 .*line 3\) has 1 cell for 2 columns"),
    ("text,label\na,x\nb,c,y\n", r"row 1 .*line 3\) has 3 cells for 2 columns, separated by comma.*quotes"),
    ("text;label\na;x\nb;c;y\n", r"row 1 .*line 3\) has 3 cells for 2 columns, separated by semicolon"),
    ("text\tlabel\na\tx\nb\tc\ty\n", r"row 1 .*line 3\) has 3 cells for 2 columns, separated by tab"),
    ('text,label\n"a\nb",x\n\nc\n', r"row 1 .*line 5\) has 1 cell"),
    ("text,label\na,x,\nb,y,z\n", r"row 0 .*line 2\) has 3 cells"),
    ("text,label,text\na,x,b\nc,y,d\n", "two columns 'text': rename one"),
    ("1,1,a\n2,0,b\n", "two columns '1'.*header"),
    ("text;a|label\nb;c|x\n", "no comma in its first line, but semicolon, pipe"),
    ('text,label\n"a,x\nb,y\n', r"row 0 .*line 2\) opens a quote that nothing closes"),
    ('text,label\na,x\n"b" c,y\n', r"row 1 .*line 3\) goes on behind a closing quote"),
    ('text,label\na,x\n"b \\"c\\" d",y\n', r"row 1 .*line 3\).*a backslash does nothing"),
    ("text,label\na,x\ncafé,y\n".encode("latin-1"), "line 3.*looks like latin-1.*save it as UTF-8"),
    ("text,label\na,x\n“b”,y\n".encode("cp1252"), "line 3.*looks like cp1252.*save it as UTF-8"),
    ("text,label\n这是一个很好的电影,正面\n不好看,负面\n".encode("gb18030"), "not UTF-8.*save it as UTF-8.*GB18030"),
    ("text,label\na,x\nb,y\n".encode("utf-16-le"), "UTF-16LE without a byte order mark.*UTF-16LE -t UTF-8"),
    ("text,label\na,x\nb,y\n".encode("utf-16-be"), "UTF-16BE without a byte order mark.*UTF-16BE -t UTF-8"),
    ("text,label\na,x\nb,y\n".encode("utf-16")[:-1], "cut or damaged"),
    ("text,label\na,x\nb,é".encode()[:-1], "cut in the middle of a character"),
    ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer.*git lfs pull"),
    (b"PK\x03\x04rest", "zip archive or an Excel workbook.*CSV UTF-8"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Excel workbook"),
    (b"PAR1rest", "parquet file.*.parquet"),
    (b"SQLite format 3\0", "SQLite"),
    (b"\n<!DOCTYPE html><html></html>", "web page"),
    (bytes(range(256)) * 8, "not UTF-8"),
    (b"\0" * 100, "no rows"),
]


@pytest.mark.parametrize(("content", "message"), CSV_FAULTS, ids=range(len(CSV_FAULTS)))
def test_faulty_csv_files(tmp_path, content, message):
    path = spelled(tmp_path / "train.csv", content)
    with pytest.raises(DataError, match=message) as error:
        load(path)
    check_message(error, path)


NO_TEXT = [content for content, _ in CSV_FAULTS if isinstance(content, bytes)] + ["", "version https://git-lfs.github"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "tsv", "parquet"])
@pytest.mark.parametrize("content", NO_TEXT, ids=range(len(NO_TEXT)))
def test_files_of_another_kind(tmp_path, suffix, content):
    path = spelled(tmp_path / f"train.{suffix}", content)
    with pytest.raises(DataError) as error:
        load(path)
    check_message(error, path)


def test_files_without_header(tmp_path):
    rows = [(1, "Title of a film", "a good film"), (2, "Another film", "a bad film")]
    with pytest.raises(DataError, match=r"no label column .*first line \(header\) must name the columns"):
        load(separated(tmp_path / "a.csv", rows, header=None))
    rows = [("x", "a good film that is longer than a name"), ("y", "a bad film")]
    with pytest.raises(DataError, match=r"no label column .*first line \(header\) must name the columns"):
        load(separated(tmp_path / "b.tsv", rows, header=None, delimiter="\t"))
    with pytest.raises(DataError, match=r"it is the only one: separate columns by commas in .csv, by tabs in .tsv"):
        load(spelled(tmp_path / "c.csv", "text^label\na^x\n"))


@pytest.mark.parametrize("orient", ["records", "split", "index", "columns", "table"])
def test_json_as_pandas_writes_it(tmp_path, orient):
    rows = [("a", "x"), ("b\n", "y"), ("7", "x")]
    path = tmp_path / "train.json"
    pandas.DataFrame(rows, columns=["text", "label"]).to_json(path, orient=orient)
    assert read(path) == rows


@pytest.mark.timeout(120)  # what is quadratic in the columns takes longer
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_a_table_of_many_columns_is_read_in_time_and_listed_in_part(tmp_path, suffix):
    names = [f"feature_{index}" for index in range(3000)]
    rows = [[f"{index}" for index in range(3000)]] * 20
    path = tmp_path / f"train.{suffix}"
    separator = "\t" if suffix == "tsv" else ","

    def write(header):
        if suffix == "parquet":
            table = pyarrow.Table.from_arrays([pyarrow.array(column) for column in zip(*rows, strict=True)], header)
            pyarrow.parquet.write_table(table, path)
        elif suffix == "jsonl":
            spelled(path, "\n".join(json.dumps(dict(zip(header, row, strict=True))) for row in rows))
        else:
            separated(path, rows, header, delimiter=separator)

    write(names)
    with pytest.raises(DataError, match=r"no label column .* and 2,9\d\d more") as error:
        load(path)
    assert len(str(error.value)) < 300
    with pytest.raises(DataError, match=r"and 2,9\d\d more") as error:
        load(path, label_column="labels")
    assert len(str(error.value)) < 300
    rows = [[f"a {index}", str(index % 2), *row] for index, row in enumerate(rows)]
    write(["text", "label", *names])
    assert len(load(path).train.texts) == 20
    rows = [[str(index % 2), *row[2:]] for index, row in enumerate(rows)]
    write(["label", *names])
    with pytest.raises(DataError, match="no text column"):
        load(path)


@pytest.mark.timeout(120)  # what is quadratic in the columns takes longer
def test_a_data_set_of_many_columns_is_read_in_time():
    table = datasets.Dataset.from_dict({"label": [0, 1], **{f"feature_{index}": [1, 2] for index in range(3000)}})
    with pytest.raises(DataError, match=r"no text column .* and 2,9\d\d more"):
        task_from_datasets(table)


def test_names_and_values_in_messages_take_one_line(tmp_path):
    path = separated(tmp_path / "train.csv", [("a", "b")], header=["x\ny\x1b[31m" + "z" * 5000, "w\u202e" * 200])
    with pytest.raises(DataError) as error:
        load(path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300
    separated(tmp_path / "train.csv", [("a", "b"), ("b", "c")])
    separated(tmp_path / "test.csv", [("a", "b\n\x1b" * 5000)])
    with pytest.raises(DataError, match=r"label 'b.*is no class") as error:
        load(tmp_path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300
