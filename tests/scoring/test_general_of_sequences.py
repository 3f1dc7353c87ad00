"""Scores of language models whose adapters have no closed form, from Python objects."""

import numpy as np
import peft
import pytest
import torch

import foretune as ft
import language_methods as methods
from chats import make_tokenizer
from foretune.errors import ConfigError, ForetuneError, PlacementError
from foretune.models.groups import train_only
from foretune.scoring import sequence_plan

import sequences as made

PROMPT = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
CONFIGS = {
    "prompt": PROMPT,
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "OFT": peft.OFTConfig(target_modules=["q_proj", "v_proj"], oft_block_size=4, r=0),
    "layers": None,
}


def settings_of(**options):
    return ft.ScoreSettings(**({"samples": 5, "draws": 2, "max_length": 24, "batch_size": 3} | options))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    model = made.tiny_language_model(torch.float64, vocabulary=len(tokenizer))
    model.config.eos_token_id = tokenizer.eos_token_id
    return model


@pytest.fixture(scope="module")
def task():
    return ft.language_task_from_datasets(made.texts(20), made.texts(4))


@pytest.mark.parametrize("kind", CONFIGS)
def test_scores_are_those_of_loops(model, tokenizer, task, kind):
    if kind == "layers":
        train_only(model, ["layers.1", "lm_head"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = ft.score(model, tokenizer, CONFIGS[kind], task, settings=settings_of(reduction="fisher"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    plan = result.plan
    placed, adapted = plan.placed.placed, plan.placed.adapted
    parameters = [parameter for group in adapted.groups for parameter in group.parameters.values()]
    given = [(feature["input_ids"], feature["labels"]) for feature in plan.placed.known.features]
    assert len({len(ids) for ids, _ in given}) > 1
    drawn = methods.gradients(placed, "llama", given, parameters, draws=4)[:, 1:]
    j = (drawn / np.sqrt(4 * methods.counts("llama", given))[:, None, None]).reshape(20, -1)
    np.testing.assert_allclose(result.measurement.kernel.matrices[0], j @ j.T, rtol=1e-8, atol=1e-10)
    content = result.to_dict()
    wanted = {"prompt": "prompt tuning", "prefix": "prefix tuning", "OFT": "OFT", "layers": "full"}[kind]
    assert content["placement"]["method"] == wanted
    assert content["placement"]["trainable_parameters"] == sum(p.numel() for p in parameters)
    assert content["details"]["adapter"]["draws_of_a"] == 1
    assert content["details"]["architecture"] == "LlamaForCausalLM"
    assert content["details"]["expected_bytes"]["features"] == 5 * 4 * sum(p.nbytes for p in parameters)


@pytest.mark.parametrize("reduction", ["loss", "fisher"])
def test_batch_size_changes_nothing(model, tokenizer, task, reduction):
    one, other = (
        ft.score(model, tokenizer, PROMPT, task, settings=settings_of(batch_size=size, reduction=reduction, repeats=2))
        for size in (1, 5)
    )
    left, right = one.measurement.kernel.matrices, other.measurement.kernel.matrices
    np.testing.assert_allclose(left, right, rtol=1e-8, atol=1e-10 * np.abs(left).max())
    assert one.plan.placed.adapted.layout.singly
    assert not other.plan.placed.adapted.layout.singly


def test_an_adapter_that_is_there_already_is_scored(model, tokenizer, task):
    new = ft.score(model, tokenizer, PROMPT, task, settings=settings_of())
    again = ft.score(new.plan.placed.placed, tokenizer, None, task, settings=settings_of())
    np.testing.assert_allclose(again.measurement.kernel.matrices, new.measurement.kernel.matrices, rtol=1e-12)


def test_virtual_tokens_take_positions(model, tokenizer, task):
    model.config.max_position_embeddings = 12
    for config, longest in ((PROMPT, 9), (CONFIGS["OFT"], 12)):
        plan = ft.score(model, tokenizer, config, task, settings=settings_of()).plan
        assert plan.placed.rows.max_length == longest
        assert max(len(feature["input_ids"]) for feature in plan.placed.known.features) == longest


def test_refusals(model, tokenizer, task, monkeypatch):
    cpt = peft.CPTConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=1, cpt_token_ids=[3], cpt_mask=[1], cpt_tokens_type_mask=[1]
    )
    with pytest.raises(PlacementError, match="CPT trains on a loss of its own"):
        ft.score(model, tokenizer, cpt, task, settings=settings_of())
    poly = peft.PolyConfig(r=2, n_tasks=2, n_skills=2, target_modules=["q_proj"])
    with pytest.raises(ForetuneError, match="task_ids should not be None"):
        ft.score(model, tokenizer, poly, task, settings=settings_of())
    monkeypatch.setattr(sequence_plan, "free_bytes", lambda _: 1000)
    with pytest.raises(ConfigError, match=r"score of 5 sequences .* lower --samples or --batch-size, or let fewer"):
        ft.score(model, tokenizer, PROMPT, task, settings=settings_of())


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_runs_with_virtual_tokens(model, tokenizer, task, kind):
    settings = ft.TuneSettings(epochs=1, learning_rate=1e-1, train_batch_size=4, batch_size=3, max_length=24)
    result = ft.tune(model.float(), tokenizer, CONFIGS[kind], task, settings=settings)
    before, after = result.history.epochs[0], result.last
    placed, evaluation = result.plan.placed.eval(), result.plan.evaluation.features
    total, count = 0.0, 0
    for feature in evaluation:
        ids = torch.tensor([feature["input_ids"]])
        with torch.no_grad():
            log_p = torch.log_softmax(placed(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0], dim=1)
        for position in range(1, ids.shape[1]):
            total, count = total - float(log_p[position - 1 - ids.shape[1], ids[0, position]]), count + 1
    assert after.eval_loss == pytest.approx(total / count, rel=1e-5)
    assert after.eval_loss < before.eval_loss
