"""The score of a language model's adapter from Python objects, against loops by autograd."""

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig

import foretune as ft
from chats import make_tokenizer
from foretune.errors import ConfigError, DataError
from foretune.models.language_model import own_language_model
from foretune.scoring.sequence_plan import expected_sequence_bytes, prepare_sequence_score
from foretune.scoring.sequence_score import measure_sequences, run_sequence_score

import packing
import sequences as made

WORDS = ["the film was good", "the plot was thin", "what is the colour of the sky", "it is blue", "a user said so"]
CONFIG = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])


def rows(n):
    return datasets.Dataset.from_dict({"text": [f"{WORDS[i % 5]} {WORDS[i * 3 % 5]} {i}" for i in range(n)]})


def settings_of(**options):
    return ft.ScoreSettings(**({"samples": 5, "draws": 2, "max_length": 16, "batch_size": 3} | options))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    model = made.tiny_language_model(torch.float64, vocabulary=len(tokenizer))
    model.config.eos_token_id = tokenizer.eos_token_id
    return model


@pytest.fixture(scope="module")
def task():
    return ft.language_task_from_datasets(rows(20), rows(4))


def test_a_score_from_python_objects_is_that_of_loops(model, tokenizer, task):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = ft.score(model, tokenizer, CONFIG, task, settings=settings_of())
    assert isinstance(result, ft.SequenceScore)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    plan = result.plan
    placed, known = plan.placed.placed, plan.placed.known.features
    weights = [p for name, p in placed.named_parameters() if "lora_B" in name]
    found = [made.loss_and_gradients(placed, f["input_ids"], f["labels"], weights) for f in known]
    counts = np.array([sum(label != -100 for label in f["labels"][1:]) for f in known])
    j = np.stack([torch.cat([g.flatten() for g in gradients]).numpy() for _, gradients in found]) / counts[:, None]
    np.testing.assert_allclose(result.measurement.kernel.matrices[0], j @ j.T, rtol=1e-10, atol=1e-10)
    content = result.to_dict()
    assert content["kernel"]["trace"] == pytest.approx(np.trace(j @ j.T))
    assert content["base"]["train_loss"] == pytest.approx(sum(loss for loss, _ in found) / counts.sum())
    centred = j - j.mean(0)
    assert content["kernel_centred"]["lambda_max"] == pytest.approx(np.linalg.eigvalsh(centred @ centred.T)[-1])


@pytest.mark.parametrize("reduction", ["loss", "fisher"])
def test_batch_size_changes_nothing(model, tokenizer, task, reduction):
    one, other = (
        ft.score(model, tokenizer, CONFIG, task, settings=settings_of(batch_size=size, reduction=reduction))
        for size in (1, 5)
    )
    left, right = one.measurement.kernel.matrices, other.measurement.kernel.matrices
    np.testing.assert_allclose(left, right, rtol=1e-8, atol=1e-10 * np.abs(left).max())


def test_repeats_draw_other_rows_and_all_are_counted(model, tokenizer, task):
    language = own_language_model(model, tokenizer, bare=True)
    plan, passed = prepare_sequence_score(language, task, CONFIG, settings_of(repeats=3)), []
    result = run_sequence_score(plan, on_batch=passed.append)
    assert sum(passed) == plan.n_passes == 15
    assert len(result.repeats) == 3
    assert len({tuple(measure_sequences(plan, repeat=repeat).indices) for repeat in range(3)}) == 3
    assert result.to_dict()["spread"]["repeats"]["trace"]["count"] == 3


def test_expected_bytes_hold_the_features(model, tokenizer, task):
    language = own_language_model(model, tokenizer, bare=True)
    few, many = (
        expected_sequence_bytes(prepare_sequence_score(language, task, CONFIG, settings_of(draws=draws)))
        for draws in (1, 4)
    )
    widths = 2 * 2 * (8 + 8)  # two layers, rank 2, q_proj and down_proj
    assert few["features"] == 5 * widths * 8
    assert many["features"] == 4 * few["features"]
    assert few["total"] == sum(value for name, value in few.items() if name != "total")


def test_faults_are_named(model, tokenizer, task):
    with pytest.raises(ConfigError, match=r"ridge = 1\.0"):
        ft.score(model, tokenizer, CONFIG, task, settings=settings_of(ridge=1.0))
    lone = ft.language_task_from_datasets(rows(1), rows(2))
    with pytest.raises(DataError, match="a kernel needs 2"):
        ft.score(model, tokenizer, CONFIG, lone, settings=settings_of())


def test_a_quantised_base_decides_no_type(tokenizer, task):
    both = []
    for unpacked in (False, True):
        base = packing.pack(made.tiny_language_model(torch.float32, vocabulary=len(tokenizer)))
        model = packing.unpack(base) if unpacked else base
        both.append(ft.score(model, tokenizer, CONFIG, task, settings=settings_of()).measurement.kernel)
    found, expected = both
    assert found.epsilon == expected.epsilon == np.finfo(np.float32).eps
    assert np.linalg.norm(found.matrices - expected.matrices) < 1e-5 * np.linalg.norm(expected.matrices)
