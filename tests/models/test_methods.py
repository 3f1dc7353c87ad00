"""Placing and reading adapters of any method of peft's."""

import copy

import pytest
import torch
from peft import (
    BeftConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

import families
import methods
from foretune.errors import PlacementError
from foretune.models.closed_forms import read_closed_forms
from foretune.models.placement import place, read_adapters
from foretune.models.tuner import is_base, method_name

from cases import lora, tiny


@pytest.mark.parametrize("method", methods.METHODS)
def test_placing_hangs_on_the_seed_and_leaves_the_rest_alone(method):
    base, config = families.build("bert"), methods.METHODS[method].config("bert")
    before, described = copy.deepcopy(base.state_dict()), str(config)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, same = place(base, config, seed=1), place(base, config, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert str(config) == described
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not one.training
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))


@pytest.mark.parametrize(("method", "family"), methods.FAST)
def test_the_head_trains_and_the_base_is_told_apart(method, family):
    base = families.build(family)
    placed = place(base, methods.METHODS[method].config(family), seed=0)
    assert read_adapters(placed).head
    kept = {name: p for name, p in placed.named_parameters() if is_base(name)}
    assert sum(p.numel() for p in kept.values()) == sum(p.numel() for p in base.parameters())
    for name, parameter in placed.named_parameters():
        named = any(part in name for part in (*methods.METHODS[method].parts, "modules_to_save"))
        assert named or not parameter.requires_grad, name


@pytest.mark.parametrize(("method", "family"), methods.FAST)
def test_reading_leaves_the_model_as_it_is(method, family):
    placed = methods.placed(method, family)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in placed.named_parameters()}
    adapted = read_adapters(placed, draws=3)
    assert adapted.draws == (3 if "LoRA" in method.split(",")[0].split() or method == "DoRA" else 1)
    with adapted.forward():
        pass
    for name, parameter in placed.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1], name


NO_FORM = {
    "method": OFTConfig(task_type="SEQ_CLS", target_modules=["query"], oft_block_size=4),
    "table": LoraConfig(task_type="SEQ_CLS", target_modules=["word_embeddings", "query"]),
    "tokens": LoraConfig(
        task_type="SEQ_CLS", target_modules=["query"], trainable_token_indices={"word_embeddings": [3, 4]}
    ),
    "norm": LNTuningConfig(task_type="SEQ_CLS", target_modules=["query"]),  # no norm, but a linear module
    "prompt": PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
}


@pytest.mark.parametrize("case", NO_FORM)
def test_what_has_no_closed_form_is_not_read_by_one(case):
    placed = place(families.build("bert", dtype=torch.float32), NO_FORM[case], seed=0)
    assert read_closed_forms(placed, "default") is None


def changed(placed, parts, change):
    with torch.no_grad():
        for name, parameter in placed.named_parameters():
            if any(part in name for part in parts):
                change(parameter)
    return placed


def test_what_leaves_the_ground_of_a_formula_is_not_read_by_it():
    dora = methods.placed("DoRA", "bert")
    assert read_closed_forms(dora, "default") is not None
    assert read_closed_forms(changed(copy.deepcopy(dora), ["magnitude"], lambda p: p.mul_(1.1)), "default") is None
    assert read_closed_forms(changed(copy.deepcopy(dora), ["lora_B"], lambda p: p.add_(0.1)), "default") is None
    scales = methods.placed("(IA)³", "bert")
    assert read_closed_forms(changed(scales, ["ia3_l"], lambda p: p.zero_()), "default") is None
    frozen = methods.placed("VeRA", "bert")
    for name, parameter in frozen.named_parameters():
        if "lambda_d" in name:
            parameter.requires_grad_(False)  # a part of the adapter alone
    assert read_closed_forms(frozen, "default") is None
    beside = place(tiny("bert"), lora("bert"), seed=0)
    beside.get_base_model().bert.pooler.dense.weight.requires_grad_(True)
    assert read_closed_forms(beside, "default") is None


def test_an_adapter_loaded_for_inference_is_read_as_if_it_trained():
    placed = methods.placed("(IA)³", "bert")
    for parameter in placed.parameters():
        parameter.requires_grad_(False)
    assert sum(site.n_parameters for site in read_adapters(placed).sites) > 0


def test_a_parameter_of_several_modules_is_not_read_by_a_formula():
    base = tiny("bert")
    layers = base.bert.encoder.layer
    layers[1].attention.self.query.bias = layers[0].attention.self.query.bias
    assert read_closed_forms(place(base, lora("bert", bias="all"), seed=0), "default") is None


def test_a_norm_of_another_kind_is_tried():
    class OnePlus(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(16, dtype=torch.float64))

        def forward(self, h):
            return nn.functional.rms_norm(h, (16,)) * (1.0 + self.weight)

    class Squared(OnePlus):
        def forward(self, h):
            return nn.functional.rms_norm(h, (16,)) * self.weight**2

    for kind, known in ((OnePlus, True), (Squared, False)):
        base = tiny("bert")
        base.bert.encoder.layer[0].output.LayerNorm = kind()
        config = LNTuningConfig(task_type="SEQ_CLS", target_modules=["output.LayerNorm"])
        assert (read_closed_forms(place(base, config, seed=0), "default") is not None) == known


REFUSED = [
    (IA3Config(task_type="SEQ_CLS", target_modules=["querry"], feedforward_modules=[]), "did you mean 'query'"),
    (LNTuningConfig(task_type="SEQ_CLS"), "peft refuses the configuration of LN tuning on BertFor.*target_modules"),
    (BeftConfig(task_type="SEQ_CLS", target_modules=["word_embeddings"]), "peft refuses.* of BEFT on BertFor"),
    (VeraConfig(task_type="SEQ_CLS", target_modules=["query"], layers_to_transform=[9]), "layer 9 is out of range"),
    (VeraConfig(task_type="SEQ_CLS", target_modules=["query"], r=0), "peft refuses the configuration of VeRA on BertF"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_peft_cannot_put_on_the_model_is_refused_in_one_line(config, message):
    with pytest.raises(PlacementError, match=message) as told:
        place(tiny("bert"), config, seed=0)
    assert "\n" not in str(told.value)


def test_methods_have_the_names_that_people_use():
    assert method_name(lora("bert")) == "LoRA"
    assert method_name(lora("bert", use_dora=True)) == "DoRA"
    assert method_name(IA3Config()) == "(IA)³"
    assert method_name(BeftConfig()) == "BEFT"


def test_several_active_adapters_are_refused():
    placed = get_peft_model(tiny("bert"), lora("bert", task_type=None))
    placed.add_adapter("other", lora("bert", task_type=None))
    placed.base_model.set_adapter(["default", "other"])
    with pytest.raises(PlacementError, match=r"adapters.*activate"):
        read_adapters(placed.eval())
