import copy

import numpy as np
import pytest
import torch
from peft import get_peft_model

from foretune.errors import KernelError
from foretune.models.placement import place, read_adapters
from foretune.ntk.jacobian import tangent_features
from foretune.ntk.kernel import tangent_kernel
from foretune.tasks.outputs import output_reduction

import cases
import references
from cases import MODELS, batch_of, lora, ragged, tiny, within

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def features_of(model, sequences, output, batches=None, **options):
    adapted = read_adapters(model, **options)
    reduction = output_reduction(output, model.config.num_labels)
    return tangent_features(adapted, batches or [batch_of(sequences)], reduction, n=len(sequences))


def reference_blocks(model, sequences, reduction, dtype=torch.float64):
    """Kernel of every site by loops over autograd on peft's own parameters, in float64."""
    exact = copy.deepcopy(model).double()
    of_sites = [references.named_parameters(exact, site.name + ".", "lora_") for site in read_adapters(model).sites]
    parameters = [parameter for of_site in of_sites for parameter in of_site]
    gradients = references.parameter_gradients(exact, sequences, reduction.directions, parameters)
    ends = np.cumsum([sum(parameter.numel() for parameter in of_site) for of_site in of_sites])
    return [
        references.full_kernel(own) if reduction.block else references.scalar_kernel(own, reduction.scale)
        for own in np.split(gradients, ends[:-1], axis=2)
    ]


def assert_blocks(kernel, expected, tolerance):
    assert len(kernel.sites) == len(expected)
    for site, block, reference in zip(kernel.sites, kernel.blocks[:, 0].sum(1), expected, strict=True):
        assert np.linalg.norm(reference) > 0, site
        assert relative_error(block, reference) < tolerance, site.name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize(("n_classes", "output"), [(2, "margin"), (5, "trace")])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_equal_autograd_on_peft_parameters(name, n_classes, output, dtype):
    model = place(tiny(name, n_classes), lora(name), seed=0).to(dtype)
    sequences = ragged()
    kernel = tangent_kernel(features_of(model, sequences, output))
    tolerance = within(name, TOLERANCE[dtype])
    assert_blocks(kernel, reference_blocks(model, sequences, kernel.reduction), tolerance)


@pytest.mark.parametrize("output", ["full", "class:1", "class:4", "trace"])
def test_every_reduction_equals_its_reference(output):
    model = place(tiny("bert", 5), lora("bert"), seed=0)
    sequences = ragged()
    kernel = tangent_kernel(features_of(model, sequences, output))
    assert_blocks(kernel, reference_blocks(model, sequences, kernel.reduction), 1e-10)


def test_trace_is_the_mean_over_centred_logits():
    model = place(tiny("bert", 3), lora("bert"), seed=0)
    sequences = ragged()
    found = tangent_kernel(features_of(model, sequences, "trace")).matrices()[0]
    parameters = references.named_parameters(model, "lora_")
    centred = np.eye(3) - 1 / 3
    gradients = references.parameter_gradients(model, sequences, centred, parameters)
    assert relative_error(found, references.scalar_kernel(gradients, 1 / 3)) < 1e-10


INITS = {
    "kaiming": {"init_lora_weights": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "random-b": {"init_lora_weights": False},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layer.0.attention.self.query": 2}, "alpha_pattern": {"value": 3}},
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("init", INITS)
def test_every_initialisation_equals_its_reference(init, dtype):
    base = tiny("bert", dtype=torch.float32)  # peft factorises weights in float32
    model = place(base, lora("bert", **INITS[init]), seed=0).to(dtype)
    sequences = ragged()
    kernel = tangent_kernel(features_of(model, sequences, "margin"))
    assert_blocks(kernel, reference_blocks(model, sequences, kernel.reduction), TOLERANCE[dtype])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n_classes", [2, 5])
def test_trained_adapter_has_an_a_block(name, n_classes):
    model = cases.with_nonzero_b(place(tiny(name, n_classes), lora(name), seed=0))
    sequences = ragged()
    features = features_of(model, sequences, None, draws=5)
    assert features.draws == 1  # nothing to draw again
    assert all(a is not None for a in features.a)
    kernel = tangent_kernel(features)
    assert_blocks(kernel, reference_blocks(model, sequences, kernel.reduction), within(name, 1e-10))


def test_a_users_own_peft_model_is_read_as_it_is():
    torch.manual_seed(11)
    model = get_peft_model(tiny("bert"), lora("bert")).eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    sequences = ragged()
    kernel = tangent_kernel(features_of(model, sequences, "margin", draws=3, seed=5))
    assert_blocks(kernel, reference_blocks(model, sequences, kernel.reduction), 1e-10)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", MODELS)
def test_batches_padding_and_order_change_nothing(name):
    model = place(tiny(name), lora(name), seed=0)
    sequences = ragged()
    whole = features_of(model, sequences, "margin")
    pieces = [batch_of(sequences, [4, 1], width=12), batch_of(sequences, [0, 5, 3]), batch_of(sequences, [2])]
    split = features_of(model, sequences, "margin", batches=pieces)
    assert relative_error(split.logits, whole.logits) < within(name, 1e-12)
    a, b = tangent_kernel(whole).matrices(), tangent_kernel(split).matrices()
    assert relative_error(b, a) < within(name, 1e-11)


def test_permuting_the_samples_permutes_the_kernel():
    model = place(tiny("bert"), lora("bert"), seed=0)
    sequences = ragged()
    order = [3, 0, 5, 1, 4, 2]
    kernel = tangent_kernel(features_of(model, sequences, "margin")).matrices()[0]
    permuted = tangent_kernel(features_of(model, [sequences[i] for i in order], "margin")).matrices()[0]
    assert relative_error(permuted, kernel[np.ix_(order, order)]) < 1e-12


def test_forward_is_the_adapted_models_own():
    model = cases.with_nonzero_b(place(tiny("roberta"), lora("roberta"), seed=0))
    sequences = ragged()
    batch = batch_of(sequences)
    with torch.no_grad():
        expected = model(**batch.inputs).logits
    assert torch.allclose(features_of(model, sequences, "margin").logits, expected, rtol=1e-13)


def test_nothing_is_propagated_below_the_lowest_site():
    model = place(tiny("bert"), lora("bert", layers_to_transform=[1], target_modules=["query"]), seed=0)
    seen = []
    layer = model.base_model.model.bert.encoder.layer

    def note(name):
        return lambda module, args, output: seen.append((name, output.requires_grad))

    layer[0].attention.self.query.register_forward_hook(note("layer 0"))
    layer[1].attention.self.key.register_forward_hook(note("key beside the site"))
    layer[1].attention.output.dense.register_forward_hook(note("above the site"))
    features_of(model, ragged(), "margin")
    assert seen == [("layer 0", False), ("key beside the site", False), ("above the site", True)]


def test_one_backward_pass_for_each_output(monkeypatch):
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    for output, n_classes, expected in [("margin", 2, 1), ("trace", 5, 4), ("full", 5, 4), ("class:2", 5, 1)]:
        calls.clear()
        features_of(place(tiny("bert", n_classes), lora("bert"), seed=0), ragged(), output)
        assert len(calls) == expected


def test_no_gradient_is_left_on_the_model():
    model = place(tiny("bert"), lora("bert"), seed=0)
    features_of(model, ragged(), "margin")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_shared_modules_add_up():
    torch.manual_seed(0)
    import transformers

    config = transformers.AlbertConfig(
        vocab_size=cases.VOCABULARY, embedding_size=8, pad_token_id=cases.PAD, num_labels=2, **cases.SIZES
    )
    base = transformers.AlbertForSequenceClassification(config).eval().double()
    model = place(base, lora("bert", target_modules=["query", "value"]), seed=0)
    sequences = ragged()
    kernel = tangent_kernel(features_of(model, sequences, "margin"))
    assert len(kernel.sites) == 2  # one set of weights, run for both layers
    assert_blocks(kernel, reference_blocks(model, sequences, kernel.reduction), 1e-10)


def test_dropout_left_on_is_an_error():
    model = place(tiny("bert"), lora("bert"), seed=0).train()
    with pytest.raises(KernelError, match=r"dropout .* is on .*call model.eval\(\)"):
        features_of(model, ragged(), "margin")


def test_training_mode_without_dropout_modules_is_an_error():
    model = place(tiny("llama"), lora("llama"), seed=0)  # its attention drops by a function
    model.base_model.model.model.layers[1].self_attn.train()
    with pytest.raises(KernelError, match=r"layers\.1\.self_attn' is in training mode: call model.eval\(\)"):
        features_of(model, ragged(), "margin")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_a_trained_adapter(dtype):
    """peft keeps adapters of a half-precision model in float32: the two dtypes meet in the hooks."""
    exact = cases.with_nonzero_b(place(tiny("bert", dtype=torch.float32), lora("bert"), seed=0))
    half = cases.with_nonzero_b(place(tiny("bert", dtype=dtype), lora("bert"), seed=0))
    with torch.no_grad():
        for one, other in zip(half.parameters(), exact.parameters(), strict=True):
            one.copy_(other)
    found, expected = (tangent_kernel(features_of(m, ragged(), "margin")).matrices()[0] for m in (half, exact))
    assert relative_error(found, expected) < 0.3


def test_non_finite_weights_name_the_module():
    base = tiny("bert")
    base.bert.encoder.layer[1].attention.self.value.weight.data[0, 0] = float("nan")
    with pytest.raises(KernelError, match="not finite"):
        features_of(place(base, lora("bert"), seed=0), ragged(), "margin")


def test_a_module_without_influence_is_an_error():
    # only the first token's query of the last layer reaches a BERT classifier; its head is cut off here
    base = tiny("bert")
    base.classifier.weight.data.zero_()
    model = place(base, lora("bert"), seed=0)
    assert np.all(tangent_kernel(features_of(model, ragged(), "margin")).matrices() == 0)


def test_positions_must_be_complete():
    model = place(tiny("bert"), lora("bert"), seed=0)
    sequences = ragged()
    with pytest.raises(KernelError, match="exactly once"):
        features_of(model, sequences, "margin", batches=[batch_of(sequences, [0, 2])])
    with pytest.raises(KernelError, match="no examples"):
        tangent_features(read_adapters(model), [], output_reduction("margin", 2), n=0)
