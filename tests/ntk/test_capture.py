"""The engine under both sinks: modules that run several times, modules that do not matter, outputs of any pooling."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from foretune.errors import KernelError
from foretune.models.adapted import AdaptedModel, Adapter, Batch, Layout
from foretune.models.placement import place, read_adapters
from foretune.models.sites import Site
from foretune.ntk.capture import capture
from foretune.ntk.factors import KeepTokens, adapter_features, token_factors
from foretune.ntk.jacobian import ReduceBlocks, tangent_features
from foretune.ntk.kernel import tangent_kernel
from foretune.ntk.premises import leaves_of, on_gradient
from foretune.ntk.probe import head_inputs
from foretune.tasks.outputs import output_reduction

import cases
import references
from cases import batch_of, lora, ragged, tiny

FULL = output_reduction("full", 3)
WIDTH = 6


class Twice(nn.Module):
    """Runs its layer, its head's hidden layer and its output layer twice each, and averages two logits."""

    def __init__(self, weight=0.5):
        super().__init__()
        self.weight = weight
        self.embedding = nn.Embedding(cases.VOCABULARY, WIDTH)
        self.mix, self.dense, self.spare = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        for _ in range(2):
            x = torch.tanh(self.mix(x))
        self.spare(x)  # runs, and nobody reads it
        pooled = (x * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        first, second = (torch.tanh(self.dense(part)) for part in (x[:, 0], pooled))
        return SimpleNamespace(logits=self.weight * (self.out(first) + self.out(second)))


def adapted_of(model, **changes):
    rows = torch.randn(2 * 4, WIDTH, dtype=torch.float64)  # two draws
    adapter = Adapter(Site("mix", None, "mix", WIDTH, WIDTH, 4, 1.5), model.mix, rows, None)
    head = {"dense": model.dense, "out": model.out}
    return replace(AdaptedModel(model, (adapter,), 2, head), **changes)


def twice(**options):
    return Twice(**options).double().eval()


def batches(sequences):
    return [batch_of(sequences, [4, 1], width=12), batch_of(sequences, [0, 5, 3]), batch_of(sequences, [2])]


def close(found, expected):
    return np.linalg.norm(found - expected) <= 1e-12 * np.linalg.norm(expected)


def gradients(model, sequences, *modules):
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return references.parameter_gradients(model, sequences, FULL.directions, parameters)


def test_modules_that_run_twice_have_the_same_kernel_under_both_sinks_as_by_autograd():
    model, sequences = twice(), ragged()
    adapted = adapted_of(model)
    (adapter,) = adapted.adapters
    features = tangent_features(adapted, batches(sequences), FULL, n=6)
    factors = token_factors(adapted, batches(sequences), FULL, n=6, storage=torch.float64)
    of_w = references.parameter_gradients(model, sequences, FULL.directions, [model.mix.weight])
    of_w = of_w.reshape(6, FULL.n_outputs, WIDTH, WIDTH)
    from_tokens = adapter_features(factors, [adapter.rows], draws=2)
    for draw, a in enumerate(adapter.rows.unflatten(0, (2, 4)).numpy()):
        of_b = 1.5 * of_w @ a.T  # ∂z/∂B = s · ∂z/∂W · Aᵀ
        expected = references.full_kernel(of_b.reshape(6, FULL.n_outputs, -1))
        for found in (features, from_tokens):
            assert close(tangent_kernel(found).matrices()[draw], expected)
    (mix,) = factors.modules
    assert (mix.starts[1:] - mix.starts[:-1]).tolist() == [2 * len(ids) for ids in sequences]


def test_head_modules_that_run_twice():
    model, sequences = twice(), ragged()
    adapted = adapted_of(model)
    features = tangent_features(adapted, batches(sequences), FULL, n=6)
    of_head = gradients(model, sequences, model.dense, model.out)
    assert close(tangent_kernel(features).head, references.full_kernel(of_head))
    factors = token_factors(adapted, batches(sequences), FULL, n=6, storage=torch.float64)
    (dense,) = factors.hidden
    expected = gradients(model, sequences, model.dense)
    for row in range(6):
        place, h, g = dense.of(torch.tensor([row]), torch.float64)
        assert len(place) == 2
        found = torch.cat([torch.einsum("ktq,tp->kqp", g, h).flatten(1), g.sum(1)], dim=1)
        assert close(found.numpy(), expected[row])
    assert torch.allclose(model.out(factors.inputs), factors.logits, rtol=1e-12, atol=1e-14)
    inputs = head_inputs(adapted, {"out": model.out}, batches(sequences), n=6, n_outputs=3)
    assert torch.allclose(inputs, factors.inputs, rtol=1e-12, atol=1e-14)


def test_an_output_layer_whose_bias_counts_twice_is_refused():
    adapted, sequences = adapted_of(twice(weight=1.0)), ragged()
    with pytest.raises(KernelError, match="hold the bias of the output layer 2 times"):
        token_factors(adapted, batches(sequences), FULL, n=6)
    with pytest.raises(KernelError, match="hold the bias of the output layer 2 times"):
        head_inputs(adapted, {"out": adapted.model.out}, batches(sequences), n=6, n_outputs=3)
    features = tangent_features(adapted, batches(sequences), FULL, n=6)  # its gradient is known all the same
    of_head = gradients(adapted.model, sequences, adapted.model.dense, adapted.model.out)
    assert close(tangent_kernel(features).head, references.full_kernel(of_head))


def by_features(adapted, sequences):
    return tangent_features(adapted, [batch_of(sequences)], FULL, n=len(sequences))


def by_tokens(adapted, sequences):
    return token_factors(adapted, [batch_of(sequences)], FULL, n=len(sequences))


SINKS = [by_features, by_tokens]


def with_site(adapted, name, module):
    (first,) = adapted.adapters
    return replace(adapted, adapters=(first, replace(first, site=replace(first.site, name=name), module=module)))


@pytest.mark.parametrize("sink", SINKS)
def test_modules_that_do_not_matter_are_refused_whatever_becomes_of_them(sink):
    model = twice()
    adapted, absent = adapted_of(model), nn.Linear(WIDTH, WIDTH).double()
    with pytest.raises(KernelError, match="outputs do not depend on module 'spare': leave it out"):
        sink(with_site(adapted, "spare", model.spare), ragged())
    with pytest.raises(KernelError, match="'absent' is not used in the forward pass: leave it out"):
        sink(with_site(adapted, "absent", absent), ragged())
    with pytest.raises(KernelError, match="'absent' is not used in the forward pass: leave it out"):
        sink(replace(adapted, head={"absent": absent, **adapted.head}), ragged())
    with pytest.raises(KernelError, match="module 'mix' is named twice"):
        sink(with_site(adapted, "mix", model.dense), ragged())


@pytest.mark.parametrize("sink", SINKS)
def test_outputs_and_gradients_must_be_finite(sink):
    model = twice()
    with torch.no_grad():
        model.dense.weight[0, 0] = float("nan")
    with pytest.raises(KernelError, match="gradients of module 'mix' are not finite"):
        sink(adapted_of(model), ragged())
    model = twice()
    with torch.no_grad():
        model.out.bias[1] = float("inf")
    with pytest.raises(KernelError, match="the model's outputs are not finite"):
        sink(adapted_of(model), ragged())


@pytest.mark.parametrize("sink", SINKS)
def test_what_is_no_classifier_of_these_classes_is_refused(sink):
    adapted = adapted_of(twice())
    adapted.model.register_forward_hook(lambda _, __, output: (output.logits[:, :2],))
    with pytest.raises(KernelError, match="logits have shape"):
        sink(adapted, ragged())


def test_a_part_of_the_head_that_nobody_reads_has_no_gradient():
    model, sequences = twice(), ragged()
    adapted = adapted_of(model)
    more = replace(adapted, head={"spare": model.spare, **adapted.head})
    found, expected = by_features(more, sequences), by_features(adapted, sequences)
    assert np.array_equal(tangent_kernel(found).head, tangent_kernel(expected).head)
    spare, dense = token_factors(more, [batch_of(sequences)], FULL, n=6, storage=torch.float64).hidden
    assert not spare.g.any()
    assert dense.g.any()


def test_an_output_that_a_module_does_not_reach_is_zero():
    """Gradients of the other outputs are kept."""
    model, sequences = twice(), ragged(2)
    batch = batch_of(sequences)

    class One:
        """A module that only the first output has reached, as far as this sink is told."""

        def __init__(self, inner):
            self.inner = inner

        def use(self, module, h, y):
            receive = self.inner.use(module, h, y)
            return lambda output, g: receive(output, g) if output == 0 else None

        def finish(self):
            return self.inner.finish()

    adapted = adapted_of(model)
    reduce, keep = ReduceBlocks(adapted, 2, FULL), KeepTokens(adapted, 2, FULL, torch.float64)
    logits = capture(adapted, batch, FULL.directions, One(reduce))
    capture(adapted, batch, FULL.directions, One(keep))
    blocks, part = reduce.features(logits), keep.part(batch.rows, logits)
    assert torch.equal(blocks.b[0][0], by_features(adapted, sequences).b[0][0])
    assert not blocks.b[0][1].any()
    assert part.g[0][0].any()
    assert not part.g[0][1].any()


def test_texts_of_one_token_beside_longer_ones():
    """The head of a decoder runs over one position of the former, and over many of the latter."""
    model = place(tiny("gpt2", 3), lora("gpt2"), seed=0)
    adapted = read_adapters(model)
    sequences = [[7], *ragged(3)]
    whole = tangent_features(adapted, [batch_of(sequences)], FULL, n=4)
    for first in ([0], [1, 2]):
        rest = [row for row in range(4) if row not in first]
        parts = [batch_of(sequences, first), batch_of(sequences, rest)]
        found = tangent_features(adapted, parts, FULL, n=4)
        assert close(tangent_kernel(found).head, tangent_kernel(whole).head)
    short, long = (tangent_features(adapted, [batch_of(part)], FULL, n=len(part)) for part in ([[7]], sequences[1:]))
    assert close(tangent_kernel(short, long).head, tangent_kernel(whole).head[:2, 2:])
    assert close(tangent_kernel(long, short).head, tangent_kernel(whole).head[2:, :2])


@pytest.mark.parametrize("sink", SINKS)
def test_models_whose_texts_go_one_at_a_time_never_see_two(sink):
    model = twice()
    seen = []
    model.register_forward_pre_hook(lambda _, __, options: seen.append(len(options["input_ids"])), with_kwargs=True)
    sink(adapted_of(model, layout=Layout(singly=("mix",))), ragged())
    head_inputs(
        adapted_of(model, layout=Layout(singly=("mix",))),
        {"out": model.out},
        [batch_of(ragged())],
        n=6,
        n_outputs=3,
    )
    assert seen == [1] * 12


def test_head_inputs_need_every_position_once():
    adapted = adapted_of(twice())
    with pytest.raises(KernelError, match="exactly once"):
        head_inputs(adapted, {"out": adapted.model.out}, [batch_of(ragged(), [0, 2])], n=6, n_outputs=3)
    with pytest.raises(KernelError, match="no examples"):
        head_inputs(adapted, {"out": adapted.model.out}, [], n=0, n_outputs=3)


def test_batches_are_told_apart_by_their_rows():
    batch = Batch(torch.tensor([3, 1]), batch_of(ragged(2)).inputs)
    assert [one.rows.tolist() for one in batch.singles()] == [[3], [1]]


def gradient_below(view, change):
    """What `on_gradient` hands out of an output z that a model changes after it, and what autograd says."""
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    handed = []
    y = on_gradient(view(x * 2.0), lambda gradient: handed.append(gradient.clone()))
    (change(y) * torch.arange(24.0, dtype=torch.float64).reshape(y.shape)).sum().backward()
    of_output = torch.arange(24.0, dtype=torch.float64).reshape(y.shape)
    return handed, of_output, x.grad


def halved(y):
    """As Longformer scales its queries, in place."""
    y /= 2.0
    return y


VIEWS = {
    "no view": lambda y: y,
    "view of the whole": lambda y: y.view(2, 12),
    "view in another order, copied": lambda y: y.transpose(1, 2),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("change", [lambda y: y, halved], ids=["as it is", "changed in place"])
def test_the_gradient_of_an_output_is_that_before_the_model_changes_it(view, change):
    handed, of_output, below = gradient_below(view, change)
    scale = 0.5 if change is halved else 1.0
    assert len(handed) == 1
    assert torch.equal(handed[0], scale * of_output)
    plain = torch.ones(2, 3, 4, dtype=torch.float64, requires_grad=True)
    (view(plain * 2.0) * of_output).sum().backward()
    assert torch.allclose(below, scale * plain.grad, rtol=1e-15)


def test_a_view_of_a_part_is_copied():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    handed = []
    part = (x * 2.0)[1:3]
    copy = on_gradient(part, handed.append)
    assert copy.data_ptr() != part.data_ptr()
    halved(copy).sum().backward()
    (found,) = handed
    assert torch.equal(found, torch.full((2, 3), 0.5, dtype=torch.float64))
    assert torch.equal(x.grad, torch.tensor([[0.0], [1.0], [1.0], [0.0]], dtype=torch.float64).expand(4, 3))


@pytest.mark.parametrize("view", [lambda y: y, lambda y: y.view(2, 6)], ids=["no view", "view"])
def test_every_output_hands_its_own_gradient_out(view):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    handed = []
    y = halved(on_gradient(view(x * 2.0), lambda gradient: handed.append(gradient.clone())))
    for output in range(3):
        torch.autograd.grad((y * (output + 1.0)).sum(), [x], retain_graph=True)
    assert [gradient.unique().tolist() for gradient in handed] == [[0.5], [1.0], [1.5]]
    assert all(gradient.shape == y.shape for gradient in handed)


def test_below_an_output_that_nothing_trains_there_is_a_new_leaf():
    y = torch.randn(2, 3)
    handed = []
    above = on_gradient(y, handed.append)
    (leaf,) = leaves_of(above.sum())
    assert above.data_ptr() != y.data_ptr()
    assert torch.equal(leaf, y)
    (gradient,) = torch.autograd.grad((3.0 * above).sum(), [leaf])
    assert torch.equal(handed[0], gradient)
