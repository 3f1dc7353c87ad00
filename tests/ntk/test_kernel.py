import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foretune.errors import KernelError
from foretune.models.placement import place, read_adapters
from foretune.ntk.jacobian import batch_features, tangent_features
from foretune.ntk.kernel import concatenate_rows, tangent_kernel
from foretune.tasks.outputs import output_reduction

import cases
import references
from cases import batch_of, lora, ragged, tiny, within

MARGIN = output_reduction("margin", 2)


def kernel_of(model, sequences, reduction=MARGIN, *, ranks=(), **options):
    return tangent_kernel(
        tangent_features(read_adapters(model, **options), [batch_of(sequences)], reduction, n=len(sequences)),
        ranks=ranks,
    )


def close(a, b, tolerance=1e-11):
    return np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def test_kernels_of_placements_add():
    base = tiny("bert")
    sequences = ragged()
    parts = [
        place(base, lora("bert", target_modules=["query"], layers_to_transform=[0]), seed=0),
        place(base, lora("bert", target_modules=["query"], layers_to_transform=[1]), seed=0),
        place(base, lora("bert", target_modules=["value"]), seed=0),
    ]
    whole = kernel_of(place(base, lora("bert", target_modules=["query", "value"]), seed=0), sequences, draws=3)
    total = sum(kernel_of(part, sequences, draws=3).matrices() for part in parts)
    assert close(total, whole.matrices())
    query_0 = [i for i, site in enumerate(whole.sites) if site.layer == 0 and site.kind.endswith("query")]
    assert close(whole.matrices(query_0), kernel_of(parts[0], sequences, draws=3).matrices())


def test_eigenvalues_grow_with_the_placement():
    # Weyl: adding a positive semi-definite block lowers no eigenvalue (Table 1 of the paper violates this)
    kernel = kernel_of(place(tiny("bert"), lora("bert"), seed=0), ragged())
    previous = np.zeros(6)
    for count in range(1, len(kernel.sites) + 1):
        values = np.linalg.eigvalsh(kernel.matrices(range(count))[0])
        assert np.all(values >= previous - 1e-12 * values[-1])
        previous = values


@settings(deadline=None, max_examples=8)
@given(factor=st.sampled_from([0.5, 2.0, 3.0]), seed=st.integers(0, 5))
def test_scaling_alpha_scales_the_kernel_by_its_square(factor, seed):
    base = tiny("bert")
    one = kernel_of(place(base, lora("bert", lora_alpha=4), seed=seed), ragged())
    other = kernel_of(place(base, lora("bert", lora_alpha=4 * factor), seed=seed), ragged())
    assert close(other.matrices(), factor**2 * one.matrices())


def test_rotating_a_changes_nothing():
    model = place(tiny("bert"), lora("bert"), seed=0)
    before = kernel_of(model, ragged()).matrices()
    q, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.copy_(q @ parameter)
    assert close(kernel_of(model, ragged()).matrices(), before)


def test_kernel_is_symmetric_and_positive():
    for reduction in ("margin", "full"):
        model = place(tiny("gpt2"), lora("gpt2"), seed=0)
        k = kernel_of(model, ragged(), output_reduction(reduction, 2), draws=2).matrices()
        assert np.array_equal(k, k.swapaxes(1, 2))
        assert np.linalg.eigvalsh(k).min() > -1e-12 * k.max()


def test_full_kernel_of_two_classes_is_half_the_margin_kernel():
    model = place(tiny("bert"), lora("bert"), seed=0)
    full = kernel_of(model, ragged(), output_reduction("full", 2)).matrices()
    assert close(full, kernel_of(model, ragged()).matrices() / 2)


def test_scaling_the_head_scales_the_adapters_kernel_by_its_square():
    base = tiny("bert")
    one = kernel_of(place(base, lora("bert"), seed=0), ragged())
    base.classifier.weight.data *= 3
    other = kernel_of(place(base, lora("bert"), seed=0), ragged())
    assert close(other.matrices(), 9 * one.matrices())
    assert close(other.head, one.head)  # the head's own kernel does not depend on its weights


@pytest.mark.parametrize(("name", "extra"), [("bert", ()), ("roberta", ()), ("mpnet", ()), ("gpt2", ()), ("llama", ())])
@pytest.mark.parametrize("output", ["trace", "full"])
def test_head_kernel_equals_its_reference(name, extra, output):
    model = place(tiny(name, 3), lora(name), seed=0)
    sequences = ragged()
    reduction = output_reduction(output, 3)
    kernel = kernel_of(model, sequences, reduction)
    parameters = references.named_parameters(model, "modules_to_save")
    gradients = references.parameter_gradients(model, sequences, reduction.directions, parameters)
    expected = (
        references.full_kernel(gradients) if reduction.block else references.scalar_kernel(gradients, reduction.scale)
    )
    tolerance = within(name, 1e-11)
    assert close(kernel.head, expected, tolerance)
    assert close(kernel.matrices(with_head=True)[0], kernel.matrices()[0] + expected, tolerance)


def test_head_with_two_modules_of_distilbert():
    config = lora("distilbert", modules_to_save=["pre_classifier", "classifier"])
    model = place(tiny("distilbert", 3), config, seed=0)
    sequences, reduction = ragged(), output_reduction("trace", 3)
    parameters = references.named_parameters(model, "modules_to_save")
    gradients = references.parameter_gradients(model, sequences, reduction.directions, parameters)
    assert close(kernel_of(model, sequences, reduction).head, references.scalar_kernel(gradients, 1 / 3))


@pytest.mark.parametrize("reduction", ["margin", "full"])
def test_cross_kernel_is_a_block_of_the_joint_kernel(reduction):
    model = place(tiny("mpnet"), lora("mpnet"), seed=0)
    sequences = ragged(9)
    reduction = output_reduction(reduction, 2)
    adapted = read_adapters(model, draws=2)
    joint = tangent_kernel(tangent_features(adapted, [batch_of(sequences)], reduction, n=len(sequences)))
    train = tangent_features(adapted, [batch_of(sequences[:4])], reduction, n=4)
    batches = [batch_of(sequences[4:], [3, 0]), batch_of(sequences[4:], [1, 4, 2])]
    parts = [tangent_kernel(_unordered(adapted, batch, reduction), train) for batch in batches]
    cross = concatenate_rows(parts, [batch.rows.numpy() for batch in batches])
    assert close(cross.matrices(), joint.matrices()[:, 4:, :4])
    assert close(cross.head, joint.head[4:, :4])


def _unordered(adapted, batch, reduction):
    return batch_features(adapted, batch, reduction)


@pytest.mark.parametrize("output", ["trace", "full"])
def test_the_mean_over_draws_is_that_of_the_draws(output):
    adapted = read_adapters(place(tiny("bert", 3), lora("bert"), seed=0), draws=3)
    reduction = output_reduction(output, 3)
    features = tangent_features(adapted, [batch_of(ragged())], reduction, n=6)
    part = batch_features(adapted, batch_of(ragged(), [1, 0]), reduction)
    for left, right in ((features, None), (part, features)):
        every = tangent_kernel(left, right, ranks=(1, 2))
        mean = tangent_kernel(left, right, ranks=(1, 2), average=True)
        assert mean.blocks.shape == (len(every.sites), 1, *every.blocks.shape[2:])
        assert close(mean.blocks[:, 0], every.blocks.mean(1), 1e-13)
        assert np.array_equal(mean.head, every.head)
    trained = read_adapters(cases.with_nonzero_b(place(tiny("bert", 3), lora("bert"), seed=0)))
    features = tangent_features(trained, [batch_of(ragged())], reduction, n=6)
    assert np.array_equal(tangent_kernel(features, average=True).blocks, tangent_kernel(features).blocks)


INITS = {"kaiming": {}, "rslora": {"use_rslora": True}, "gaussian": {"init_lora_weights": "gaussian"}}


@pytest.mark.parametrize("init", INITS)
def test_smaller_ranks_come_from_the_same_pass(init):
    """Keeping the first rows of A, with the scaling and initialisation that peft gives the smaller rank."""
    base, sequences = tiny("bert"), ragged()
    model = place(base, lora("bert", r=4, **INITS[init]), seed=0)
    kernel = kernel_of(model, sequences, ranks=(1, 2))
    assert kernel.ranks == (1, 2, 4)
    for rank in (1, 2):
        small = place(base, lora("bert", r=rank, **INITS[init]), seed=0)
        with torch.no_grad():
            for (_, a), (_, own) in zip(_lora_a(small), _lora_a(model), strict=True):
                scale = 4 / rank if init == "gaussian" else 1.0  # peft's standard deviation is 1/r
                a.copy_(scale * own[:rank])
        assert close(kernel.matrices(rank=rank), kernel_of(small, sequences).matrices())


def _lora_a(model):
    return [(name, p) for name, p in model.named_parameters() if "lora_A" in name]


def test_further_draws_are_those_of_peft():
    """Each draw equals the kernel of a model that holds this A, and the mean tends to the expected kernel."""
    base, sequences = tiny("bert"), ragged()
    config = lora("bert", target_modules=["value"], layers_to_transform=[0])
    model = place(base, config, seed=0)
    adapted = read_adapters(model, draws=400, seed=1)
    kernel = tangent_kernel(tangent_features(adapted, [batch_of(sequences)], MARGIN, n=len(sequences))).matrices()
    rows = adapted.adapters[0].rows.unflatten(0, (400, 4))
    for draw in (0, 7):
        with torch.no_grad():
            _lora_a(model)[0][1].copy_(rows[draw])
        assert close(kernel[draw], kernel_of(model, sequences).matrices()[0])
    # E_A[K] = s² r Var(a) K^W with Var(a) = 1/(3 d_in), K^W the kernel of the full weight
    weight = model.base_model.model.bert.encoder.layer[0].attention.self.value.base_layer.weight
    gradients = references.parameter_gradients(model, sequences, MARGIN.directions, [weight])
    expected = (6 / 4) ** 2 * 4 / (3 * 16) * references.scalar_kernel(gradients)
    assert np.linalg.norm(kernel.mean(0) - expected) < 0.1 * np.linalg.norm(expected)


def test_rank_errors():
    model = place(tiny("bert"), lora("bert"), seed=0)
    kernel = kernel_of(model, ragged())
    with pytest.raises(KernelError, match="rank 2 was not kept"):
        kernel.matrices(rank=2)
    with pytest.raises(KernelError, match="between 1 and"):
        kernel_of(model, ragged(), ranks=(0,))
    with pytest.raises(KernelError, match="between 1 and"):
        kernel_of(place(tiny("bert"), lora("bert", rank_pattern={"query": 2}), seed=0), ragged(), ranks=(3,))
    with pytest.raises(KernelError, match="B = 0"):
        kernel_of(cases.with_nonzero_b(model), ragged(), ranks=(2,))


def test_features_that_do_not_belong_together_are_refused():
    one = tangent_features(read_adapters(place(tiny("bert"), lora("bert"), seed=0)), [batch_of(ragged())], MARGIN, n=6)
    other = tangent_features(
        read_adapters(place(tiny("bert"), lora("bert"), seed=0), draws=2), [batch_of(ragged())], MARGIN, n=6
    )
    with pytest.raises(KernelError, match="differ"):
        tangent_kernel(one, other)


def test_gram_products_are_accumulated_in_float64():
    """float32 features of very different size: a float32 Gram product would lose the small eigenvalues."""
    model = place(tiny("bert"), lora("bert"), seed=0).float()
    features = tangent_features(read_adapters(model), [batch_of(ragged())], MARGIN, n=6)
    expected = sum(
        b[0].flatten(1).numpy().astype(np.float64) @ b[0].flatten(1).numpy().astype(np.float64).T for b in features.b
    )
    found = tangent_kernel(features)
    assert close(found.matrices()[0], expected, 1e-14)
    assert found.epsilon == pytest.approx(1.19e-7, rel=0.01)


def test_head_with_a_bias_that_runs_over_all_tokens():
    base = tiny("llama", 3)
    base.score = torch.nn.Linear(16, 3, dtype=torch.float64)
    model = place(base, lora("llama"), seed=0)
    sequences, reduction = ragged(), output_reduction("full", 3)
    gradients = references.parameter_gradients(
        model, sequences, reduction.directions, references.named_parameters(model, "modules_to_save")
    )
    assert close(kernel_of(model, sequences, reduction).head, references.full_kernel(gradients), within("llama", 1e-11))


@pytest.mark.parametrize("reduction", ["margin", "full"])
@pytest.mark.parametrize("average", [False, True])
def test_sites_multiplied_together_have_the_kernels_they_have_alone(monkeypatch, reduction, average):
    """Of two shapes and two ranks; the products written out."""
    n_classes = 2 if reduction == "margin" else 3
    adapted = read_adapters(place(tiny("bert", n_classes), lora("bert", rank_pattern={"query": 3}), seed=0), draws=3)
    reduction = output_reduction(reduction, n_classes)
    left, right = (
        tangent_features(adapted, [batch_of(sequences)], reduction, n=len(sequences))
        for sequences in (ragged(), ragged(4, seed=1))
    )
    ranks = (2,) if reduction.block else ()
    for other in (None, right):
        together = tangent_kernel(left, other, ranks=ranks, average=average)
        with monkeypatch.context() as context:
            context.setattr("foretune.ntk.kernel.ENTRIES", 1)
            alone = tangent_kernel(left, other, ranks=ranks, average=average)
        assert close(together.blocks, alone.blocks, 1e-14)
        whole = tangent_kernel(left, other)
        for site, one, two, gram in zip(left.sites, left.b, (other or left).b, whole.blocks, strict=True):
            one, two = (b.transpose(0, 1).unflatten(2, (3, site.rank)).numpy() for b in (one, two))
            for draw in range(3):
                lengths = [b.shape[0] * b.shape[1] if reduction.block else b.shape[0] for b in (one, two)]
                rows = [b[:, :, draw].reshape(n, -1) for b, n in zip((one, two), lengths, strict=True)]
                assert close(gram[draw].sum(0), reduction.scale * rows[0] @ rows[1].T, 1e-13)
