import pytest
import torch
from torch import nn

import families
from foretune.errors import PlacementError
from foretune.models.groups import read_groups, train_only
from general_methods import install, trained


def names_of(adapted):
    return [group.site.name for group in adapted.groups]


def test_groups_follow_the_modules():
    model = install("bert", "LOHA")
    adapted = read_groups(model)
    assert names_of(adapted) == [
        f"bert.encoder.layer.{i}.attention.self.{m}" for i in (0, 1) for m in ("query", "value")
    ]
    site = adapted.groups[0].site
    assert (site.layer, site.kind, site.rank) == (0, "attention.self.query", 0)
    assert site.n_parameters == site.others == sum(p.numel() for p in adapted.groups[0].parameters.values()) > 0
    assert adapted.groups[0].modules == {site.name: model.get_submodule(f"base_model.model.{site.name}")}


@pytest.mark.parametrize("method", ["VBLORA", "UNILORA", "LILY", "TINYLORA", "LOKR"])
def test_every_parameter_is_in_one_group(method):
    model = install("bert", method)
    adapted = read_groups(model)
    found = [id(parameter) for group in adapted.groups for parameter in group.parameters.values()]
    assert len(found) == len(set(found))
    assert set(found) == {id(parameter) for parameter in trained(model)}


def test_what_several_modules_share_is_a_group_of_its_own():
    adapted = read_groups(install("bert", "VBLORA"))
    (shared,) = [group for group in adapted.groups if len(group.modules) > 1]
    assert (shared.site.name, shared.site.layer, len(shared.modules)) == (
        f"{adapted.groups[0].site.name}.vblora_vector_bank",
        None,
        4,
    )
    assert shared.site.others == 8 * 4


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"])
def test_virtual_tokens_are_one_group(method):
    adapted = read_groups(install("roberta", method))
    assert names_of(adapted) == ["prompt_encoder"]
    assert list(adapted.head) == ["classifier.dense", "classifier.out_proj"]


def test_the_head_is_no_group():
    model = families.build("bert")
    train_only(model, ["layer.1.attention.self", "classifier"])
    adapted = read_groups(model)
    assert names_of(adapted) == [f"bert.encoder.layer.1.attention.self.{m}" for m in ("query", "key", "value")]
    assert adapted.head == {"classifier": model.classifier}


def test_a_head_that_trains_in_part_is_refused():
    model = families.build("bert")
    train_only(model, ["query", "classifier.weight"])
    with pytest.raises(PlacementError, match="'classifier' of the head trains in part"):
        read_groups(model)


def test_tied_weights_are_counted_once():
    model = families.build("bert")
    first, second = (layer.attention.self for layer in model.bert.encoder.layer)
    second.query.weight = first.query.weight
    train_only(model, ["query"])
    adapted = read_groups(model)
    assert sum(group.site.others for group in adapted.groups) == 16 * 16 + 2 * 16
    (shared,) = [group for group in adapted.groups if len(group.modules) > 1]
    assert shared.site.name == "bert.encoder.layer.0.attention.self.query.shared"


def test_nothing_that_trains_is_refused():
    model = install("bert", "LOHA")
    model.requires_grad_(False)
    with pytest.raises(PlacementError, match="nothing trains beside the head"):
        read_groups(model)


def test_several_active_adapters_are_refused():
    model = install("bert", "LOHA")
    model.base_model.active_adapter = model.active_adapter = ["default", "other"]
    with pytest.raises(PlacementError, match="several adapters"):
        read_groups(model)


def test_layers_are_chosen_by_the_ends_of_their_names():
    model = families.build("bert")
    chosen = train_only(model, ["layer.1.attention.self.query", "value.bias", "pooler"])
    assert list(chosen) == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    prefix = "bert.encoder.layer"
    assert chosen == (
        f"{prefix}.0.attention.self.value.bias",
        f"{prefix}.1.attention.self.query.weight",
        f"{prefix}.1.attention.self.query.bias",
        f"{prefix}.1.attention.self.value.bias",
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
    )


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["querry"], r"layer 'querry' matches nothing .*did you mean query"),
        (["zzz"], "the model has"),
        ("query", "list"),
    ],
)
def test_names_that_match_nothing_are_refused(names, said):
    model = families.build("bert")
    with pytest.raises(PlacementError, match=said):
        train_only(model, names)
    assert all(parameter.requires_grad for parameter in model.parameters())  # as it was


def test_integers_do_not_train():
    model = families.build("bert")
    query = model.bert.encoder.layer[0].attention.self.query
    query.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(PlacementError, match="stored as int8"):
        train_only(model, ["query"])
