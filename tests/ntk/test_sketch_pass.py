"""Sketches made as gradients come, against the sketch of each number of the exact gradients, one after the other."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import families
from foretune.errors import KernelError
from foretune.models.adapted import Layout
from foretune.models.groups import read_groups, train_only
from foretune.models.placement import place, read_adapters
from foretune.ntk import product_sketch, sketch_pass
from foretune.ntk.capture import capture
from foretune.ntk.feature_sketch import generator_of, sketch_error, sketched
from foretune.ntk.feature_store import site_traces
from foretune.ntk.general import looped_features
from foretune.ntk.jacobian import batch_features
from foretune.ntk.kernel import tangent_kernel
from foretune.ntk.product_sketch import draw_product_sketch
from foretune.ntk.sketch_pass import SketchGroups, batch_sketch, by_products
from foretune.tasks.outputs import output_reduction

import cases

SEQUENCES = [[3, 7, 12, 5, 9, 4], [8, 3, 6], [11, 14, 3, 9, 20, 6, 7, 13, 2], [5, 3, 9, 16]]  # each with one end
WIDTH = 12
SEEDS = 300
PARTS = {
    "bert": ["layer.1", "pooler", "layer.0.attention.self.query.weight"],
    "gpt2": ["h.1", "score"],  # no module of torch's
    "llama": ["layers.1", "norm", "score"],
    "t5": ["block.1.layer.0", "classification_head"],
    "albert": ["albert_layers", "classifier"],  # modules that run twice
    "roberta": ["word_embeddings", "attention.self.key", "LayerNorm"],
}


@pytest.fixture(autouse=True)
def every_weight(monkeypatch):
    monkeypatch.setattr(sketch_pass, "WORTH", 0)


def adapted_of(family, parts=None):
    model = families.build(family)
    train_only(model, PARTS[family] if parts is None else parts)
    adapted = read_groups(model)
    return replace(adapted, layout=families.layout_of(adapted, SEQUENCES))


def exact_of(adapted, reduction, batch=None):
    looped = replace(adapted, layout=Layout(looped=True))
    return looped_features(looped, cases.batch_of(SEQUENCES) if batch is None else batch, reduction)


def slowly(adapted, reduction, exact, seed):
    """Every number of every gradient, times its sign, to its place."""
    chosen, half_width, k, n = by_products(adapted, WIDTH), WIDTH // 2, reduction.n_outputs, exact.n
    rows = k if reduction.block else 1
    halves = np.zeros((2, rows, n, half_width))
    rest = [index for index, group in enumerate(adapted.groups) if group.site.name not in chosen]
    formed = replace(exact, **{name: tuple(getattr(exact, name)[i] for i in rest) for name in ("sites", "b", "a", "v")})
    for half, of_rest in enumerate(sketched(formed, WIDTH, seed=seed).b):
        halves[half] = of_rest[:rows, :, 0].numpy() * np.sqrt(2)
    for index, group in enumerate(adapted.groups):
        if group.site.name not in chosen:
            continue
        (linear,) = group.modules.values()
        numbers = exact.v[index].double().numpy()
        weight = numbers[..., : linear.weight.numel()].reshape(k, n, *linear.weight.shape)
        of_bias = numbers[..., linear.weight.numel() :, None]
        gradient = np.concatenate([weight, of_bias], axis=3) if of_bias.size else weight
        for half in (0, 1):
            generator = generator_of(seed, half, index, 3)
            for output in range(1 if reduction.block else k):
                drawn = draw_product_sketch(generator, half_width, *gradient.shape[2:])
                for i in range(gradient.shape[2]):
                    for j in range(gradient.shape[3]):
                        place_in = (j + drawn.turns[j // half_width]) % half_width
                        place_of = (int(drawn.places[i]) + place_in) % half_width
                        sign = float(drawn.signs[i] * drawn.signs_in[j])
                        if reduction.block:
                            halves[half, :, :, place_of] += sign * gradient[:, :, i, j]
                        else:
                            halves[half, 0, :, place_of] += sign * gradient[output, :, i, j]
    return halves / np.sqrt(2)


@pytest.mark.parametrize("family", PARTS)
@pytest.mark.parametrize("output", ["margin", "trace", "full"])
def test_the_sketch_is_that_of_the_exact_gradients(family, output):
    if output != "margin" and family not in ("bert", "albert"):
        return
    adapted, reduction = adapted_of(family), output_reduction(output, 2)
    exact = exact_of(adapted, reduction)
    expected = slowly(adapted, reduction, exact, seed=5)
    tile = batch_sketch(adapted, cases.batch_of(SEQUENCES), reduction, width=WIDTH, seed=5)
    found = np.stack([half[: expected.shape[1], :, 0].numpy() for half in tile.features.b])
    assert np.abs(found - expected).max() < 1e-10 * np.abs(expected).max()
    assert torch.allclose(tile.traces, site_traces(exact), rtol=1e-9, atol=0.0)
    assert bool(by_products(adapted, WIDTH)) == (family != "gpt2")


def test_an_example_has_one_sketch_in_every_batch(monkeypatch):
    adapted, reduction = adapted_of("bert"), output_reduction("margin", 2)

    def of(rows, width=None):
        tile = batch_sketch(adapted, cases.batch_of(SEQUENCES, rows, width), reduction, width=WIDTH, seed=0)
        return torch.stack(tile.features.b)[:, 0, :, 0]

    whole = of([0, 1, 2, 3])
    parts = [of([3, 1], 12), of([2]), of([0])]
    assert torch.allclose(torch.cat(parts, 1), whole[:, [3, 1, 2, 0]], rtol=0, atol=1e-10 * float(whole.abs().max()))
    monkeypatch.setattr(product_sketch, "CHUNK", {"cpu": 1})
    assert torch.allclose(of([0, 1, 2, 3]), whole, rtol=0, atol=1e-12 * float(whole.abs().max()))
    singly = replace(adapted, layout=replace(adapted.layout, singly=("x",)))
    one_by_one = batch_sketch(singly, cases.batch_of(SEQUENCES), reduction, width=WIDTH, seed=0)
    assert torch.allclose(torch.stack(one_by_one.features.b)[:, 0, :, 0], whole, atol=1e-10 * float(whole.abs().max()))


def recorded(adapted, reduction):
    """Inputs, outputs and gradients of every use of a module in one pass."""
    uses = []

    class Record:
        def use(self, module, h, y):
            gradients = []
            uses.append((module, h, y.clone(), gradients))
            return lambda output, g: gradients.append((output, g.clone()))

        def finish(self):
            return ()

    return uses, capture(adapted, cases.batch_of(SEQUENCES), reduction.directions, Record())


@pytest.mark.parametrize("width", [16, 128])  # inputs wider than a half, and narrower
def test_sketches_of_products_are_unbiased(width):
    adapted = adapted_of(
        "bert", ["layer.1.attention.self.key", "layer.1.intermediate.dense", "layer.0.output.LayerNorm"]
    )
    reduction = output_reduction("margin", 2)
    exact = exact_of(adapted, reduction)
    blocks = tangent_kernel(exact)
    expected, of_modules = blocks.matrices()[0], blocks.blocks[:, 0, 0]
    uses, logits = recorded(adapted, reduction)
    found, said = [], []
    for seed in range(SEEDS):
        sink = SketchGroups(adapted, len(SEQUENCES), reduction, width, seed)
        for module, h, y, gradients in uses:
            receive = sink.use(module, h, y)
            for output, g in gradients:
                receive(output, g)
        list(sink.finish())
        tile = sink.tile(logits)
        found.append(tangent_kernel(tile.features).matrices()[0])
        said.append(np.square(sketch_error([tile.features])[0] * np.linalg.norm(found[-1])))
    found = np.array(found)
    error = found.std(0, ddof=1) / np.sqrt(SEEDS)
    assert np.all(np.abs(found.mean(0) - expected) <= 5 * error)
    assert 0 < error.max() < np.abs(expected).max()

    def bound(kernel):
        diagonal = np.diagonal(kernel, axis1=-2, axis2=-1)
        return diagonal[..., :, None] * diagonal[..., None, :] + kernel**2

    factor = 1 + (width // 2 <= 24)
    assert np.all(found.var(0, ddof=1) <= 1.5 * (bound(expected) + factor * bound(of_modules).sum(0)) / width)
    assert np.mean(said) == pytest.approx(np.mean(np.sum((found - expected) ** 2, axis=(1, 2))), rel=0.3)


def test_what_is_narrow_is_formed(monkeypatch):
    adapted, reduction = adapted_of("bert"), output_reduction("margin", 2)
    monkeypatch.setattr(sketch_pass, "WORTH", 32)
    wide = 16 * 25
    assert not by_products(adapted, WIDTH + 2)
    assert by_products(adapted, WIDTH) == tuple(g.site.name for g in adapted.groups if g.site.others >= wide - 16)
    looped = replace(adapted, layout=replace(adapted.layout, looped=True))
    assert not by_products(looped, 2)
    tile = batch_sketch(looped, cases.batch_of(SEQUENCES), reduction, width=WIDTH, seed=1)
    expected = sketched(exact_of(adapted, reduction), WIDTH, seed=1)
    assert all(torch.allclose(one, other) for one, other in zip(tile.features.b, expected.b, strict=True))


def test_adapters_are_sketched_batch_by_batch():
    adapted = read_adapters(place(cases.tiny("bert"), cases.lora("bert"), seed=0), draws=2, seed=0)
    reduction, batch = output_reduction("margin", 2), cases.batch_of(SEQUENCES)
    features = batch_features(adapted, batch, reduction)
    tile = batch_sketch(adapted, batch, reduction, width=WIDTH, seed=1)
    expected = sketched(features, WIDTH, seed=1)
    assert all(torch.equal(one, other) for one, other in zip(tile.features.b, expected.b, strict=True))
    assert torch.equal(tile.traces, site_traces(features))


def test_a_shared_weight_is_formed():
    model = families.build("bert")
    model.bert.encoder.layer[1].attention.self.key.weight = model.bert.encoder.layer[1].attention.self.query.weight
    train_only(model, ["layer.1.attention.self"])
    adapted = replace(read_groups(model), layout=Layout())
    assert by_products(adapted, WIDTH) == ("bert.encoder.layer.1.attention.self.value",)
    reduction = output_reduction("margin", 2)
    exact = exact_of(adapted, reduction)
    expected = slowly(adapted, reduction, exact, seed=2)
    tile = batch_sketch(adapted, cases.batch_of(SEQUENCES), reduction, width=WIDTH, seed=2)
    found = np.stack([half[:1, :, 0].numpy() for half in tile.features.b])
    assert np.abs(found - expected).max() < 1e-10 * np.abs(expected).max()
    assert torch.allclose(tile.traces, site_traces(exact), rtol=1e-9, atol=0.0)


def test_what_is_not_finite_is_named():
    adapted = adapted_of("bert", ["layer.1.output.dense"])
    with torch.no_grad():
        adapted.model.bert.encoder.layer[1].output.LayerNorm.weight[0] = float("inf")
    with pytest.raises(KernelError, match=r"layer\.1\.output\.dense.*finite"):
        batch_sketch(adapted, cases.batch_of(SEQUENCES), output_reduction("margin", 2), width=WIDTH, seed=0)


def test_half_precision_is_added_up_in_single(monkeypatch):
    model = cases.tiny("bert", dtype=torch.bfloat16)
    train_only(model, ["layer.1"])
    adapted = replace(read_groups(model), layout=Layout())
    assert isinstance(adapted.groups[0].modules[adapted.groups[0].site.name], nn.Linear)
    tile = batch_sketch(adapted, cases.batch_of(SEQUENCES), output_reduction("margin", 2), width=WIDTH, seed=0)
    assert {half.dtype for half in tile.features.b} == {torch.float32}
