from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foretune.models.placement import place, read_adapters
from foretune.ntk.clock import Clock
from foretune.ntk.feature_store import Store, Tile, TilePlan, cut, site_traces
from foretune.ntk.jacobian import batch_features
from foretune.ntk.kernel import summed_kernel, tangent_kernel
from foretune.ntk.tile_files import digest, read_checked, write_checked
from foretune.ntk.tiles import pairs, tiled_kernel
from foretune.tasks.outputs import output_reduction

from cases import batch_of, lora, ragged, tiny

SEQUENCES = [*ragged(), *(list(reversed(sequence)) for sequence in ragged()), [3, 4, 9], [7, 7]]
N = len(SEQUENCES)


def features_of(reduction="margin", *, draws=2, b=False, head=False):
    config = lora("bert", **({"init_lora_weights": False} if b else {}), **({"task_type": "SEQ_CLS"} if head else {}))
    adapted = read_adapters(place(tiny("bert"), config, seed=0), draws=1 if b else draws, seed=0)
    return batch_features(adapted, batch_of(SEQUENCES), output_reduction(reduction, 2))


def with_vectors(features):
    """Gradients beside those of A and B in every second module."""
    shape = (features.reduction.n_outputs, N, 3)
    vectors = tuple(torch.randn(shape).double() if index % 2 else None for index in range(len(features.sites)))
    return replace(features, v=vectors)


WHOLE = {
    "plain": lambda: features_of(),
    "full": lambda: features_of("full"),
    "b": lambda: features_of(b=True),
    "head": lambda: features_of(head=True, draws=3),
    "vectors": lambda: with_vectors(features_of("full", b=True)),
}


@pytest.fixture(scope="module")
def samples():
    return {name: make() for name, make in WHOLE.items()}


def part_of(features, rows):
    """A tile: the examples of some positions."""
    rows = torch.as_tensor(rows)

    def take(tensor, axis):
        return None if tensor is None else tensor.index_select(axis, rows)

    return type(features)(
        sites=features.sites,
        reduction=features.reduction,
        draws=features.draws,
        b=tuple(take(x, 1) for x in features.b),
        a=tuple(take(x, 1) for x in features.a),
        v=tuple(take(x, 1) for x in features.v),
        head=tuple(type(f)(take(f.g, 1), take(f.h, 0), take(f.dense, 1), f.bias) for f in features.head),
        logits=take(features.logits, 0),
    )


def plan_of(features, size, name="m", n=None):
    spans = cut(features.n if n is None else n, size)

    def compute(index):
        part = part_of(features, list(spans[index]))
        return Tile(part, site_traces(part))

    keys = tuple(digest(name, str(span)) for span in spans)
    return TilePlan(spans, keys, compute, features.sites, features.reduction, features.draws)


def close(found, expected):
    return np.allclose(found, expected, rtol=1e-12, atol=1e-13 * np.abs(expected).max())


@pytest.mark.parametrize("name", WHOLE)
def test_the_sum_is_that_of_the_blocks(samples, name):
    features = samples[name]
    kernel = tangent_kernel(features)
    total, head = summed_kernel(features)
    assert close(total, kernel.matrices())
    assert np.array_equal(total, total.swapaxes(1, 2))
    assert (head is None) == (kernel.head is None)
    if head is not None:
        assert close(head, kernel.head)
    traces = np.array([np.trace(block.sum(1), axis1=-2, axis2=-1) for block in kernel.blocks])
    assert close(site_traces(features).numpy(), traces)


@given(st.sampled_from(sorted(WHOLE)), st.integers(1, N + 2), st.sampled_from(["memory", "disk", "recompute"]))
def test_tiles_give_the_kernel(samples, tmp_path_factory, name, size, backing):
    features = samples[name]
    folder = tmp_path_factory.mktemp("tiles")
    kernel = tangent_kernel(features)
    found = tiled_kernel(Store(plan_of(features, size), backing, folder))
    assert close(found.matrices, kernel.matrices())
    assert np.array_equal(found.matrices, found.matrices.swapaxes(1, 2))
    assert np.array_equal(found.logits, features.logits.numpy())
    assert found.epsilon == kernel.epsilon
    if kernel.head is not None:
        assert close(found.head, kernel.head)


@given(st.integers(1, N), st.integers(1, 5), st.permutations(range(N)))
def test_cross_kernels_of_any_order(samples, size, n_left, order):
    features = samples["head"]
    left = part_of(features, order[:n_left])
    cross = tiled_kernel(Store(plan_of(left, 2), "memory"), Store(plan_of(features, size), "recompute"))
    expected = tangent_kernel(left, features)
    assert close(cross.matrices, expected.matrices())
    assert close(cross.head, expected.head)
    assert np.array_equal(cross.logits, left.logits.numpy())


def test_every_pair_is_listed_once():
    assert pairs(3) == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
    assert pairs(2, 3) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_a_tile_is_computed_as_often_as_its_place_says(samples, tmp_path):
    for backing, times in (("memory", 4), ("disk", 4), ("recompute", 10)):
        store = Store(plan_of(samples["plain"], -(-N // 4)), backing, tmp_path)
        tiled_kernel(store)
        assert store.computed == times


def test_passes_products_and_files_are_told_apart(samples, tmp_path):
    plan = plan_of(samples["plain"], 3)
    clock, again, alone = Clock(), Clock(), Clock()
    tiled_kernel(Store(plan, "disk", tmp_path), folder=tmp_path, clock=clock)
    assert min(clock.seconds.passes, clock.seconds.products, clock.seconds.files) > 0.0
    tiled_kernel(Store(plan, "disk", tmp_path), folder=tmp_path, clock=again)  # products are there
    assert again.seconds.passes == again.seconds.products == 0.0 < again.seconds.files
    Store(plan, "recompute").tile(0, alone)
    assert alone.seconds.products == alone.seconds.files == 0.0 < alone.seconds.passes
    total = clock.seconds + alone.seconds
    assert total.passes == clock.seconds.passes + alone.seconds.passes


class _Killed(Exception):
    pass


def test_a_killed_run_goes_on(samples, tmp_path):
    features = samples["plain"]
    plan = plan_of(features, 2)
    count = len(plan.spans)

    def dies(index):
        if index == 2:
            raise _Killed
        return plan.compute(index)

    dying = Store(TilePlan(plan.spans, plan.keys, dies, plan.sites, plan.reduction, plan.draws), "disk", tmp_path)
    with pytest.raises(_Killed):
        tiled_kernel(dying, folder=tmp_path)
    again = Store(plan, "disk", tmp_path)
    found = tiled_kernel(again, folder=tmp_path)
    assert dying.computed == 2
    assert again.computed == count - 2
    assert close(found.matrices, tangent_kernel(features).matrices())
    last = Store(plan, "disk", tmp_path)
    assert np.array_equal(tiled_kernel(last, folder=tmp_path).matrices, found.matrices)
    assert last.computed == 0
    for path in tmp_path.glob("features-*"):  # the products are enough
        path.unlink()
    last = Store(plan, "disk", tmp_path)
    done = tiled_kernel(last, folder=tmp_path)
    assert last.computed == 0
    assert np.array_equal(done.matrices, found.matrices)
    assert np.array_equal(done.site_traces, found.site_traces)


def flip(path, where):
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped number": lambda path, _: flip(path, -1),
    "flipped header": lambda path, _: flip(path, 40),
    "truncated": lambda path, _: path.write_bytes(path.read_bytes()[:-8]),
    "empty": lambda path, _: path.write_bytes(b""),
    "swapped": lambda path, other: path.write_bytes(other.read_bytes()),
}


@pytest.mark.parametrize("kind", ["features", "product"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_made_again(samples, tmp_path, kind, damage):
    features = samples["plain"]
    plan = plan_of(features, 7)
    expected = tiled_kernel(Store(plan, "disk", tmp_path), folder=tmp_path).matrices
    one, *_, other = sorted(tmp_path.glob(f"{kind}-*"))
    DAMAGE[damage](one, other)
    if kind == "features":  # else nobody asks for it
        for path in tmp_path.glob("product-*"):
            path.unlink()
    store = Store(plan, "disk", tmp_path)
    assert np.array_equal(tiled_kernel(store, folder=tmp_path).matrices, expected)
    assert store.computed == (1 if kind == "features" else 0)
    store = Store(plan, "disk", tmp_path)
    tiled_kernel(store, folder=tmp_path)
    assert store.computed == 0


def test_tiles_of_another_model_are_not_used(samples, tmp_path):
    features = samples["plain"]
    tiled_kernel(Store(plan_of(samples["full"], 3, "other"), "disk", tmp_path), folder=tmp_path)
    store = Store(plan_of(features, 3), "disk", tmp_path)
    found = tiled_kernel(store, folder=tmp_path)
    assert store.computed == len(store.plan.spans)
    assert close(found.matrices, tangent_kernel(features).matrices())


@given(st.integers(0, 10_000))
def test_no_flipped_bit_passes(tmp_path_factory, where):
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    tensors = {"x": torch.arange(30.0).reshape(5, 6), "y": torch.ones(3, dtype=torch.bfloat16), "z": torch.empty(2, 0)}
    write_checked(path, tensors, "key", {"epsilon": 0.5, "names": ["a"]})
    flip(path, where % path.stat().st_size)
    found = read_checked(path, "key")
    if found is not None:  # a blank of the padding
        assert found[1] == {"epsilon": 0.5, "names": ["a"]}
        assert all(torch.equal(found[0][name], tensors[name]) for name in tensors)


def test_features_in_files_are_those_in_memory(samples, tmp_path):
    for name, features in samples.items():
        plan = plan_of(features, N, name)
        Store(plan, "disk", tmp_path, name).tile(0)
        read = Store(plan, "disk", tmp_path, name)
        tile = read.tile(0)
        assert read.computed == 0
        assert torch.equal(tile.traces, site_traces(features))
        assert [f.bias for f in tile.features.head] == [f.bias for f in features.head]
        for kind in ("b", "a", "v"):
            for one, other in zip(getattr(tile.features, kind), getattr(features, kind), strict=True):
                assert (one is None) == (other is None)
                assert one is None or torch.equal(one, other)


def test_files_that_are_not_there(tmp_path):
    assert read_checked(tmp_path / "none", "key") is None
