import dataclasses
import json
from contextlib import suppress

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from foretune.cli import run
from foretune.errors import ConfigError, ForetuneError, PlacementError
from foretune.models.adapter_file import adapter_from_file, adapter_in_words, same_adapter
from foretune.models.linear_modules import linear_names
from foretune.models.placement import lora_config, place, read_adapters
from foretune.models.sites import Site, split_name
from foretune.ranking.adapter import candidate_config, write_adapter_config
from foretune.ranking.candidates import Candidate, enumerate_candidates, label
from foretune.settings.commands import Configuration, ScoreSettings, TuneSettings
from foretune.settings.groups import AdapterConfig, DataConfig, ModelConfig

import cases
from cases import lora, tiny

ALL = AdapterConfig(target_modules=("all-linear",), r=1)


def read_sites(model):
    return read_adapters(place(model, lora_config(model, ALL), seed=0)).sites


@pytest.fixture(scope="module")
def models():
    held = {name: tiny(name, dtype=torch.float32) for name in cases.MODELS}
    return {name: (model, read_sites(model)) for name, model in held.items()}


def adapted(model, config):
    return {site.name: site.rank for site in read_adapters(place(model, config, seed=0)).sites}


def expected(candidate, sites):
    return {sites[position].name: candidate.rank for position in candidate.sites}


@pytest.mark.parametrize("name", cases.MODELS)
def test_every_enumerated_candidate_is_matched_exactly(models, tmp_path, name):
    model, sites = models[name]
    template = lora_config(model, AdapterConfig(target_modules=("all-linear",)))
    for number, candidate in enumerate(enumerate_candidates(sites, ranks=[3])):
        path = write_adapter_config(candidate, sites, template, model, tmp_path / str(number))
        assert path == tmp_path / str(number) / "adapter_config.json"
        config = adapter_from_file(path)
        assert adapted(model, config) == expected(candidate, sites), label(candidate, sites)


@settings(max_examples=60)
@given(st.data())
def test_any_set_is_matched_exactly(models, tmp_path_factory, data):
    model, sites = models[data.draw(st.sampled_from(list(cases.MODELS)))]
    positions = data.draw(st.sets(st.integers(0, len(sites) - 1), min_size=1))
    candidate = Candidate(tuple(positions), data.draw(st.integers(1, 8)))
    folder = tmp_path_factory.mktemp("candidate")
    write_adapter_config(candidate, sites, lora("bert"), model, folder)
    assert adapted(model, LoraConfig.from_pretrained(str(folder))) == expected(candidate, sites)


def at(sites, kinds, layers=(0, 1)):
    return tuple(i for i, site in enumerate(sites) if site.layer in layers and site.kind in kinds)


def test_peft_places_it_without_foretune(models, tmp_path):
    model, sites = models["distilbert"]
    candidate = Candidate(at(sites, ["attention.q_lin", "ffn.lin2"], [1]), 2)
    write_adapter_config(candidate, sites, lora("distilbert"), model, tmp_path)
    placed = get_peft_model(tiny("distilbert", dtype=torch.float32), LoraConfig.from_pretrained(str(tmp_path)))
    inner = [name for name, _ in placed.named_modules() if name.endswith(".lora_A.default")]
    names = {name.removeprefix("base_model.model.").removesuffix(".lora_A.default") for name in inner}
    assert names == expected(candidate, sites).keys()
    assert {name for name, p in placed.named_parameters() if p.requires_grad and "lora_" not in name} == {
        f"base_model.model.{head}.modules_to_save.default.{kind}"
        for head in ("pre_classifier", "classifier")
        for kind in ("weight", "bias")
    }


def spelling(model, sites, positions):
    config = candidate_config(Candidate(positions, 2), sites, lora("bert"), model)
    return config.target_modules, config.layers_to_transform


def test_what_is_saved_beside_the_adapter_is_kept(tmp_path):
    """peft's own two names are left to peft, which adds them to every configuration."""
    LoraConfig(r=2, target_modules=["query"], modules_to_save=["pooler", "classifier", "score"]).save_pretrained(
        tmp_path
    )
    assert adapter_from_file(tmp_path).modules_to_save == ["pooler"]
    file = tmp_path / "adapter_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for wrong in ("pooler", [1], {"pooler": 1}):
        file.write_text(json.dumps({**content, "modules_to_save": wrong}), encoding="utf-8")
        with pytest.raises(ConfigError, match=r"modules_to_save=.*must be .*list\[str\]"):
            adapter_from_file(tmp_path)


def test_kinds_and_layers_where_they_say_enough(models):
    model, sites = models["bert"]
    assert spelling(model, sites, at(sites, ["attention.self.query"])) == (["query"], None)
    assert spelling(model, sites, at(sites, ["attention.self.query"], [1])) == (["query"], [1])
    # `output.dense` ends `attention.output.dense` too
    layer = "bert.encoder.layer.0"
    assert spelling(model, sites, at(sites, ["output.dense"], [0])) == ([f"{layer}.output.dense"], None)
    assert spelling(model, sites, at(sites, ["attention.output.dense"])) == (["attention.output.dense"], None)
    both = at(sites, ["attention.output.dense", "output.dense"], [0])
    assert spelling(model, sites, both) == (["attention.output.dense", "output.dense"], [0])
    # a set that is no grid
    query, value = f"{layer}.attention.self.query", "bert.encoder.layer.1.attention.self.value"
    irregular = tuple(i for i, site in enumerate(sites) if site.name in (query, value))
    assert spelling(model, sites, irregular) == ([query, value], None)
    pooler = tuple(i for i, site in enumerate(sites) if site.layer is None)
    assert spelling(model, sites, pooler) == (["pooler.dense"], None)


class Nested(nn.Module):
    """One module's path ends another's."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4)})


def test_a_path_that_ends_another_becomes_a_pattern():
    model = Nested()
    sites = tuple(Site(name, *split_name(name), 4, 4, 1, 1.0) for name in linear_names(model))
    assert [site.name for site in sites] == ["proj", "inner.proj"]
    config = candidate_config(Candidate((0,), 2), sites, LoraConfig(), model)
    assert config.target_modules == "proj"
    config.task_type = None  # no classifier
    placed = get_peft_model(model, config)
    assert [name for name, _ in placed.named_modules() if name.endswith("lora_A")] == ["base_model.model.proj.lora_A"]


def test_what_else_the_template_says_is_kept(models, tmp_path):
    model, sites = models["bert"]
    template = lora("bert", lora_alpha=6, use_rslora=True, init_lora_weights="gaussian", lora_dropout=0.1,
                    rank_pattern={"query": 3}, alpha_pattern={"query": 9})  # fmt: skip
    before = template.to_dict()
    candidate = Candidate(at(sites, ["attention.self.query"]), 2)
    write_adapter_config(candidate, sites, template, model, tmp_path)
    config = adapter_from_file(tmp_path)
    assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (2, 6, True, 0.1)
    assert (config.init_lora_weights, config.task_type, config.rank_pattern) == ("gaussian", "SEQ_CLS", {})
    (first, _) = read_adapters(place(model, config, seed=0)).sites
    assert (first.rank, first.scaling) == (2, pytest.approx(6 / 2**0.5))
    assert template.to_dict() == before
    write_adapter_config(candidate, sites, template, model, tmp_path, alpha=12)
    assert adapter_from_file(tmp_path).lora_alpha == 12


def test_the_sites_of_a_placed_model_serve_too(models):
    model, sites = models["bert"]
    candidate = Candidate(at(sites, ["output.dense", "attention.self.query"], [1]), 2)
    placed = place(model, lora_config(model, ALL), seed=0)
    assert same_adapter(
        candidate_config(candidate, sites, lora("bert"), placed),
        candidate_config(candidate, sites, lora("bert"), model),
    )


def test_the_same_candidate_gives_the_same_bytes(models, tmp_path):
    model, sites = models["bert"]
    candidate = Candidate(at(sites, ["attention.self.query", "output.dense", "attention.self.key"]), 2)
    for folder in ("one", "other"):
        write_adapter_config(candidate, sites, lora("bert"), model, tmp_path / folder)
    assert len({(tmp_path / name / "adapter_config.json").read_bytes() for name in ("one", "other")}) == 1
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["adapter_config.json"]


def test_another_model_is_refused(models, tmp_path):
    _, sites = models["bert"]
    with pytest.raises(PlacementError, match=r"no module 'bert\.encoder.*give the model"):
        write_adapter_config(Candidate((0,), 1), sites, lora("bert"), models["gpt2"][0], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def write(folder, **content):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "target_modules": ["query"], **content}), encoding="utf-8")
    return path


def test_file_and_folder_are_read_alike(tmp_path):
    path = write(tmp_path, r=3, layers_to_transform=[0])
    other = path.rename(tmp_path / "best.json")
    named = adapter_from_file(str(other))
    write(tmp_path, r=3, layers_to_transform=[0])
    assert same_adapter(named, adapter_from_file(tmp_path))
    assert (named.r, named.target_modules, named.task_type) == (3, {"query"}, "SEQ_CLS")
    assert not same_adapter(named, adapter_from_file(write(tmp_path, r=4, layers_to_transform=[0])))


def test_a_trained_adapter_starts_anew(models, tmp_path):
    placed = place(models["bert"][0], lora("bert"), seed=0)
    placed.peft_config["default"].base_model_name_or_path = "elsewhere"
    placed.save_pretrained(str(tmp_path), save_embedding_layers=False)
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["inference_mode"]
    config = adapter_from_file(tmp_path)
    again = place(models["bert"][0], config, seed=0)
    trains = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trains == {name for name, p in placed.named_parameters() if p.requires_grad}


def test_options_of_another_version_that_are_off_are_passed_over(tmp_path):
    assert adapter_from_file(write(tmp_path, use_newest=False, newest_config=None)).r == 8


REFUSED = [
    ({"peft_type": "ALORA"}, "peft_type 'ALORA': this peft knows ADALORA, .* more"),
    ({"peft_type": None}, "peft_type None"),
    ({"task_type": "CAUSAL_LM"}, "task_type 'CAUSAL_LM': only 'SEQ_CLS'"),
    ({"use_newest": True}, "use_newest=True, which this peft does not know"),
    ({"r": "8"}, "r='8': must be a number"),
    ({"r": 2.5}, r"r=2\.5"),
    ({"lora_alpha": None}, "lora_alpha=None"),
    ({"target_modules": 3}, "target_modules=3"),
    ({"target_modules": ["query", 3]}, "target_modules="),
    (
        {"modules_to_save": ["classifier", "embeddings"]},
        r"modules_to_save=\['embeddings'\]: only the classifier's head",
    ),
    ({"target_modules": "query", "layers_to_transform": [0]}, "refused by peft: .*layers_to_transform"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED)
def test_bad_files_are_named(tmp_path, content, message):
    path = write(tmp_path, **content)
    with pytest.raises(ConfigError, match=message) as error:
        adapter_from_file(path)
    assert repr(str(path)) in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"does not exist: name an adapter_config\.json or the folder"):
        adapter_from_file(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        adapter_from_file(tmp_path / "none.json")
    path = tmp_path / "adapter_config.json"
    for text, message in (("{", "cannot read"), ("[1]", "no JSON object"), ("\udc80", "cannot read")):
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(ConfigError, match=message):
            adapter_from_file(path)


def test_in_words():
    assert adapter_in_words(LoraConfig(target_modules=["value", "query"], layers_to_transform=[0, 2], r=4)) == (
        "query, value of layers 0, 2, r = 4, α = 8, init default"
    )
    assert adapter_in_words(LoraConfig(target_modules=["query"], layers_to_transform=1)).startswith(
        "query of layers 1,"
    )
    assert adapter_in_words(LoraConfig(target_modules=["layer.0.query", "pooler"])).startswith("2 modules by name, r")
    assert adapter_in_words(LoraConfig(target_modules="x|y")).startswith("modules by a pattern, r")
    assert adapter_in_words(LoraConfig(target_modules="all-linear")).startswith("all-linear of all layers")
    assert adapter_in_words(LoraConfig(init_lora_weights="pissa")) == (
        "peft's default modules of all layers, r = 8, α = 8, init pissa"
    )


# --adapter-config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cases.write_reviews(tmp_path_factory.mktemp("reviews"))


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    """The adapter of ADAPTER_FLAGS, as a file."""
    base, sites = models["bert"]
    candidate = Candidate(at(sites, ["attention.self.query", "attention.self.value"], [1]), 4)
    written = tmp_path_factory.mktemp("candidate")
    write_adapter_config(candidate, sites, lora("bert"), base, written)
    return written


ADAPTER_FLAGS = ["--target-modules", "query", "value", "--layers", "1", "--r", "4", "--alpha", "6"]
QUICK = ["--epochs", "2", "--learning-rate", "2e-2", "--train-batch-size", "8"]
FEW = ["--samples", "8", "--eval-samples", "8"]


def result_of(run_folder):
    result = json.loads((run_folder / "result.json").read_text(encoding="utf-8"))
    return without_seconds(result)


def without_seconds(value):
    if isinstance(value, dict):
        return {name: without_seconds(held) for name, held in value.items() if name != "seconds"}
    return [without_seconds(held) for held in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def tuned(model, dataset, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tuned"
    tokens = ["tune", "--model", model, "--dataset", dataset, *QUICK, "--adapter_config", str(folder)]
    assert run([*tokens, "--output", str(out)]) == 0
    return out


def test_tune_with_a_file_is_tune_with_flags(tuned, model, dataset, tmp_path):
    tokens = ["tune", "--model", model, "--dataset", dataset, *QUICK, *ADAPTER_FLAGS]
    assert run([*tokens, "--output", str(tmp_path / "flags")]) == 0
    assert result_of(tuned) == result_of(tmp_path / "flags")


def test_score_with_a_file_is_score_with_flags(model, dataset, folder, tmp_path):
    tokens = ["score", "--model", model, "--dataset", dataset, *FEW]
    file = str(folder / "adapter_config.json")
    assert run([*tokens, "--adapter-config", file, "--output", str(tmp_path / "file")]) == 0
    assert run([*tokens, *ADAPTER_FLAGS, "--output", str(tmp_path / "flags")]) == 0
    assert result_of(tmp_path / "file") == result_of(tmp_path / "flags")
    assert run(["score", "--config", str(tmp_path / "file" / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    assert result_of(tmp_path / "again") == result_of(tmp_path / "file")
    held = yaml.safe_load((tmp_path / "file" / "config.yaml").read_text(encoding="utf-8"))
    assert held["adapter_config"] == "adapter_config.json"
    assert not {"target_modules", "layers", "r", "alpha", "rslora", "init"} & held.keys()


def test_the_run_folder_holds_the_file_and_replays_wherever_it_lies(tuned, folder, tmp_path, monkeypatch):
    kept = tuned / "adapter_config.json"
    assert same_adapter(adapter_from_file(kept), adapter_from_file(folder))
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("config.yaml", "adapter_config.json"):
        (moved / name).write_bytes((tuned / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    assert run(["tune", "--config", "moved/config.yaml", "--output", "again"]) == 0
    assert result_of(tmp_path / "again") == result_of(tuned)
    assert (tmp_path / "again" / "adapter_config.json").read_bytes() == kept.read_bytes()
    # what was fine-tuned can be scored, as without a file
    assert run(["score", "--config", "moved/config.yaml", *FEW, "--output", "scored"]) == 0
    placement = result_of(tmp_path / "scored")["placement"]
    assert {name: placement[name] for name in ("target_modules", "layers", "r", "alpha", "trainable_parameters")} == {
        "target_modules": ["query", "value"],
        "layers": [1],
        "r": 4,
        "alpha": 6,
        "trainable_parameters": 256,
    }


def test_the_command_line_wins_over_the_files_adapter(model, dataset, folder, tuned, tmp_path):
    path = tmp_path / "scored.yaml"
    path.write_text(yaml.safe_dump({"model": model, "dataset": dataset, "target_modules": ["key"], "r": 2}))
    tokens = ["tune", "--config", str(path), *QUICK, f"--adapter-config={folder}", "--output", str(tmp_path / "run")]
    assert run(tokens) == 0
    assert result_of(tmp_path / "run") == result_of(tuned)


def test_a_path_in_a_config_file_that_is_not_beside_it(model, dataset, folder, tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "run.yaml"
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    path.write_text(yaml.safe_dump({"model": model, "dataset": dataset, "adapter_config": "best"}))
    monkeypatch.chdir(tmp_path)
    assert run(["score", "--config", str(path), *FEW]) == 0


CONFLICTS = [
    (["--r", "4"], "--r both"),
    (["--r", "8"], "one of --target-modules, --layers, --alpha, --rslora, --init, --r both"),  # the default, but given
    (["--target-modules", "query", "--rslora"], "--target-modules, --rslora both"),
    (["--layers", "0", "--init", "gaussian", "--alpha", "2"], "--layers, --alpha, --init both"),
]


@pytest.mark.parametrize("command", ["tune", "score"])
@pytest.mark.parametrize(("flags", "message"), CONFLICTS)
def test_an_adapter_described_twice_is_refused(folder, capsys, command, flags, message):
    tokens = [command, "--model", "/never", "--dataset", "/never", "--adapter-config", str(folder), *flags]
    assert run(tokens) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith(f"error: --adapter-config {str(folder)!r} and {message}")


def test_flags_beside_a_files_adapter_config_are_refused(tuned, tmp_path, capsys):
    tokens = ["tune", "--config", str(tuned / "config.yaml"), "--r", "2", "--output", str(tmp_path / "run")]
    assert run(tokens) == 2
    assert "--r both describe the adapter" in capsys.readouterr().err


def test_configs_in_python(tmp_path):
    for each in (ScoreSettings(), TuneSettings()):
        held = Configuration(ModelConfig("m"), DataConfig("d"), tmp_path, each).to_dict()
        assert held["adapter_config"] == "adapter_config.json"
        assert "r" not in held
        described = Configuration(ModelConfig("m"), DataConfig("d"), AdapterConfig(r=2), each).to_dict()
        assert described["r"] == 2
        assert "adapter_config" not in described  # as runs before had it


@pytest.mark.parametrize("command", ["tune", "score"])
def test_a_file_that_does_not_fit_is_refused_before_the_work(model, dataset, tmp_path, capsys, command):
    tokens = [command, "--model", model, "--dataset", dataset, "--output", str(tmp_path / "run")]
    assert run([*tokens, "--adapter-config", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert run([*tokens, "--adapter-config", str(write(tmp_path, target_modules=["qwery"]))]) == 2
    assert "did you mean 'query'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_the_same_adapter_only(model, dataset, folder, tuned, tmp_path, monkeypatch, capsys):
    import foretune.training.tune as outcome
    from foretune.training.fit import fit

    def interrupted(plan, run_folder, *, hooks=None):
        def cut(done, total, loss):
            if done == 10:
                raise KeyboardInterrupt

        return fit(plan, run_folder, hooks=dataclasses.replace(hooks, on_step=cut))

    out = tmp_path / "run"
    own = write(tmp_path)
    own.write_bytes((folder / "adapter_config.json").read_bytes())
    tokens = ["tune", "--model", model, "--dataset", dataset, *QUICK, "--output", str(out), "--adapter-config"]
    with monkeypatch.context() as patch:
        patch.setattr(outcome, "fit", interrupted)
        assert run([*tokens, str(own)]) == 130
    write(tmp_path, r=4, lora_alpha=6, layers_to_transform=[0])
    assert run([*tokens, str(own)]) == 2
    assert "unfinished run with another adapter_config.json" in capsys.readouterr().err
    assert run([*tokens[:-1], *ADAPTER_FLAGS]) == 2
    assert "unfinished run with" in capsys.readouterr().err
    # its own copy, or the same file under another name
    (out / "adapter_config.json").rename(tmp_path / "elsewhere.json")
    assert run([*tokens, str(tmp_path / "elsewhere.json")]) == 0
    assert "going on" in capsys.readouterr().err
    assert result_of(out)["final"] == result_of(tuned)["final"]
    assert same_adapter(adapter_from_file(out), adapter_from_file(folder))


ODD = [None, True, False, "x", "", [], {}, -1, 0, 1.5, 10**9, 1e308, [None], [1], ["x"], {"x": 1}, {"x": None}, [[1]]]
ODD += [{"query": 2}, {"a": {"b": 1}}, float("nan"), "9" * 5000, [-1], [0, 99], {"query": True}, {"query": "2"}]


@pytest.mark.parametrize("name", [*(field.name for field in dataclasses.fields(LoraConfig)), "unknown"])
@pytest.mark.filterwarnings("ignore")  # of peft, on patterns that match nothing
def test_odd_values_are_refused_or_placed(tmp_path, name):
    """Whatever a file says of any option: adapters, or one line."""
    for value in ODD:
        path = write(tmp_path, **{name: value})
        with suppress(ForetuneError):
            config = adapter_from_file(path)
            adapter_in_words(config)
            assert same_adapter(config, config)
            place(tiny("bert"), config, seed=0)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"r": ' + b"9" * 5000 + b"}",
        b"{}" + b" " * 10**6,
    ],
)
def test_a_file_that_is_no_configuration_is_one_line(tmp_path, content):
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content)
    for named in (path, tmp_path, tmp_path / "none.json", tmp_path / ("n" * 300)):
        with pytest.raises(ConfigError) as caught:
            adapter_from_file(named)
        assert len(str(caught.value)) < 1000
