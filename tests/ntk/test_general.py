import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from torch import nn

import families
import foretune as ft
import general_methods
from foretune.errors import ForetuneError, KernelError, reason
from foretune.models.adapted import Layout
from foretune.models.groups import read_groups, train_only
from foretune.models.placement import place, read_adapters
from foretune.ntk import general
from foretune.ntk.general import group_features, runs_by_module
from foretune.ntk.jacobian import tangent_features
from foretune.ntk.kernel import tangent_kernel
from foretune.ntk.premises import check_new_adapters
from foretune.settings.commands import ScoreSettings
from foretune.tasks.outputs import output_reduction
from general_methods import GENERAL, TOLERANCE, error, install

import cases
import references

SEQUENCES = families.ragged(4, 7)
PAIRS = [(method, family) for method, ways in GENERAL.items() for family in ways]
RUNS = [pair for pair in PAIRS if GENERAL[pair[0]][pair[1]] in ("by module", "loop")]


def gradients_of(adapted, batches=None, output="margin", n_classes=2):
    """n × k × P gradients of all groups."""
    batches = batches or [cases.batch_of(SEQUENCES, [0, 2]), cases.batch_of(SEQUENCES, [1, 3], width=9)]
    features = tangent_features(adapted, batches, output_reduction(output, n_classes), n=len(SEQUENCES))
    return torch.cat(features.v, dim=2).transpose(0, 1).double().numpy()


def reference_of(adapted, output="margin", n_classes=2):
    parameters = [parameter for group in adapted.groups for parameter in group.parameters.values()]
    directions = output_reduction(output, n_classes).directions
    return references.parameter_gradients(adapted.model, SEQUENCES, directions, parameters)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's, at the first sparse tensor of a process
@pytest.mark.parametrize(("method", "family"), RUNS)
def test_gradients_of_every_method_equal_a_loop_over_autograd(method, family):
    adapted = read_groups(install(family, method))
    layout = families.layout_of(adapted, SEQUENCES)
    assert layout.looped == (GENERAL[method][family] == "loop")
    found = gradients_of(replace(adapted, layout=layout))
    assert error(found, reference_of(adapted)) < TOLERANCE.get(method, 1e-9)


@pytest.mark.parametrize(("method", "family"), [pair for pair in PAIRS if GENERAL[pair[0]][pair[1]] == "batch size 1"])
def test_methods_that_mix_examples_go_one_at_a_time(method, family):
    adapted = read_groups(install(family, method))
    with pytest.raises(KernelError, match="use --batch-size 1"):
        families.layout_of(adapted, SEQUENCES)
    layout = families.layout_of(adapted, SEQUENCES, batch_size=1)
    found = gradients_of(replace(adapted, layout=layout), [cases.batch_of(SEQUENCES, [row]) for row in range(4)])
    assert error(found, reference_of(adapted)) < 1e-9


@pytest.mark.parametrize(("method", "family"), [pair for pair in PAIRS if GENERAL[pair[0]][pair[1]] == "refused"])
def test_refusals_say_why(method, family):
    try:
        model = install(family, method)
    except (ValueError, TypeError, NotImplementedError) as refused:  # peft's own
        said = reason(refused)
    else:
        with pytest.raises(ForetuneError) as caught:
            families.layout_of(read_groups(model), SEQUENCES)
        said = str(caught.value)
    assert general_methods.WAYS.refusal(method, family) in said
    assert "\n" not in said


@pytest.mark.parametrize("method", ["LOHA", "VBLORA", "PROMPT_TUNING", "PREFIX_TUNING"])
@pytest.mark.parametrize("output", ["full", "trace"])
def test_both_ways_give_the_same_kernels(method, output):
    adapted = read_groups(install("roberta", method))  # a head of two linear modules
    by_module, looped = (
        tangent_kernel(
            tangent_features(
                replace(adapted, layout=Layout(looped=looped)),
                [cases.batch_of(SEQUENCES)],
                output_reduction(output, 2),
                n=4,
            )
        )
        for looped in (False, True)
    )
    assert error(by_module.matrices(with_head=True), looped.matrices(with_head=True)) < 1e-10
    assert error(by_module.head, looped.head) < 1e-10


def test_gradients_of_the_head_are_those_of_the_fast_path():
    model = cases.with_nonzero_b(place(cases.tiny("bert", 3), cases.lora("bert"), seed=0))
    batch, reduction = cases.batch_of(SEQUENCES), output_reduction("trace", 3)
    adapted, fast = read_groups(model), read_adapters(model)
    assert list(adapted.head) == list(fast.head) == ["classifier"]
    expected = tangent_kernel(tangent_features(fast, [batch], reduction, n=4))
    for looped in (False, True):
        features = group_features(replace(adapted, layout=Layout(looped=looped)), batch, reduction)
        kernel = tangent_kernel(features)
        assert error(kernel.head, expected.head) < 1e-12
        assert error(kernel.matrices(), expected.matrices()) < 1e-12
        for site, block in zip(fast.sites, expected.blocks, strict=True):
            place_of = [group.site.name for group in adapted.groups].index(site.name)
            assert error(kernel.blocks[place_of], block) < 1e-12


PARTS = {
    "bert": ["layer.1.attention.self.query", "layer.0.output", "pooler", "classifier"],
    "gpt2": ["h.1", "ln_f", "score"],
    "llama": ["layers.1", "norm", "score"],
    "t5": ["block.1.layer.0", "classification_head"],
    "albert": ["albert_layers", "classifier"],  # one layer that runs twice
    "roberta": ["word_embeddings", "LayerNorm", "attention.self.key.bias"],
}


@pytest.mark.parametrize("family", PARTS)
def test_layers_that_train_whole(family):
    model = families.build(family)
    train_only(model, PARTS[family])
    adapted = read_groups(model)
    layout = families.layout_of(adapted, SEQUENCES)
    assert not layout.looped
    assert error(gradients_of(replace(adapted, layout=layout)), reference_of(adapted)) < 1e-9


def test_a_table_that_all_examples_share_goes_one_at_a_time():
    model = families.build("bert")
    train_only(model, ["position_embeddings", "query"])
    adapted = read_groups(model)
    layout = families.layout_of(adapted, SEQUENCES)
    found = gradients_of(replace(adapted, layout=layout))
    assert error(found, reference_of(adapted)) < 1e-10


def test_padding_and_batches_change_nothing():
    adapted = read_groups(install("bert", "PROMPT_TUNING"))
    adapted = replace(adapted, layout=families.layout_of(adapted, SEQUENCES))
    whole = gradients_of(adapted, [cases.batch_of(SEQUENCES, width=12)])
    assert error(gradients_of(adapted, [cases.batch_of(SEQUENCES, [row]) for row in range(4)]), whole) < 1e-10


def test_a_pass_leaves_the_model_as_it_is():
    model = install("bert", "LOKR")
    adapted = read_groups(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batch, reduction = cases.batch_of(SEQUENCES), output_reduction("margin", 2)
    for looped in (False, True):
        features = group_features(replace(adapted, layout=Layout(looped=looped)), batch, reduction)
        assert not any(gradient.requires_grad for gradient in features.gradients)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == flags[name], name
            assert parameter.grad is None, name
            assert torch.equal(parameter, before[name]), name


def test_virtual_tokens_are_left_to_peft_after_a_pass():
    model = install("bert", "P_TUNING")
    gradients_of(read_groups(model))
    assert "get_prompt" not in vars(model)


def test_what_a_module_hides_is_found_by_the_loop():
    model = families.build("bert")
    own = model.bert.encoder.layer[0].attention.self.query
    outer = model.bert.encoder.layer[1].attention.self
    outer.query = general_methods.Hidden(outer.query, own.weight)
    train_only(model.eval(), ["layer.0.attention.self.query"])
    adapted = read_groups(model)
    assert not runs_by_module(adapted, cases.batch_of(SEQUENCES, [0, 1]), output_reduction("margin", 2))
    layout = families.layout_of(adapted, SEQUENCES)
    assert layout.looped
    assert error(gradients_of(replace(adapted, layout=layout)), reference_of(adapted)) < 1e-10


def test_a_module_that_torch_func_does_not_run_goes_example_by_example(monkeypatch):
    adapted = read_groups(install("bert", "LOKR"))
    expected = gradients_of(replace(adapted, layout=Layout()))

    def refuse(*_, **__):
        raise RuntimeError("no batching rule")

    monkeypatch.setattr(general, "vmap", refuse)
    assert error(gradients_of(replace(adapted, layout=Layout())), expected) < 1e-12


def test_few_examples_at_once_where_their_gradients_are_large(monkeypatch):
    adapted = replace(read_groups(install("bert", "LOKR")), layout=Layout())
    expected = gradients_of(adapted)
    monkeypatch.setattr(general, "ENTRIES", 1)
    assert error(gradients_of(adapted), expected) < 1e-12


@pytest.mark.parametrize("looped", [False, True])
def test_what_nothing_depends_on_is_named(looped):
    model = families.build("bert")
    model.bert.unread = nn.Linear(16, 16).double().eval()
    train_only(model, ["query", "unread"])
    adapted = read_groups(model)
    layout = families.layout_of(adapted, SEQUENCES)
    assert layout.idle == ("bert.unread",)
    adapted = replace(adapted, layout=replace(layout, looped=looped))
    with pytest.raises(KernelError, match=r"'bert\.unread'.*: leave it out"):
        group_features(adapted, cases.batch_of(SEQUENCES), output_reduction("margin", 2))


def test_a_table_that_two_modules_hold_and_one_reads():
    model = families.build("t5")
    train_only(model, ["shared", "block.0"])
    adapted = read_groups(model)
    adapted = replace(adapted, layout=families.layout_of(adapted, SEQUENCES))
    assert error(gradients_of(adapted), reference_of(adapted)) < 1e-9


@pytest.mark.parametrize("looped", [False, True])
def test_what_is_not_finite_is_named(looped):
    model = install("bert", "LOKR")
    adapted = replace(read_groups(model), layout=Layout(looped=looped))
    with torch.no_grad():
        adapted.groups[-1].parameters[next(iter(adapted.groups[-1].parameters))].fill_(float("inf"))
    with pytest.raises(KernelError, match=r"gradients of .*'bert\.encoder.* are not finite"):
        group_features(adapted, cases.batch_of(SEQUENCES), output_reduction("margin", 2))


@pytest.mark.parametrize("looped", [False, True])
def test_a_model_that_trains_is_refused(looped):
    model = install("bert", "LOKR").train()
    adapted = replace(read_groups(model), layout=Layout(looped=looped))
    with pytest.raises(KernelError, match="eval"):
        group_features(adapted, cases.batch_of(SEQUENCES), output_reduction("margin", 2))


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING", "OFT", "VBLORA", "OSF", "layers"])
def test_scores(method):
    if method == "layers":
        model = families.build("bert", dtype=torch.float32)
        train_only(model, ["layer.1.output", "classifier"])
    else:
        model = install("bert", method).float()
    before = copy.deepcopy(model.state_dict())
    task = cases.task_of("classification", 2)
    results = [
        ft.score(
            model,
            cases.tokenizer(),
            None,
            task,
            settings=ScoreSettings(samples=8, eval_samples=4, batch_size=size, ntk_params="adapter+head"),
        )
        for size in (4, 1)
    ]
    one, other = (result.measurement.k_train_train for result in results)
    assert error(one, other) < 1e-3
    content = results[0].to_dict()
    adapted = results[0].plan.adapted
    numbers = sum(parameter.numel() for group in adapted.groups for parameter in group.parameters.values())
    named = {"layers": "full", "PROMPT_TUNING": "prompt tuning", "PREFIX_TUNING": "prefix tuning"}
    assert content["placement"]["method"] == named.get(method, method)
    assert content["placement"]["trainable_parameters"] == numbers
    assert content["details"]["expected_bytes"]["features"] == 8 * numbers * 4
    assert content["head_kernel"] is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_forecasts_of_what_has_no_formula_are_refused():
    adapted = read_groups(install("bert", "LOHA"))
    with pytest.raises(
        KernelError, match=r"forecasts simulate plain LoRA: parameter .*layer\.0\.attention\.self\.query"
    ):
        check_new_adapters(adapted)


def test_virtual_tokens_take_positions():
    model = install("bert", "PROMPT_TUNING").float()
    model.config.max_position_embeddings = 8  # of 40 that are there
    plan = ft.score(
        model, cases.tokenizer(), None, cases.task_of("classification", 2), settings=ScoreSettings(samples=4)
    ).plan
    assert plan.train.max_length == 5


def test_a_plain_model_of_which_all_trains_is_no_adapter():
    with pytest.raises(ForetuneError, match="train_only"):
        read_adapters(families.build("bert"))


def test_general_and_fast_paths_are_told_apart_by_the_configuration():
    assert read_adapters(place(families.build("bert"), LoraConfig(target_modules=["query"]), seed=0)).groups == ()
    assert read_adapters(install("bert", "LOHA")).adapters == ()
