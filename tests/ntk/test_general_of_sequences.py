"""Every adapter method of peft in language models: gradients of sequences against loops over them, in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import general_methods
import language_methods as methods
from foretune.errors import ForetuneError, KernelError, reason
from foretune.language.encode import NO_LOSS
from foretune.models.adapted import Layout
from foretune.models.groups import read_groups, train_only
from foretune.models.placement import read_adapters
from foretune.ntk.sequence_features import feature_bytes, sequence_features, sequence_kernel
from foretune.ntk.sequence_groups import find_sequence_layout
from general_methods import error
from language_methods import GENERAL, install

PAIRS = [(method, family) for method, ways in GENERAL.items() for family in ways]
RUNS = [pair for pair in PAIRS if GENERAL[pair[0]][pair[1]] in ("by module", "loop")]
PARTS = ([0, 2], [1, 3, 4])


def layout_of(adapted, family, given):
    return find_sequence_layout(adapted, [methods.batch_of(adapted.model, family, given[:2])])


def features_of(adapted, family, given, parts=PARTS, draws=2, **options):
    batches = [methods.batch_of(adapted.model, family, given, part) for part in parts]
    return sequence_features(adapted, batches, n=len(given), draws=draws, **options)


def gradients_of(features):
    """n × k × P."""
    return torch.cat(features.tangent.v, dim=2).transpose(0, 1).double().numpy()


def parameters_of(adapted):
    return [parameter for group in adapted.groups for parameter in group.parameters.values()]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's, at the first sparse tensor of a process
@pytest.mark.parametrize(("method", "family"), RUNS)
def test_gradients_and_kernels_of_every_method_equal_those_of_a_loop(method, family):
    adapted, given = read_groups(install(family, method)), methods.rows(family)
    layout = layout_of(adapted, family, given)
    assert layout.looped == (GENERAL[method][family] == "loop")
    features = features_of(replace(adapted, layout=layout), family, given, seed=4)
    expected = methods.gradients(adapted.model, family, given, parameters_of(adapted), draws=2, seed=4)
    near = general_methods.TOLERANCE.get(method, 1e-9)
    assert error(gradients_of(features), expected) < near
    counts = methods.counts(family, given)
    np.testing.assert_array_equal(features.targets.numpy(), counts)
    per_token = expected[:, 0] / counts[:, None]
    drawn = (expected[:, 1:] / np.sqrt(2 * counts)[:, None, None]).reshape(2 * len(given), -1)
    for name, j in (("loss", per_token), ("loss-sum", expected[:, 0]), ("fisher", drawn)):
        assert error(sequence_kernel(features, name).matrices[0], j @ j.T) < 2 * near
    held = [tensor for tensor in features.tangent.gradients if tensor.numel()]
    said = feature_bytes(adapted, n=5, outputs=3, draws=1, element_size=held[0].element_size())
    assert said["features"] == sum(tensor.nbytes for tensor in held)


@pytest.mark.parametrize(("method", "family"), [pair for pair in PAIRS if GENERAL[pair[0]][pair[1]] == "batch size 1"])
def test_methods_that_mix_sequences_go_one_at_a_time(method, family):
    adapted, given = read_groups(install(family, method)), methods.rows(family)
    with pytest.raises(KernelError, match=r"losses .* depend on the batch.*use --batch-size 1"):
        layout_of(adapted, family, given)
    apart = [methods.batch_of(adapted.model, family, given[:2], [row]) for row in range(2)]
    layout = find_sequence_layout(adapted, apart)
    features = features_of(replace(adapted, layout=layout), family, given, [[row] for row in range(5)], draws=0)
    expected = methods.gradients(adapted.model, family, given, parameters_of(adapted))
    assert error(gradients_of(features), expected) < 1e-9


@pytest.mark.parametrize(("method", "family"), [pair for pair in PAIRS if GENERAL[pair[0]][pair[1]] == "refused"])
def test_refusals_say_why(method, family):
    try:
        model = install(family, method)
    except (ValueError, TypeError, NotImplementedError) as refused:  # peft's own
        said = reason(refused)
    else:
        with pytest.raises(ForetuneError) as caught:
            layout_of(read_groups(model), family, methods.rows(family))
        said = str(caught.value)
    assert methods.WAYS.refusal(method, family) in said
    assert "\n" not in said


WHOLE = {
    "llama": ["layers.1", "norm", "embed_tokens"],
    "gpt2": ["h.1", "ln_f", "wpe", "lm_head"],  # tied to the table of tokens; positions are the same for all sequences
    "t5": ["decoder.block.1", "shared", "relative_attention_bias"],
}


@pytest.mark.parametrize("family", WHOLE)
def test_layers_that_train_whole(family):
    model = methods.build(family)
    train_only(model, WHOLE[family])
    adapted, given = read_adapters(model), methods.rows(family)
    layout = layout_of(adapted, family, given)
    assert not layout.looped
    assert bool(layout.singly) == (family != "llama")
    found = gradients_of(features_of(replace(adapted, layout=layout), family, given, draws=1))
    expected = methods.gradients(model, family, given, parameters_of(adapted), draws=1)
    assert error(found, expected) < 1e-9


@pytest.mark.parametrize("options", [{"target_modules": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["lm_head"]}])
def test_what_lora_trains_beside_linear_modules(options):
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["v_proj"], **options})
    model = get_peft_model(methods.build("llama", torch.float32), config).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    adapted, given = read_adapters(model), methods.rows("llama")
    assert adapted.groups
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in parameters_of(adapted)} == {id(p) for p in trained}
    found = gradients_of(features_of(replace(adapted, layout=layout_of(adapted, "llama", given)), "llama", given))
    assert error(found, methods.gradients(model, "llama", given, parameters_of(adapted), draws=2)) < 1e-9


@pytest.mark.parametrize("family", methods.FAMILIES)
@pytest.mark.parametrize("method", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "LOHA"])
def test_losses_are_those_that_peft_trains_on(method, family):
    if methods.WAYS.refusal(method, family):
        return
    adapted, given = read_groups(install(family, method)), methods.rows(family)
    features = features_of(adapted, family, given, draws=0)
    for row, (first, second) in enumerate(given):
        labels = torch.tensor([second])
        if family != "t5":  # as in a run, where the first token is no target, though virtual ones stand before it
            labels[:, 0] = NO_LOSS
        mask = torch.ones(1, len(first), dtype=torch.long)
        with torch.no_grad():
            mean = adapted.model(input_ids=torch.tensor([first]), attention_mask=mask, labels=labels).loss
        total = float(mean) * methods.counts(family, given)[row]
        assert float(features.losses[row]) == pytest.approx(total, rel=1e-6)  # a mean in float32


@pytest.mark.parametrize("family", methods.FAMILIES)
def test_nobody_has_looked_and_the_loop_runs(family):
    adapted, given = read_groups(install(family, "VERA")), methods.rows(family)
    by_module, looped = (
        gradients_of(features_of(replace(adapted, layout=layout), family, given)) for layout in (Layout(), None)
    )
    assert error(by_module, looped) < 1e-10


def test_what_a_module_hides_is_found_by_the_loop():
    model = methods.build("llama")
    outer = model.model.layers[1].self_attn
    outer.q_proj = general_methods.Hidden(outer.q_proj, model.model.layers[0].self_attn.q_proj.weight)
    train_only(model.eval(), ["layers.0.self_attn.q_proj"])
    adapted, given = read_groups(model), methods.rows("llama")
    layout = layout_of(adapted, "llama", given)
    assert layout.looped
    found = gradients_of(features_of(replace(adapted, layout=layout), "llama", given, draws=0))
    assert error(found, methods.gradients(model, "llama", given, parameters_of(adapted))) < 1e-10


def test_a_pass_leaves_the_model_as_it_is():
    adapted, given = read_groups(install("llama", "PROMPT_TUNING")), methods.rows("llama")
    flags = {name: p.requires_grad for name, p in adapted.model.named_parameters()}
    before = {name: p.detach().clone() for name, p in adapted.model.named_parameters()}
    for layout in (layout_of(adapted, "llama", given), None):
        features = features_of(replace(adapted, layout=layout), "llama", given)
        assert not any(gradient.requires_grad for gradient in features.tangent.gradients)
        assert "get_prompt" not in vars(adapted.model)
        for name, parameter in adapted.model.named_parameters():
            assert parameter.requires_grad == flags[name], name
            assert parameter.grad is None, name
            assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("looped", [False, True])
def test_faults_are_named(looped):
    model = methods.build("llama")
    model.model.unread = nn.Linear(16, 16).double().eval()
    train_only(model, ["q_proj", "unread"])
    adapted, given = read_groups(model), methods.rows("llama")
    with pytest.raises(KernelError, match=r"no loss depends on 'model\.unread': leave it out"):
        layout_of(adapted, "llama", given)
    train_only(model, ["q_proj"])
    adapted = replace(read_groups(model), layout=Layout(looped=looped))
    with pytest.raises(KernelError, match="eval"):
        features_of(replace(adapted, model=model.train()), "llama", given)
    with torch.no_grad():
        model.eval().model.layers[1].self_attn.q_proj.weight.fill_(float("inf"))
    with pytest.raises(KernelError, match=r"gradients of 'model\.layers.* are not finite"):
        features_of(adapted, "llama", given)
