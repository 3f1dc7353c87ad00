import numpy as np
import pytest
import torch

import families
from foretune.errors import KernelError
from foretune.models.adapted import AdaptedModel, Batch
from foretune.models.placement import place, read_adapters
from foretune.ntk.factors import adapter_features, token_factors
from foretune.ntk.jacobian import tangent_features
from foretune.tasks.outputs import output_reduction

import cases
import references
from cases import MODELS, batch_of, lora, ragged, tiny, within

EXACT = torch.float64


def adapted_of(name, n_classes=2, *, draws=1, **options):
    return read_adapters(place(tiny(name, n_classes), lora(name, **options), seed=0), draws=draws, seed=0)


def factors_of(adapted, sequences, output, batches=None, storage=EXACT):
    reduction = output_reduction(output, adapted.model.config.num_labels)
    return token_factors(adapted, batches or [batch_of(sequences)], reduction, n=len(sequences), storage=storage)


def features_of(adapted, sequences, output):
    reduction = output_reduction(output, adapted.model.config.num_labels)
    return tangent_features(adapted, [batch_of(sequences)], reduction, n=len(sequences))


def rows_of(adapted):
    return [adapter.rows for adapter in adapted.adapters]


def n_bytes(factors):
    """Memory of the factors; what modules share counts once."""
    tensors = {id(t): t for part in (*factors.modules, *factors.hidden) for t in (part.h, part.g)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def pieces(sequences):
    return [batch_of(sequences, [4, 1], width=12), batch_of(sequences, [0, 5, 3]), batch_of(sequences, [2])]


def error(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("n_classes", "output"), [(2, "margin"), (3, "full")])
@pytest.mark.parametrize("name", MODELS)
def test_adapter_features_are_the_tangent_features(name, n_classes, output):
    """Whatever the batches, their order and their padding, and for several draws of A."""
    adapted, sequences = adapted_of(name, n_classes, draws=3), ragged()
    expected = features_of(adapted, sequences, output)
    for batches in ([batch_of(sequences)], [batch_of(sequences, width=14)], pieces(sequences)):
        found = adapter_features(factors_of(adapted, sequences, output, batches), rows_of(adapted), draws=adapted.draws)
        assert (found.sites, found.draws) == (expected.sites, 3)
        assert error(found.logits, expected.logits) < within(name, 1e-12)
        for site, own, reference in zip(found.sites, found.b, expected.b, strict=True):
            assert own.shape == reference.shape
            assert error(own, reference) < within(name, 1e-10), site.name


def test_more_examples_than_are_multiplied_at_once():
    adapted, sequences = adapted_of("bert"), ragged(70)
    found = adapter_features(factors_of(adapted, sequences, "margin"), rows_of(adapted))
    for own, reference in zip(found.b, features_of(adapted, sequences, "margin").b, strict=True):
        assert error(own, reference) < 1e-10


def summed(tokens, row):
    place, h, g = tokens.of(torch.tensor([row]), EXACT)
    assert not place.any()
    return torch.einsum("ktq,tp->kqp", g, h)


def weight_of(model, name):
    module = model.get_submodule("base_model.model." + name)
    held = getattr(module, "base_layer", module)
    # GPT-2's Conv1D holds the transposed weight
    return held.weight, type(held).__name__ == "Conv1D"


@pytest.mark.parametrize("name", MODELS)
def test_sums_over_tokens_are_the_gradients_of_the_full_weights(name):
    adapted, sequences = adapted_of(name, 3), ragged()
    factors = factors_of(adapted, sequences, "full", pieces(sequences))
    weights = [weight_of(adapted.model, site.name) for site in factors.sites]
    parameters = [weight for weight, _ in weights]
    gradients = references.parameter_gradients(adapted.model, sequences, factors.reduction.directions, parameters)
    ends = np.cumsum([weight.numel() for weight in parameters])
    for tokens, (_, transposed), expected in zip(
        factors.modules, weights, np.split(gradients, ends[:-1], axis=2), strict=True
    ):
        for row in range(len(sequences)):
            found = summed(tokens, row)
            found = found.mT if transposed else found
            distance = np.linalg.norm(found.flatten(1).numpy() - expected[row])
            assert distance < within(name, 1e-10) * np.linalg.norm(expected[row])


@pytest.mark.parametrize("name", ["roberta", "mpnet", "distilbert"])
def test_hidden_modules_of_the_head_and_its_inputs(name):
    """The head's modules below the last one train whole: weight and bias."""
    adapted, sequences = adapted_of(name), ragged()
    factors = factors_of(adapted, sequences, "margin", pieces(sequences))
    (tokens,) = factors.hidden
    hidden, last = adapted.head.values()
    parameters = [hidden.weight, hidden.bias]
    expected = references.parameter_gradients(adapted.model, sequences, factors.reduction.directions, parameters)
    for row in range(len(sequences)):
        place, _, g = tokens.of(torch.tensor([row]), EXACT)
        assert len(place) == 1
        found = torch.cat([summed(tokens, row).flatten(1), g.sum(1)], dim=1).numpy()
        assert np.linalg.norm(found - expected[row]) < 1e-10 * np.linalg.norm(expected[row])
    assert torch.allclose(last(factors.inputs), factors.logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_inputs_of_the_output_layer_give_the_logits(name):
    """Decoders run it over all positions and read one."""
    adapted, sequences = adapted_of(name, 3), ragged()
    factors = factors_of(adapted, sequences, "full", pieces(sequences))
    assert factors.hidden == ()
    (head,) = adapted.head.values()
    assert error(head(factors.inputs).detach(), factors.logits) < within(name, 1e-12)


def test_inputs_that_modules_share_are_stored_once():
    adapted, sequences = adapted_of("bert", target_modules=["query", "key", "value", "intermediate.dense"]), ragged()
    factors = factors_of(adapted, sequences, "margin", pieces(sequences))
    held = {}
    for site, tokens in zip(factors.sites, factors.modules, strict=True):
        held.setdefault((site.layer, site.kind == "intermediate.dense"), []).append(tokens.h.data_ptr())
    assert {len(pointers) for pointers in held.values()} == {3, 1}
    assert all(len(set(pointers)) == 1 for pointers in held.values())
    assert len({pointers[0] for pointers in held.values()}) == 4
    positions = sum(map(len, sequences))  # none for padding
    width = 2 * (16 + 3 * 16) + (16 + 24)
    in_last = len(sequences) * (16 + 24)  # the classifier reads one position of the last layer's feed-forward block
    assert n_bytes(factors) == 8 * (positions * width + in_last)


def test_bfloat16_is_within_a_hundredth():
    adapted, sequences = adapted_of("bert"), ragged()
    stored = factors_of(adapted, sequences, "margin", storage=torch.bfloat16)
    assert {tokens.h.dtype for tokens in stored.modules} == {tokens.g.dtype for tokens in stored.modules}
    assert 4 * n_bytes(stored) == n_bytes(factors_of(adapted, sequences, "margin"))
    found = adapter_features(stored, rows_of(adapted))
    for own, reference in zip(found.b, features_of(adapted, sequences, "margin").b, strict=True):
        assert error(own, reference) < 0.01
    assert torch.equal(stored.inputs, factors_of(adapted, sequences, "margin").inputs)


def test_the_model_is_left_as_it_was():
    adapted = adapted_of("roberta")
    flags = {name: p.requires_grad for name, p in adapted.model.named_parameters()}
    factors = factors_of(adapted, ragged(), "margin")
    assert {name: p.requires_grad for name, p in adapted.model.named_parameters()} == flags
    assert all(p.grad is None for p in adapted.model.parameters())
    assert not any(module._forward_hooks for module in adapted.model.modules())
    assert not any(
        t.requires_grad for t in (factors.inputs, factors.logits, factors.modules[0].h, factors.modules[0].g)
    )


def test_training_mode_and_trained_adapters_are_refused():
    model = place(tiny("bert"), lora("bert"), seed=0)
    with pytest.raises(KernelError, match=r"call model.eval\(\)"):
        factors_of(read_adapters(model.train()), ragged(), "margin")
    trained = read_adapters(cases.with_nonzero_b(model.eval()))
    with pytest.raises(KernelError, match="query' has B ≠ 0"):
        factors_of(trained, ragged(), "margin")


def test_a_model_without_a_trained_linear_head_is_refused():
    adapted = adapted_of("bert", task_type=None)
    assert not adapted.head
    with pytest.raises(KernelError, match="no linear head trains"):
        factors_of(adapted, ragged(), "margin")


def test_positions_of_another_sequence_are_not_masked_as_the_inputs():
    """A decoder's positions are shifted: its mask has the input's shape by accident. And masks may be of any kind."""
    adapted = read_adapters(place(families.build("bart"), families.all_linear("bart"), seed=0))
    sequences = families.ragged()
    batch = batch_of(sequences)
    expected = features_of(adapted, sequences, "margin")
    lying = {**batch.inputs, "attention_mask": batch.inputs["attention_mask"].double()}
    for inputs in (batch.inputs, lying):
        found = adapter_features(
            factors_of(adapted, sequences, "margin", [Batch(batch.rows, inputs)]), rows_of(adapted)
        )
        assert all(error(own, reference) < 1e-10 for own, reference in zip(found.b, expected.b, strict=True))


def test_a_module_that_does_not_matter_is_refused():
    adapted = adapted_of("bert")
    unused = AdaptedModel(
        adapted.model, adapted.adapters, 1, {"spare": torch.nn.Linear(2, 2), **adapted.head}, adapted.forward
    )
    with pytest.raises(KernelError, match="'spare' is not used in the forward pass"):
        factors_of(unused, ragged(), "margin")


def test_gradients_that_are_not_finite_name_the_module():
    adapted = adapted_of("bert")
    with torch.no_grad():
        next(iter(adapted.head.values())).weight[0, 0] = float("inf")
    with pytest.raises(KernelError, match=r"gradients of module '.*query' are not finite"):
        factors_of(adapted, ragged(), "margin")


@pytest.mark.parametrize("rows", [[[0, 2]], [[0, 1, 2, 3, 4, 5], [5]], [[0, 1, 2, 3, 4, 4]]])
def test_positions_must_be_complete(rows):
    sequences = ragged()
    with pytest.raises(KernelError, match="exactly once"):
        factors_of(adapted_of("bert"), sequences, "margin", [batch_of(sequences, part) for part in rows])


def test_no_batches_are_refused():
    with pytest.raises(KernelError, match="no examples"):
        token_factors(adapted_of("bert"), [], output_reduction("margin", 2), n=0)
