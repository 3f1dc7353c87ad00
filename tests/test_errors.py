"""The border: what the outside raises becomes one line; YAML of others is read with care."""

import pytest

from foretune.errors import ConfigError, DataError, border, reason
from foretune.report.store import read_yaml


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyError("x"), RecursionError("deep"), MemoryError()]
)
def test_what_the_outside_raises_becomes_one_line(error):
    with (
        pytest.raises(DataError, match=r"^cannot read 'x\.csv': .+; fetch it again$") as caught,
        border(DataError, "cannot read 'x.csv'", remedy="fetch it again"),
    ):
        raise error
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_errors_of_ours_and_interrupts_pass_the_border():
    with pytest.raises(ConfigError, match=r"^as it is$"), border(DataError, "cannot read"):
        raise ConfigError("as it is")
    with pytest.raises(KeyboardInterrupt), border(DataError, "cannot read"):
        raise KeyboardInterrupt


def test_a_reason_is_short_and_names_the_innermost_cause():
    try:
        try:
            raise ValueError("a\n" * 20_000)
        except ValueError as inner:
            raise RuntimeError("outer") from inner
    except RuntimeError as error:
        words = reason(error)
    assert words.startswith("a a a")
    assert len(words) <= 300


def test_yaml_keeps_aliases_and_refuses_a_bomb_of_them(tmp_path):
    fine = tmp_path / "fine.yaml"
    fine.write_text("a: &x {b: 1}\nc: *x\n", encoding="utf-8")
    assert read_yaml(fine) == {"a": {"b": 1}, "c": {"b": 1}}
    bomb = tmp_path / "bomb.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    bomb.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bomb\.yaml.*aliases stand for more than 100,000"):
        read_yaml(bomb, kind=ConfigError)
    endless = tmp_path / "endless.yaml"
    endless.write_text("a: &a [*a]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="aliases"):
        read_yaml(endless, kind=ConfigError)


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"!!python/object/apply:os.system [true]"])
def test_what_is_no_yaml_is_named(tmp_path, content):
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^cannot read '.*x\.yaml': .+"):
        read_yaml(path, kind=ConfigError)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        read_yaml(tmp_path / "none.yaml", kind=ConfigError)
