import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from foretune.errors import ForetuneError, PlacementError
from foretune.models.linear_modules import linear_names
from foretune.models.placement import head_modules, lora_config, place, read_adapters
from foretune.models.sites import split_name
from foretune.settings.groups import AdapterConfig

import cases
from cases import lora, tiny


def test_sites_say_where_the_adapters_are():
    model = place(tiny("bert"), lora("bert", target_modules=["query"], r=4, lora_alpha=6), seed=0)
    sites = read_adapters(model).sites
    assert [site.name for site in sites] == [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    assert sites[1].layer == 1
    assert sites[1].kind == "attention.self.query"
    assert (sites[0].d_in, sites[0].d_out, sites[0].rank, sites[0].scaling) == (16, 16, 4, 1.5)
    assert sum(site.n_parameters for site in sites) == 2 * 4 * 32


def test_the_papers_placement_of_roberta():
    """RoBERTa's module names, and (m + p) r parameters for each adapted matrix."""
    config = AdapterConfig(target_modules=("query", "value"), layers=(0,))
    base = tiny("roberta")
    model = place(base, lora_config(base, config), seed=0)
    assert [site.name for site in read_adapters(model).sites] == [
        "roberta.encoder.layer.0.attention.self.query",
        "roberta.encoder.layer.0.attention.self.value",
    ]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or "modules_to_save" in name for name in trained)


def test_a_module_has_the_same_a_in_every_placement():
    base = tiny("bert")
    few = read_adapters(place(base, lora("bert", target_modules=["value"], layers_to_transform=[1]), seed=0), draws=3)
    many = read_adapters(place(base, lora("bert"), seed=0), draws=3)
    by_name = {adapter.site.name: adapter.rows for adapter in many.adapters}
    (adapter,) = few.adapters
    assert torch.equal(by_name[adapter.site.name], adapter.rows)
    other = read_adapters(place(base, lora("bert", target_modules=["value"]), seed=1))
    assert not torch.equal(other.adapters[1].rows, adapter.rows[:4])


def test_placing_leaves_the_users_model_and_generator_alone():
    base = tiny("bert", dtype=torch.float32)
    before = {name: p.clone() for name, p in base.named_parameters()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    read_adapters(place(base, lora("bert", init_lora_weights="pissa"), seed=0), draws=4)
    place(base, lora("bert"), seed=0)
    assert torch.equal(torch.rand(3), expected)
    assert all(p.requires_grad for p in base.parameters())
    assert before.keys() == dict(base.named_parameters()).keys()
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_inplace_places_into_the_model_itself():
    base = tiny("bert")
    placed = place(base, lora("bert"), seed=0, inplace=True)
    assert placed.get_base_model() is base


def test_draws_are_reproducible_and_differ():
    model = place(tiny("bert"), lora("bert"), seed=0)
    rows = read_adapters(model, draws=3, seed=0).adapters[0].rows.unflatten(0, (3, 4))
    again = read_adapters(model, draws=3, seed=0).adapters[0].rows.unflatten(0, (3, 4))
    assert torch.equal(rows, again)
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[1], rows[2])
    assert torch.equal(rows[0], model.base_model.model.bert.encoder.layer[0].attention.self.query.lora_A.default.weight)


@pytest.mark.parametrize("name", cases.MODELS)
def test_all_linear_covers_what_can_be_adapted(name):
    base = tiny(name)
    config = lora_config(base, AdapterConfig(target_modules=("all-linear",)))
    sites = {site.name for site in read_adapters(place(base, config, seed=0)).sites}
    assert sites == set(linear_names(base))
    config = lora_config(base, AdapterConfig(target_modules=("all-linear",), layers=(1,)))
    sites = {site.name for site in read_adapters(place(base, config, seed=0)).sites}
    assert sites == {module for module in linear_names(base) if split_name(module)[0] == 1}


def test_default_target_modules_are_pefts():
    base = tiny("bert")
    model = place(base, lora_config(base, AdapterConfig()), seed=0)
    assert {site.kind.rsplit(".", 1)[-1] for site in read_adapters(model).sites} == {"query", "value"}


BAD = [
    ({"target_modules": ("querry",)}, r"'querry' matches nothing \(did you mean 'query'\?\).*dense, key, query, value"),
    ({"target_modules": ("zzz",)}, "'zzz' matches nothing: the model has dense, key, query, value"),
    ({"layers": (0, 2)}, "layer 2 is out of range: the model has 2 layers, 0 to 1"),
    ({"layers": (-1,)}, "layers = -1: must be at least 0"),
    ({"target_modules": ("all-linear",), "layers": (7,)}, "layer 7 is out of range"),
    ({"r": 0}, "r = 0"),
    ({"r": -3}, "r = -3"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_does_not_fit_is_named(options, message):
    base = tiny("bert")
    with pytest.raises(ForetuneError, match=message):
        place(base, lora_config(base, AdapterConfig(**{"target_modules": ("query",), **options})), seed=0)


UNFIT = [
    ({"rank_pattern": {"query": 0}}, "at least 1"),
    ({"target_modules": "nothing.*"}, "peft refuses the configuration of LoRA on BertFor.*No modules were targeted"),
    ({"target_modules": ["classifier"]}, "'classifier' matches nothing"),
]


@pytest.mark.parametrize(("options", "message"), UNFIT)
def test_lora_that_does_not_fit_is_refused(options, message):
    with pytest.raises(PlacementError, match=message):
        place(tiny("bert"), lora("bert", **options), seed=0)


def test_peft_models_that_cannot_be_read_are_refused():
    base = tiny("bert")
    with pytest.raises(PlacementError, match="expected a peft model"):
        read_adapters(base)
    merged = place(base, lora("bert"), seed=0)
    merged.merge_adapter()
    with pytest.raises(PlacementError, match="merged or disabled"):
        read_adapters(merged)


@pytest.mark.parametrize("name", cases.MODELS)
def test_the_last_head_module_gives_the_logits(name):
    base = tiny(name, 3)
    trained = head_modules(place(base, lora(name), seed=0))
    untrained = head_modules(
        get_peft_model(
            copy.deepcopy(base), LoraConfig(target_modules=cases.TARGETS[name], fan_in_fan_out=name == "gpt2")
        )
    )
    assert list(trained) == list(untrained)
    assert list(trained.values())[-1].out_features == 3


def test_a_head_with_other_parameters_is_left_out_of_the_kernel():
    base = tiny("bert")
    base.classifier = nn.Sequential(nn.LayerNorm(16, dtype=torch.float64), nn.Linear(16, 2, dtype=torch.float64))
    assert read_adapters(place(base, lora("bert"), seed=0)).head == {}
