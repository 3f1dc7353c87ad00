"""A score by tiles of samples against the same score at once."""

import json
from collections import namedtuple
from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pytest

import foretune as ft
from foretune.errors import ConfigError, StoreError
from foretune.models.groups import train_only
from foretune.ntk import sketch_pass
from foretune.problem import prepare
from foretune.scoring import assess, tiled_pass, tiling
from foretune.scoring.passes import measure
from foretune.scoring.score import run_score

import cases

SETTINGS = {"samples": 23, "eval_samples": 6, "draws": 2, "max_length": 32, "batch_size": 4}


@pytest.fixture(scope="module")
def task():
    texts, labels = zip(*(cases.review(i) for i in range(60)), strict=True)
    train = datasets.Dataset.from_dict({"text": texts[:40], "label": labels[:40]})
    return ft.task_from_datasets(train, datasets.Dataset.from_dict({"text": texts[40:], "label": labels[40:]}))


def plan_of(task, tmp_path, model=None, config=None, **options):
    settings = ft.ScoreSettings(**{**SETTINGS, "scratch": str(tmp_path / "scratch"), **options})
    classifier = ft.Classifier("tiny", model or cases.tiny("bert"), cases.tokenizer(), "given")
    return prepare(classifier, task, config or cases.lora("bert"), settings)


def least_of(plan):
    """The least memory: what the refusal of one byte less says."""
    with pytest.raises(ConfigError, match="; raise --memory") as refused:
        tiling.plan_tiles(plan)
    assert "\n" not in str(refused.value)
    return str(refused.value).split(" need ")[1].split(" at least")[0]


def tiled_plan(task, tmp_path, **options):
    plan = plan_of(task, tmp_path, memory="1KB", **options)
    number = float(least_of(plan).removesuffix("MB"))
    return plan_of(task, tmp_path, memory=f"{number * 1.01:.6f}MB", **options)


def same(found, expected):
    for name in ("k_train_train", "k_eval_train", "head_train_train", "head_eval_train", "f_train_0", "f_eval_0"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert np.allclose(one, other, rtol=1e-9, atol=1e-11 * np.abs(other).max()), name
    assert np.allclose(found.site_traces, expected.site_traces, rtol=1e-9)
    assert np.allclose(found.head_traces, expected.head_traces, rtol=1e-9)
    assert found.epsilon == expected.epsilon


OPTIONS = {
    "plain": {},
    "probe": {"head": "probe"},
    "average": {"head": "average", "heads": 2, "repeats": 2},
    "head": {"ntk_params": "adapter+head"},
    "full": {"reduction": "full"},
    "again": {"scratch": "none"},
    "no evaluation": {"eval_samples": 0, "draws": 1},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("mapped", [False, True])
def test_tiles_change_nothing(task, tmp_path, name, mapped, monkeypatch):
    options = OPTIONS[name]
    expected = measure(plan_of(task, tmp_path, **options))
    plan = tiled_plan(task, tmp_path, **options)
    cut = tiling.plan_tiles(plan)
    assert cut.size == 4
    assert cut.backing == ("recompute" if name == "again" else "disk")
    if mapped and name != "again":
        cut = tiling.Tiling(cut.size, cut.backing, True, cut.folder, cut.key)
    with tiling.scratch_of(cut):
        same(measure(plan, tiling=cut), expected)
    assert not (tmp_path / "scratch").exists() or not list((tmp_path / "scratch").iterdir())


def test_a_whole_score_by_tiles(task, tmp_path):
    expected = run_score(plan_of(task, tmp_path)).to_dict()
    found = run_score(tiled_plan(task, tmp_path)).to_dict()
    assert set(found) == set(expected)
    for name in ("kernel", "kernel_centred", "kernel_mean_over_a", "bounds", "kernel_regression"):
        for key, value in expected[name].items():
            if isinstance(value, float) and key not in ("lambda_min", "ridge", "lower"):
                assert found[name][key] == pytest.approx(value, rel=1e-5, abs=1e-9), (name, key)
    assert found["sketch"] is None
    parts = ("passes", "products", "files")
    for seconds, of_files in ((expected["seconds"], False), (found["seconds"], True)):
        assert seconds["passes"] > 0
        assert seconds["products"] > 0
        assert (seconds["files"] > 0) == of_files
        assert sum(seconds[part] for part in parts) <= seconds["kernel"] * (1 + 1e-9)
    json.dumps(found, allow_nan=False)


def test_what_fits_is_not_cut(task, tmp_path):
    for memory in (None, "2GB"):
        assert tiling.plan_tiles(plan_of(task, tmp_path, memory=memory)) is None


def test_large_kernels_are_not_decomposed(task, tmp_path, monkeypatch):
    options = {"samples": 40, "draws": 2, "eval_samples": 10, "sigma": 1.0}
    expected = run_score(plan_of(task, tmp_path, **options))
    for module in (assess, tiling):
        monkeypatch.setattr(module, "DENSE", 35)
    monkeypatch.setattr(assess, "decompose", None)
    plan = plan_of(task, tmp_path, **options, memory="200MB")
    found = run_score(plan)
    for one, other in zip(found.draws, expected.draws, strict=True):
        assert one.kernel.condition_number == pytest.approx(other.kernel.condition_number, rel=1e-6)
        assert one.kernel.trace == pytest.approx(other.kernel.trace, rel=1e-9)
        assert one.kernel.alignment == pytest.approx(other.kernel.alignment, rel=1e-9)
        for name, error in one.kernel.estimated.items():
            off = abs(getattr(one.kernel, name) - getattr(other.kernel, name))
            assert off <= 5 * error + 1e-6 * abs(getattr(other.kernel, name)), name
        assert one.bounds.empirical_risk == pytest.approx(other.bounds.empirical_risk, rel=1e-7)
        assert one.bounds.tight.holds
        assert one.kernel_regression.loo_mse <= 1.05 * other.kernel_regression.loo_mse
        assert one.eigenvalues.shape == other.eigenvalues.shape
    assert found.mean.estimated is not None
    assert found.mean.condition_number == pytest.approx(expected.mean.condition_number, rel=1e-6)
    content = found.to_dict()
    assert content["kernel"]["estimated"]["effective_dimension"] >= 0
    json.dumps(content, allow_nan=False)


def test_few_features_leave_nothing_to_estimate(tmp_path, monkeypatch):
    """One module at rank 1."""
    texts, labels = zip(*(cases.review(i) for i in range(80)), strict=True)
    train = datasets.Dataset.from_dict({"text": texts[:70], "label": labels[:70]})
    task = ft.task_from_datasets(train, datasets.Dataset.from_dict({"text": texts[70:], "label": labels[70:]}))
    config = cases.lora("bert", r=1, target_modules=["layer.0.attention.self.query"], task_type="SEQ_CLS")
    options = {"samples": 70, "draws": 1, "eval_samples": 10, "sigma": 0.1}
    expected = run_score(plan_of(task, tmp_path, config=config, **options))
    for module in (assess, tiling):
        monkeypatch.setattr(module, "DENSE", 60)
    found = run_score(plan_of(task, tmp_path, config=config, **options, memory="200MB"))
    assert assess.features_of(found.plan) == 16
    pairs = [(found.draws[0].kernel, expected.draws[0].kernel), (found.draws[0].centred, expected.draws[0].centred)]
    for one, other in [*pairs, (found.mean, expected.mean)]:
        assert one.estimated is None
        assert (one.lambda_min, one.lambda_min_resolved) == (0.0, True)
        for name in ("lambda_max", "condition_number", "effective_dimension", "entropy_rank", "alignment"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-7), name


class _Killed(BaseException):
    pass


def counted(monkeypatch, fails_at=None):
    """Count the batches that go through the model, and stop at one of them."""
    seen = []
    plain = tiled_pass.batch_features

    def features(*given):
        if len(seen) == fails_at:
            raise _Killed
        seen.append(1)
        return plain(*given)

    monkeypatch.setattr(tiled_pass, "batch_features", features)
    return seen


def test_a_killed_score_goes_on(task, tmp_path, monkeypatch):
    plan = tiled_plan(task, tmp_path)
    expected = measure(plan_of(task, tmp_path))
    with monkeypatch.context() as patch:
        counted(patch, fails_at=4)
        with pytest.raises(_Killed):
            run_score(plan)
    left = sorted(path.name for path in (tmp_path / "scratch").glob("*/*/*.safetensors"))
    assert "features-00003.safetensors" in left
    assert "product-00000-00003.safetensors" in left
    with monkeypatch.context() as patch:
        seen = counted(patch)
        same(run_score(plan).measurement, expected)
        assert len(seen) == 4  # two tiles of the samples, two of the evaluation rows
    assert not list((tmp_path / "scratch").iterdir())


def test_files_of_another_model_or_other_texts_are_not_used(task, tmp_path, monkeypatch):
    plan = tiled_plan(task, tmp_path)
    with monkeypatch.context() as patch:
        counted(patch, fails_at=7)
        with pytest.raises(_Killed):
            run_score(plan)
    model = cases.tiny("bert")
    model.classifier.weight.data += 0.25
    for options in ({"model": model}, {"seed": 1}, {"config": cases.lora("bert", lora_alpha=9)}):
        expected = measure(plan_of(task, tmp_path, **options))
        with monkeypatch.context() as patch:
            seen = counted(patch)
            same(run_score(tiled_plan(task, tmp_path, **options)).measurement, expected)
            assert len(seen) == 8, options


@pytest.mark.parametrize("kind", ["features-00001", "product-00000-00002"])
def test_damaged_files_are_made_again(task, tmp_path, monkeypatch, kind):
    plan = tiled_plan(task, tmp_path)
    expected = measure(plan_of(task, tmp_path))
    with monkeypatch.context() as patch:
        counted(patch, fails_at=4)
        with pytest.raises(_Killed):
            run_score(plan)
    (path,) = (tmp_path / "scratch").glob(f"*/*/{kind}.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)
    same(run_score(plan).measurement, expected)


def test_a_disk_without_room_is_refused_before_the_work(task, tmp_path, monkeypatch):
    plan = tiled_plan(task, tmp_path)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(tiling.shutil, "disk_usage", lambda _: usage(10))
    seen = counted(monkeypatch)
    with pytest.raises(StoreError, match=r"has 1e-05MB free and .* are needed.*--scratch none") as refused:
        run_score(plan)
    assert "\n" not in str(refused.value)
    assert not seen


def test_where_files_are_kept(task, tmp_path, monkeypatch):
    monkeypatch.setattr(tiling.tempfile, "gettempdir", lambda: str(tmp_path / "system"))
    (tmp_path / "system").mkdir()
    plan = tiled_plan(task, tmp_path, scratch=None)
    beside = tiling.plan_tiles(plan, tmp_path / "run").folder
    assert beside.parent == tmp_path / ".run.foretune-scratch"
    own = tiling.plan_tiles(plan).folder
    assert own.parent.parent == tmp_path / "system"
    assert own.parent.stat().st_mode & 0o777 == 0o700
    run_score(plan, output=tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["system"]


def test_sketches(task, tmp_path):
    exact = measure(plan_of(task, tmp_path))
    result = run_score(plan_of(task, tmp_path, sketch=64))
    found = result.measurement
    off = [
        np.linalg.norm(one - other) / np.linalg.norm(other)
        for one, other in zip(found.k_train_train, exact.k_train_train, strict=True)
    ]
    assert np.all(np.array(found.sketch_error) < 4 * np.array(off))
    assert np.all(np.array(off) < 4 * np.array(found.sketch_error))
    assert np.allclose(found.site_traces, exact.site_traces, rtol=1e-9)
    assert result.to_dict()["sketch"] == {"width": 64, "relative_error": found.sketch_error[0]}
    cross = np.linalg.norm(found.k_eval_train - exact.k_eval_train) / np.linalg.norm(exact.k_eval_train)
    assert cross < 4 * max(found.sketch_error)


def test_sketches_of_layers_that_train_whole(task, tmp_path, monkeypatch):
    """Their gradients are never formed, and do not count."""
    monkeypatch.setattr(sketch_pass, "WORTH", 2)
    model = cases.tiny("bert")
    train_only(model, ["layer.1.intermediate.dense", "layer.0.attention.self"])
    classifier = ft.Classifier("tiny", model, cases.tokenizer(), "given")

    def plan_with(**options):
        settings = ft.ScoreSettings(**{**SETTINGS, "scratch": str(tmp_path / "scratch"), **options})
        return prepare(classifier, task, None, settings)

    exact = measure(plan_with())
    plan = plan_with(sketch=128)
    assert tiling.plan_tiles(plan).size == 23
    found = run_score(plan).measurement
    off = np.linalg.norm(found.k_train_train - exact.k_train_train) / np.linalg.norm(exact.k_train_train)
    assert 0 < found.sketch_error[0] < 4 * off < 16 * found.sketch_error[0]
    assert np.allclose(found.site_traces, exact.site_traces, rtol=1e-9)
    needs = [tiling._needs(one).batch for one in (plan, plan_with(sketch=200))]
    assert needs == [0, 2 * 4 * 8 * 3 * (16 * 16 + 16)]


def test_a_sketch_in_tiles_is_that_of_the_whole(task, tmp_path):
    expected = measure(plan_of(task, tmp_path), tiling=tiling.plan_tiles(plan_of(task, tmp_path, sketch=64)))
    assert expected.sketch_error is None
    whole = plan_of(task, tmp_path, sketch=64)
    same(*(measure(whole, tiling=replace(tiling.plan_tiles(whole), size=size)) for size in (7, 23)))
    other = measure(plan_of(task, tmp_path, sketch=64, batch_size=3), tiling=tiling.plan_tiles(whole))
    same(other, measure(whole, tiling=tiling.plan_tiles(whole)))


def test_sketches_of_several_processes_are_refused(task, tmp_path):
    plan = replace(plan_of(task, tmp_path, sketch=64), processes=SimpleNamespace(world=2))
    with pytest.raises(ConfigError, match="sketch = 64: several processes keep"):
        run_score(plan)


@pytest.mark.parametrize(("sketch", "says"), [(10**6, "leave the sketch out"), (15, "must be even")])
def test_sketches_that_are_none(task, tmp_path, sketch, says):
    with pytest.raises(ConfigError, match=says):
        run_score(plan_of(task, tmp_path, sketch=sketch))


def test_memory_is_an_amount():
    with pytest.raises(ConfigError, match="give an amount of memory"):
        ft.ScoreSettings(memory="much")
