import contextlib
import dataclasses
import datetime as dt
import shutil
from dataclasses import fields, replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from foretune.errors import ConfigError, ModelError
from foretune.settings.commands import ScoreSettings, TuneSettings
from foretune.settings.groups import AdapterConfig, DataConfig, ModelConfig
from foretune.study import keys
from foretune.study.cell import cell_folder, stored_key
from foretune.study.grid import expand, read_grid
from foretune.study.keys import _data, _weights, cell_key, former_key
from odd_values import PLAIN

import cases

GRID = {
    "models": ["./m"],
    "datasets": ["./a", {"dataset": "./b", "name": "second", "train": {"learning_rate": 1e-3}}],
    "placements": [{"target_modules": ["query", "value"], "layers": [0, 2]}, {"target_modules": "all-linear"}],
    "ranks": [4, 8],
    "seeds": [0, 1],
    "score": {"samples": 16},
    "train": {"epochs": 2, "max_length": 64},
}


def test_a_grid_is_multiplied_out():
    cells = expand(GRID)
    assert len(cells) == 2 * 2 * 2 * 2
    first = cells[0]
    assert first.names == {"model": "m", "dataset": "a", "placement": "{0,2} query,value", "r": 4, "seed": 0}
    assert first.adapter == AdapterConfig(("query", "value"), (0, 2), r=4)
    assert {cell.placement for cell in cells} == {"{0,2} query,value", "all-linear"}
    assert [cell.train.seed for cell in cells] == [0] * 8 + [1] * 8  # a whole grid with one seed comes first
    for cell in cells:
        assert cell.score.seed == cell.train.seed
        assert cell.score.max_length == cell.train.max_length == 64
        assert cell.train.learning_rate == (1e-3 if cell.data_name == "second" else 4e-4)
        assert (cell.score.samples, cell.train.epochs) == (16, 2)


def test_a_length_of_its_own_for_the_score():
    assert expand({**GRID, "score": {"max_length": 32}})[0].score.max_length == 32


def test_numbers_that_yaml_takes_for_words(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("models: [m]\ndatasets: [a]\nplacements: [{}]\ntrain: {learning_rate: 5e-3}\n", encoding="utf-8")
    (cell,) = read_grid(path)
    assert cell.train.learning_rate == 5e-3
    assert (cell.adapter.r, cell.train.seed, cell.placement) == (8, 0, "default")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modles": []}, "no setting 'modles': did you mean 'models'"),
        ({"models": []}, "models must be a list"),
        ({"placements": None}, "placements must be a list"),
        ({"ranks": [4.5]}, "ranks must be a list of integers"),
        ({"seeds": "0"}, "seeds must be a list of integers"),
        ({"score": {"samples": 1}}, "samples = 1"),
        ({"score": {"sampels": 1}}, "did you mean 'samples'"),
        ({"train": {"seed": 1}}, "list the seeds under 'seeds'"),
        ({"train": {"epochs": "many"}}, "epochs = 'many'"),
        ({"train": [1]}, "train must be a mapping"),
        ({"placements": ["query"]}, "must be a mapping"),
        ({"datasets": [{"max_train": 5}]}, "dataset"),
        ({"datasets": ["./a", "./x/a"]}, "two cells of the study are called"),
    ],
)
def test_wrong_grids_say_what_is_wrong(change, message):
    with pytest.raises(ConfigError, match=message):
        expand({**GRID, **change})


@pytest.mark.parametrize("content", ["- 1", "{", "models: [\x00"])
def test_files_that_are_no_grid(tmp_path, content):
    path = tmp_path / "grid.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"grid\.yaml"):
        read_grid(path)
    with pytest.raises(ConfigError, match=r"cannot read .*none"):
        read_grid(tmp_path / "none.yaml")


NAMES = sorted(
    {"name", "family", "score", "train", "seed"}
    | {f.name for kind in (AdapterConfig, DataConfig, ModelConfig, ScoreSettings, TuneSettings) for f in fields(kind)}
)
VALUES = st.recursive(
    PLAIN,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from([*NAMES, 1, None, "x" * 9]), x, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(GRID)), VALUES)
def test_any_entry_is_refused_or_read(key, entry):
    cells = refused = None
    try:
        cells = expand({**GRID, key: entry})
    except ConfigError as error:  # and nothing else
        refused = str(error)
    assert cells or 0 < len(refused) < 500
    for cell in cells or ():
        assert all(isinstance(name, str | int) for name in cell.names.values())
        for group in (cell.model, cell.data, cell.adapter, cell.score, cell.train):
            assert replace(group) == group  # its own checks take it


@pytest.mark.parametrize("group", ["models", "datasets", "placements", "score", "train"])
@given(data=st.data(), value=VALUES)
def test_any_setting_of_any_entry_is_refused_or_read(group, data, value):
    kinds = {"models": ModelConfig, "datasets": DataConfig, "placements": AdapterConfig, "score": ScoreSettings}
    name = data.draw(st.sampled_from([field.name for field in fields(kinds.get(group, TuneSettings))]))
    held = {**({"model": "m"} if group == "models" else {"dataset": "d"} if group == "datasets" else {}), name: value}
    with contextlib.suppress(ConfigError):  # and nothing else
        for cell in expand({**GRID, group: held if group in ("score", "train") else [held]}):
            assert all(isinstance(name, str | int) for name in cell.names.values())


def test_a_study_of_more_cells_than_anyone_runs_is_refused():
    with pytest.raises(ConfigError, match="the study has 1,600,000 cells: at most 100,000"):
        expand({**GRID, "seeds": list(range(1000)), "ranks": list(range(1, 401))})


@pytest.mark.parametrize("name", ["a\x1b[31mb", "a\nb", "a\u202eb", "a\rb"])
def test_names_of_cells_can_be_printed(name):
    (cell,) = expand({"models": [{"model": "m", "name": name}], "datasets": [name], "placements": [{"name": name}]})
    assert all(isinstance(value, int) or value.isprintable() for value in cell.names.values())


@pytest.mark.parametrize("value", [{}, [], True, "", " ", dt.date(2024, 1, 1)])
@pytest.mark.parametrize("group", ["models", "datasets", "placements"])
def test_a_name_is_a_short_text(group, value):
    held = {"models": {"model": "m"}, "datasets": {"dataset": "d"}, "placements": {}}[group]
    with pytest.raises(ConfigError, match=r"name = .*: must be a short text"):
        expand({**GRID, group: [{**held, "name": value}]})


@pytest.mark.parametrize(("group", "name"), [("train", "epochs"), ("train", "learning_rate"), ("score", "samples")])
def test_yes_is_no_number(group, name):
    with pytest.raises(ConfigError, match="true and false fit no such setting"):
        expand({**GRID, group: {name: True}})


@pytest.fixture
def real(tmp_path):
    _data.cache_clear()
    _weights.cache_clear()
    model, data = cases.save(tmp_path / "m"), cases.write_reviews(tmp_path / "d")
    return expand({**GRID, "models": [model], "datasets": [data], "ranks": [8], "seeds": [0]})[0]


def test_a_key_is_content_not_place(real, tmp_path):
    key = cell_key(real)
    shutil.copytree(tmp_path / "m", tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "d", tmp_path / "other")
    moved = dataclasses.replace(
        real,
        model=dataclasses.replace(real.model, model=str(tmp_path / "elsewhere"), device="cpu"),
        data=dataclasses.replace(real.data, dataset=str(tmp_path / "other")),
        placement="another name",
        train=dataclasses.replace(real.train, report_to=("tensorboard",)),
    )
    assert cell_key(moved) == key


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithOneMore(ScoreSettings):
    """Settings of a score as a later version may have them."""

    new_setting: float = 0.5


def test_a_new_setting_with_a_default_leaves_every_key_as_it_is(real):
    later = dataclasses.replace(real, score=WithOneMore(**vars(real.score)))
    assert (cell_key(later), former_key(later)) == (cell_key(real), former_key(real))
    used = dataclasses.replace(real, score=WithOneMore(**vars(real.score), new_setting=0.25))
    assert cell_key(used) != cell_key(real)
    assert former_key(used) is None  # no cell of then has it


# Made by the version that hashed every setting, of weights "w" and data "d".
FORMER_KEYS = [
    "052e59d9d1ad306824c2",
    "7a708ab2bc9c94c9310d",
    "cf23a271c320f9d53cc4",
    "d65ea925726006a9b7f9",
    "9fbc2dbff722713bfab9",
    "283488be1a4ef8e1cdad",
    "e17d3ccaff6419b068a5",
    "c98ed3c69d1508f4513e",
    "508eea1ab188e52d7e53",
]


def test_keys_of_stored_cells_are_still_known(monkeypatch):
    monkeypatch.setattr(keys, "_weights", lambda _: "w")
    monkeypatch.setattr(keys, "_data", lambda _: "d")
    cells = expand({**GRID, "seeds": [0]})[:8]
    other = {"alpha": 16.0, "rslora": True, "init": "pissa"}
    cells = (*cells, dataclasses.replace(cells[0], adapter=replace(cells[0].adapter, **other)))
    assert [former_key(cell) for cell in cells] == FORMER_KEYS


def test_a_cell_stored_under_its_former_key_counts_as_finished(real, tmp_path):
    store = tmp_path / "study"
    former = former_key(real)
    assert stored_key(real, store) == cell_key(real) != former
    (store / "outlooks").mkdir(parents=True)
    outlook = store / "outlooks" / f"{former}.json"
    outlook.touch()
    assert stored_key(real, store) == former
    outlook.unlink()
    for name in (former, f"{former}.part"):
        folder = cell_folder(store, name)
        folder.mkdir(parents=True)
        assert stored_key(real, store) == former
        folder.rmdir()
    assert stored_key(real, store) == cell_key(real)


def test_the_base_of_keys_is_every_setting_with_its_default(real):
    """A new setting need not be here; a default that changes must not be changed here."""
    for group, names in keys.BASE.items():
        of_today = {field.name: field.default for field in fields(getattr(real, group))}
        assert names.items() <= of_today.items()


def test_one_key_for_8_and_8_point_0(real):
    whole = dataclasses.replace(real, adapter=dataclasses.replace(real.adapter, alpha=8))
    point = dataclasses.replace(real, adapter=dataclasses.replace(real.adapter, alpha=8.0))
    assert cell_key(whole) == cell_key(point)


@pytest.mark.parametrize("group", ["model", "adapter", "score", "train"])
def test_every_setting_makes_a_new_cell(real, group):
    key = cell_key(real)
    other = {
        "dtype": "bfloat16", "target_modules": ("query",), "layers": (1,), "init": "gaussian", "reduction": "trace",
        "head": "probe", "ntk_params": "adapter+head", "ridge": 1.0, "scheduler": "cosine", "eval_samples": 7,
        "sketch": 64, "quantization": "8bit",
    }  # fmt: skip
    settings = getattr(real, group)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in ("model", "device", "trust_remote_code", "report_to", "memory", "scratch"):
            continue
        new = other.get(field.name, not value if isinstance(value, bool) else None)
        if new is None:
            new = value / 2 + 1e-3 if isinstance(value, float) else value + 1
        changed = dataclasses.replace(real, **{group: dataclasses.replace(settings, **{field.name: new})})
        assert cell_key(changed) != key, field.name


def test_changed_data_or_weights_make_a_new_cell(real, tmp_path):
    key = cell_key(real)
    with (tmp_path / "d" / "train.csv").open("a", encoding="utf-8") as file:
        file.write("one more,positive\n")
    _data.cache_clear()
    changed = cell_key(real)
    assert changed != key
    weights = tmp_path / "m" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    _weights.cache_clear()
    assert cell_key(real) not in (key, changed)


def test_fewer_training_rows_make_a_new_cell(real):
    fewer = dataclasses.replace(real, data=dataclasses.replace(real.data, max_train=20))
    assert cell_key(fewer) != cell_key(real)
    many = dataclasses.replace(real, data=dataclasses.replace(real.data, max_train=2000))  # more than there are
    assert cell_key(many) == cell_key(real)


def test_a_model_that_is_nowhere(real):
    gone = dataclasses.replace(real, model=dataclasses.replace(real.model, model="no-such-model"))
    with pytest.raises(ModelError, match="no local folder"):
        cell_key(gone)


def test_the_shipped_experiment_is_the_papers():
    from foretune.paper.experiment import read_experiment

    content = read_experiment()
    assert content["model"] == "roberta-base"
    assert content["score"] == {"samples": 32, "sigma": 1e-4}
    assert [(d["name"], d["train"]["train_batch_size"], d["train"]["learning_rate"]) for d in content["datasets"]] == [
        ("cola", 32, 4e-4),
        ("sst2", 16, 5e-4),
        ("yelp", 32, 4e-4),
        ("imdb", 16, 4e-4),
    ]
    assert yaml.safe_dump(content)


def test_a_placement_with_a_rank_has_that_rank_alone():
    cells = expand({**GRID, "ranks": [4, 8], "placements": [{"name": "own", "r": 3}, {"name": "listed"}]})
    ranks = {name: {cell.adapter.r for cell in cells if cell.placement == name} for name in ("own", "listed")}
    assert ranks == {"own": {3}, "listed": {4, 8}}
