"""Models whose layers accelerate has placed, some on the disk: the same kernels, and inputs where they belong."""

import numpy as np
import pytest
import torch
from accelerate import dispatch_model

import foretune as ft
from foretune.errors import ModelError, PlacementError
from foretune.models.classifier import load_classifier
from foretune.models.dispatched import inputs_device, is_dispatched
from foretune.models.form import form_of
from foretune.models.language_model import load_language_model
from foretune.settings.commands import ScoreSettings

import cases

SETTINGS = ScoreSettings(samples=12, eval_samples=6)
TASK = cases.task_of("classification", 2)
PARTS = {
    "bert": ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler", "classifier"],
    "llama": ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "score"],
}


def kernel_of(model, name, **options):
    result = ft.score(model, cases.tokenizer(), cases.lora(name, **options), TASK, settings=SETTINGS)
    return result.measurement.k_train_train


def dispatched(name, folder, away):
    places = {part: "disk" if part in away else "cpu" for part in PARTS[name]}
    model = cases.tiny(name, dtype=torch.float32)
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize(
    ("name", "away"),
    [
        ("bert", []),
        ("bert", ["bert.encoder.layer.0"]),
        ("bert", PARTS["bert"][:-1]),
        ("llama", ["model.layers.0", "model.layers.1"]),
    ],
)
def test_kernels_are_those_of_the_whole_model(tmp_path, name, away):
    model = dispatched(name, tmp_path, away)
    assert is_dispatched(model)
    assert inputs_device(model) == torch.device("cpu")
    assert any(parameter.is_meta for parameter in model.parameters()) == bool(away)
    assert np.array_equal(kernel_of(model, name), kernel_of(cases.tiny(name, dtype=torch.float32), name))
    assert any(parameter.is_meta for parameter in model.parameters()) == bool(away)


def test_a_head_that_is_offloaded_is_refused(tmp_path):
    model = dispatched("bert", tmp_path, PARTS["bert"])
    with pytest.raises(PlacementError, match=r"the head 'classifier' is offloaded.*keeps 'classifier' on a device"):
        kernel_of(model, "bert")


def test_an_adapter_made_of_offloaded_weights_is_refused(tmp_path):
    model = dispatched("bert", tmp_path, ["bert.encoder.layer.0"])
    with pytest.raises(PlacementError, match=r"'pissa' needs the weights at hand.*offloaded"):
        kernel_of(model, "bert", init_lora_weights="pissa")


def test_the_device_map(tmp_path):
    source = cases.save(tmp_path / "m", "bert", head=True)
    names = {"label_names": ("a", "b"), "seed": 0}
    spread = load_classifier(source, device="map", **names)
    whole = load_classifier(source, device="cpu", **names)
    assert form_of("float32", "map").device is None
    inputs = {"input_ids": torch.tensor([[2, 5, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with torch.no_grad():
        logits = [each.model(**{k: v.to(each.device) for k, v in inputs.items()}).logits for each in (spread, whole)]
    assert torch.allclose(logits[0].cpu(), logits[1], atol=1e-5)


def test_quantization_without_its_package(tmp_path, monkeypatch):
    source = cases.save(tmp_path / "m", "bert")
    monkeypatch.setattr("foretune.models.form.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"quantization = '8bit' needs bitsandbytes.*pip install 'foretune\[quantized"):
        load_classifier(source, label_names=("a", "b"), seed=0, quantization="8bit")
    with pytest.raises(ModelError, match="unknown quantization '2bit'"):
        load_language_model(source, quantization="2bit")
