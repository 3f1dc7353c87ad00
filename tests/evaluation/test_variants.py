"""Simulations of a cell from other numbers of known rows: written, read again from the store and from the tables."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import stored
from foretune.errors import StoreError
from foretune.evaluation.records import read_records, record_writers
from foretune.evaluation.variants import NUMBERS, VARIANTS_CSV, variants_from, variants_table
from foretune.study.cell import USUAL_SAMPLES, simulation_file


def write(store, key, samples, **content):
    path = simulation_file(store, key, samples)
    path.parent.mkdir(exist_ok=True)
    quantities = {"simulated_accuracy": samples / 1000, "doublings": 0.5, "run_known_rows": samples, "log_me": 0.25}
    said = {"schema": 3, "key": key, "train_rows": 2, "quantities": quantities, "seconds": {"survey": samples}}
    path.write_text(json.dumps(said | content), encoding="utf-8")
    return path


@pytest.fixture
def store(tmp_path):
    for index, key in enumerate(stored.KEYS):
        stored.write_cell(tmp_path, key, index)
    write(tmp_path, stored.KEYS[0], USUAL_SAMPLES)
    for samples in (100, 1024, 64):
        write(tmp_path, stored.KEYS[0], samples)
    for samples in (64, 1024):  # never from the usual number
        write(tmp_path, stored.KEYS[1], samples)
    return tmp_path


def test_a_simulation_is_named_after_its_cell_and_its_known_rows(tmp_path):
    assert simulation_file(tmp_path, "abc", USUAL_SAMPLES) == tmp_path / "outlooks" / "abc.json"
    assert simulation_file(tmp_path, "abc", 64) == tmp_path / "outlooks" / "abc-64.json"


def test_the_usual_number_of_rows_comes_first_or_else_the_most(store):
    first, second, third = read_records(store)
    assert first.quantities["simulated_accuracy"] == 0.512
    assert first.seconds["survey"] == 512
    assert [values["run_known_rows"] for values in first.variants] == [1024, 100, 64]
    assert all(set(values) == set(NUMBERS) for values in first.variants)  # what no calibration takes is left out
    assert second.quantities["simulated_accuracy"] == 1.024
    assert [values["run_known_rows"] for values in second.variants] == [64]
    assert third.quantities["simulated_accuracy"] is None
    assert third.variants == ()


def test_they_are_read_again_from_the_tables(store, tmp_path):
    report = tmp_path / "report"
    report.mkdir()
    records = read_records(store)
    for name, write_file in record_writers(records).items():
        write_file(report / name)
    again = read_records(report)
    assert [record.variants for record in again] == [record.variants for record in records]
    (report / VARIANTS_CSV).write_text("key,doublings\nx,many\n", encoding="utf-8")
    with pytest.raises(StoreError, match=r"simulations\.csv.*is damaged"):
        read_records(report)
    (report / VARIANTS_CSV).unlink()  # as a report of an earlier version
    assert all(record.variants == () for record in read_records(report))
    assert VARIANTS_CSV not in record_writers(read_records(report))


@given(
    st.lists(st.fixed_dictionaries({name: st.none() | st.floats(-1e300, 1e300) for name in NUMBERS[:5]}), max_size=3)
)
def test_every_number_survives_the_table(tmp_path_factory, variants):
    path = tmp_path_factory.mktemp("table") / VARIANTS_CSV
    whole = tuple(dict.fromkeys(NUMBERS) | values for values in variants)
    variants_table([("a", whole), ("=b", whole[:1]), ("c", ())]).write_csv(path)
    expected = {key: values for key, values in (("a", whole), ("=b", whole[:1])) if values}
    assert variants_from(path) == expected


@pytest.mark.parametrize("content", stored.CONTENTS.values(), ids=stored.CONTENTS)
def test_a_damaged_one_is_named(store, content):
    path = simulation_file(store, stored.KEYS[0], 100)
    path.write_bytes(content)
    with pytest.raises(StoreError, match=rf"{path.name}.*is damaged.*foretune study outlook makes it again"):
        read_records(store)


def test_one_of_other_rows_than_were_trained_is_refused(store):
    write(store, stored.KEYS[1], 64, train_rows=3)
    with pytest.raises(StoreError, match=f"{stored.KEYS[1]} was trained on 2 rows, its run simulated on 3"):
        read_records(store)
