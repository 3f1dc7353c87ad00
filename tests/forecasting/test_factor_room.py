"""Token factors in files, against the same in memory."""

import dataclasses
import gc
from collections import namedtuple

import pytest
import torch

import foretune as ft
from foretune.errors import ConfigError, StoreError
from foretune.forecasting import factor_room
from foretune.forecasting.calibration_file import shipped_calibration
from foretune.forecasting.factor_room import check_room, factor_bytes
from foretune.forecasting.forecast import prepare_forecast, run_forecast
from foretune.forecasting.linearise import linearise
from foretune.models.placement import lora_config
from foretune.ntk.mapped import Mapped
from foretune.problem import prepare
from foretune.ranking.module_kernels import module_kernels

import cases

KNOWN = {"samples": 40, "eval_samples": 20, "batch_size": 2, "max_length": 32}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return ft.load_task(ft.DataConfig(cases.write_reviews(tmp_path_factory.mktemp("data") / "reviews")))


@pytest.fixture(scope="module", params=["bert", "roberta"])
def classifier(request, task, tmp_path_factory):
    folder = cases.save(tmp_path_factory.mktemp("models") / request.param, request.param)
    return ft.load_classifier(folder, label_names=task.label_names, seed=0)


def plan_of(task, classifier, memory=None):
    config = lora_config(classifier.model, ft.AdapterConfig(("all-linear",), None, 2))
    return prepare(classifier, task, config, ft.ScoreSettings(**KNOWN, draws=1, reduction="margin", memory=memory))


def least_of(plan):
    """The least memory: what the refusal of less says."""
    with pytest.raises(ConfigError, match=r"a batch of this pass needs .* at least; raise --memory") as refused:
        check_room(plan)
    assert "\n" not in str(refused.value)
    return float(str(refused.value).split(" needs ")[1].split("MB at least")[0])


def small(task, classifier):
    """A plan with hardly more memory than a batch needs, a part of what all take."""
    least = least_of(plan_of(task, classifier, "1KB"))
    plan = plan_of(task, classifier, f"{least * 1.01:.6f}MB")
    assert factor_bytes(plan) > 2 * least * 10**6
    check_room(plan)
    return plan


def tensors_of(factors):
    for module in (*factors.modules, *factors.hidden):
        yield from (module.starts, module.h, module.g)
    yield from (factors.inputs, factors.logits)


def test_factors_in_files_are_those_in_memory(task, classifier):
    expected, found = linearise(plan_of(task, classifier)), linearise(small(task, classifier))
    for one, other in ((found.train, expected.train), (found.evaluation, expected.evaluation)):
        assert one.factors.mapped is not None
        assert other.factors.mapped is None
        pairs = zip(tensors_of(one.factors), tensors_of(other.factors), strict=True)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
        one.factors.let_go()
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(one.factors), tensors_of(other.factors), strict=True))
        readers = [[id(module.h) for module in sample.factors.modules] for sample in (one, other)]
        assert [line.index(entry) for line in readers[:1] for entry in line] == [
            line.index(entry) for line in readers[1:] for entry in line
        ]  # inputs are shared as they are in memory
    blocks, same = module_kernels(found, (2,)), module_kernels(expected, (2,))
    assert (blocks.steps == same.steps).all()


def test_forecasts_are_the_same(task, classifier):
    curves = []
    least = least_of(plan_of(task, classifier, "1KB"))
    for memory in (None, f"{least * 1.01:.6f}MB"):
        settings = ft.ForecastSettings(**KNOWN, epochs=1, memory=memory)
        config = lora_config(classifier.model, ft.AdapterConfig(("all-linear",), None, 2))
        plan = prepare_forecast(classifier, task, config, settings)
        result = run_forecast(plan, settings, shipped_calibration())
        curves.append(result.to_dict())
    assert curves[0]["end"] == curves[1]["end"]
    assert curves[0]["simulated"] == curves[1]["simulated"]
    assert curves[0]["points"] == curves[1]["points"]


def test_a_disk_without_room_is_refused_before_the_work(task, classifier, monkeypatch):
    plan = small(task, classifier)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(factor_room.shutil, "disk_usage", lambda _: usage(10))
    with pytest.raises(StoreError, match=r"has 1e-05MB free and .* are needed.*TMPDIR") as refused:
        check_room(plan)
    assert "\n" not in str(refused.value)


def test_several_processes_keep_all_in_memory(task, classifier):
    plan = small(task, classifier)
    two = dataclasses.replace(plan, processes=namedtuple("Processes", "world")(2))
    with pytest.raises(ConfigError, match="several processes keep all in it: raise --memory, start one process"):
        check_room(two)


def test_files_are_filled_and_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    beside = Mapped(256)
    mapped = Mapped(256, beside=beside)
    given = [torch.randn(shape).to(dtype) for shape in ((3, 5), (100,), (2, 0, 3), ()) for dtype in (torch.bfloat16,)]
    kept = [mapped.kept(tensor) for tensor in given]
    other = beside.kept(given[0])
    mapped.let_go()
    mapped.alone().let_go()
    assert all(torch.equal(one, two) and one.shape == two.shape for one, two in zip(kept, given, strict=True))
    assert torch.equal(other, given[0])
    assert not list(tmp_path.iterdir())  # the files have no name
    del mapped, beside
    gc.collect()
    assert torch.equal(kept[1], given[1])
