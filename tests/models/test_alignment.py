"""Model and tokenizer agree on the padding, for loaded models and the user's own, and nothing else changes a kernel."""

import copy
import functools
import json

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from peft import get_peft_model

import foretune as ft
from foretune.errors import ForetuneError, ModelError
from foretune.models.alignment import is_neutral, padding_side, sharing_copy
from foretune.models.classifier import batches, encode, load_classifier, own_classifier, position_limit
from foretune.tasks.classification import Classification

import cases

TEXTS = [cases.review(index)[0] for index in range(12)]
TWO = Classification(("0", "1"))
DECODERS = ("gpt2", "llama", "opt", "xlnet")
SETTINGS = ft.ScoreSettings(samples=12, max_length=32, eval_samples=6, draws=1)


@pytest.fixture(scope="module")
def task():
    rows = [cases.review(index) for index in range(40)]
    columns = {"text": [text for text, _ in rows], "label": [int(label == "positive") for _, label in rows]}
    return ft.task_from_datasets(datasets.Dataset.from_dict(columns))


def modules(family):
    names = {"opt": ["q_proj", "v_proj"], "bart": ["q_proj", "v_proj"], "xlnet": ["layer_1"]}
    return cases.lora(family) if family in cases.TARGETS else ft_lora(names[family])


def ft_lora(targets):
    return cases.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=targets)


def logits(classifier, batch_size):
    encoded = encode(TEXTS, None, classifier, max_length=32)
    found = torch.zeros(len(TEXTS), 2, dtype=torch.float64)
    for batch in batches(encoded, classifier, batch_size=batch_size):
        with torch.no_grad():
            found[batch.rows] = classifier.model(**batch.inputs).logits.double()
    return found


def trace(model, task, config, tokenizer=None, batch_size=8):
    settings = ft.ScoreSettings(**{**vars(SETTINGS), "batch_size": batch_size})
    result = ft.score(model, tokenizer or cases.tokenizer(), config, task, settings=settings)
    return result.measurement.k_train_train


@pytest.fixture(scope="module")
def plain(task):
    """Kernels of models as they are, each computed once."""
    return functools.cache(lambda family: trace(cases.tiny(family), task, modules(family)))


@pytest.mark.parametrize("pad", [0, 2, -1, None, 49])
@pytest.mark.parametrize("family", [*DECODERS, "bart", "t5", "bert", "roberta"])
def test_logits_of_a_loaded_model_are_never_read_at_a_padding_position(tmp_path, family, pad):
    cases.save(tmp_path, family, head=True)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if not (family == "roberta" and pad != 0):  # RoBERTa counts its positions from there
        path.write_text(json.dumps({**content, "pad_token_id": pad}), encoding="utf-8")
    classifier = load_classifier(str(tmp_path), label_names=("0", "1"), seed=0, device="cpu")
    assert classifier.model.config.pad_token_id == classifier.tokenizer.pad_token_id == 1
    torch.testing.assert_close(logits(classifier, 1), logits(classifier, 32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pad", [0, 2, -1, None])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_a_kernel_does_not_depend_on_the_padding_token_or_the_batch_size(task, plain, family, pad):
    expected = plain(family)
    model = cases.tiny(family)
    model.config.pad_token_id = pad
    for batch_size in (1, 32):
        found = trace(model, task, modules(family), batch_size=batch_size)
        assert np.linalg.norm(found - expected) < cases.within(family, 1e-9) * np.linalg.norm(expected)
    assert model.config.pad_token_id == pad  # the user's own is left as it is


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_tokenizer_without_padding_token_is_left_without(task, family):
    tokenizer = cases.tokenizer(pad=False)
    model = cases.tiny(family)
    model.config.pad_token_id = None
    one, many = (trace(model, task, cases.lora(family), tokenizer, batch_size) for batch_size in (1, 32))
    assert np.linalg.norm(one - many) < cases.within(family, 1e-9) * np.linalg.norm(many)
    assert tokenizer.pad_token is None
    assert model.config.pad_token_id is None


def test_a_fine_tune_takes_the_same_padding(task):
    model = cases.tiny("gpt2", dtype=torch.float32)
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    other.config.pad_token_id = 0
    settings = ft.TuneSettings(epochs=1, max_length=32, learning_rate=1e-2, train_batch_size=8)
    losses = [
        ft.tune(one, cases.tokenizer(), cases.lora("gpt2"), task, settings=settings).history.epochs[-1].eval_loss
        for one in (plain, other)
    ]
    assert losses[0] == losses[1]


def test_a_tokenizer_without_anything_to_pad_with_is_refused(task):
    tokenizer = cases.tokenizer(pad=False)
    tokenizer.eos_token = tokenizer.unk_token = None
    with pytest.raises(ModelError, match=r"no padding token: set tokenizer\.pad_token"):
        ft.score(cases.tiny("gpt2"), tokenizer, cases.lora("gpt2"), task, settings=SETTINGS)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_tokens_beyond_the_table_are_refused_with_the_way_out(tmp_path, task, family):
    tokenizer = cases.tokenizer(pad=False)
    tokenizer.add_tokens([f"new{number}" for number in range(40)])
    tokenizer.add_special_tokens({"pad_token": "<|mypad|>"})
    beyond = r"'<\|mypad\|>' has the id 63, .* 50 rows: call model\.resize_token_embeddings"
    with pytest.raises(ModelError, match=beyond):
        ft.score(cases.tiny(family), tokenizer, cases.lora(family), task, settings=SETTINGS)
    cases.tiny(family, dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=beyond):
        load_classifier(str(tmp_path), label_names=("0", "1"), seed=0, device="cpu")
    tokenizer.pad_token = "[SEP]"
    classifier = own_classifier(cases.tiny(family), tokenizer, TWO, bare=True)
    with pytest.raises(ModelError, match=r"'new39' has the id 62, .* 50 rows"):
        encode(["good", "new39 film"], None, classifier, max_length=9)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_padding_with_the_token_that_is_read_is_refused(family):
    tokenizer = cases.tokenizer()
    tokenizer.pad_token = "[SEP]"
    with pytest.raises(ModelError, match=r"end-of-text token '\[SEP\]'"):
        own_classifier(cases.tiny(family), tokenizer, TWO, bare=True)


def test_xlnet_is_padded_on_the_left():
    assert padding_side(cases.tiny("xlnet")) == "left"
    assert {padding_side(cases.tiny(family)) for family in (*cases.MODELS, "xlm", "bart")} == {"right"}


def checkpointed(model):
    model.config._name_or_path = "x"
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True


CHANGES = {
    "checkpointing": checkpointed,
    "input gradients": lambda model: model.enable_input_require_grads(),
    "tuples": lambda model: setattr(model.config, "return_dict", False),
    "another task": lambda model: setattr(model.config, "problem_type", "multi_label_classification"),
    "training mode": lambda model: model.train(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama"])
def test_what_a_model_brings_from_another_task_changes_no_kernel(task, plain, family, change):
    model = cases.tiny(family)
    CHANGES[change](model)
    before = copy.deepcopy(model)
    assert (trace(model, task, modules(family)) == plain(family)).all()
    assert model.config.to_dict() == before.config.to_dict()
    assert [len(m._forward_hooks) for m in model.modules()] == [len(m._forward_hooks) for m in before.modules()]
    assert all(
        getattr(one, "gradient_checkpointing", None) == getattr(other, "gradient_checkpointing", None)
        for one, other in zip(model.modules(), before.modules(), strict=True)
    )


@pytest.mark.parametrize("change", ["checkpointing", "input gradients", "tuples", "another task"])
def test_a_peft_model_is_brought_to_agree_too_and_its_own_weights_are_trained(task, change):
    placed = get_peft_model(cases.tiny("bert", dtype=torch.float32), cases.lora("bert")).eval()
    plain = trace(copy.deepcopy(placed), task, None)
    CHANGES[change](placed.get_base_model())
    assert (trace(placed, task, None) == plain).all()
    settings = ft.TuneSettings(epochs=1, max_length=32, learning_rate=1e-2, train_batch_size=8)
    ft.tune(placed, cases.tokenizer(), None, task, settings=settings)
    assert any(bool(p.any()) for name, p in placed.named_parameters() if "lora_B" in name)


def test_what_needs_nothing_is_taken_as_it_is():
    model, tokenizer = cases.tiny("bert"), cases.tokenizer()
    assert is_neutral(model, tokenizer, TWO.problem_type)
    classifier = own_classifier(model, tokenizer, TWO, bare=True)
    assert classifier.model is model
    assert classifier.tokenizer is tokenizer
    shared = sharing_copy(model)
    assert shared.classifier.weight is model.classifier.weight
    assert shared.config is not model.config


def wrong_kinds():
    llama, bert = cases.tiny("llama"), cases.tiny("bert")
    yield "no head", bert.base_model
    yield "no head", llama.base_model
    yield "no head", tf.LlamaForCausalLM(llama.config).eval()
    yield "no head", tf.BertForMaskedLM(bert.config).eval()
    yield "no head", tf.BertForTokenClassification(bert.config).eval()
    yield "expected a transformers sequence classifier", torch.nn.Linear(2, 2)
    yield "expected a transformers sequence classifier", None
    yield "expected a transformers sequence classifier", "a/path"


@pytest.mark.parametrize(("words", "model"), list(wrong_kinds()), ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("act", ["score", "rank", "tune"])
def test_a_model_without_the_head_of_classes_is_refused_with_the_remedy(task, act, words, model):
    arguments = (task,) if act == "rank" else (ft_lora(["query"]), task)
    with pytest.raises(ForetuneError, match=words) as caught:
        getattr(ft, act)(model, cases.tokenizer(), *arguments)
    assert "\n" not in str(caught.value)


class Bare(tf.BertPreTrainedModel):
    """A class of the user's own that gives no logits."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = tf.BertModel(config)
        self.classifier = torch.nn.Linear(16, 2)

    def forward(self, input_ids=None, attention_mask=None, **options):
        return self.bert(input_ids, attention_mask)


def test_a_class_of_the_users_own_is_tried_out(task):
    with pytest.raises(ModelError, match=r"Bare gives no logits .*AutoModelForSequenceClassification"):
        ft.score(Bare(cases.tiny("bert").config).eval(), cases.tokenizer(), ft_lora(["query"]), task, settings=SETTINGS)
    model = cases.tiny("bert")
    model.config.num_labels = 3
    with pytest.raises(ModelError, match=r"logits of shape \(2, 2\) for 2 texts and 3 outputs"):
        own_classifier(model, cases.tokenizer(), Classification(("0", "1", "2")), bare=True)


@pytest.mark.parametrize("tokenizer", [None, "bert", len])
def test_what_is_no_tokenizer_is_refused(tokenizer):
    with pytest.raises(ModelError, match="expected a transformers tokenizer"):
        own_classifier(cases.tiny("bert"), tokenizer, TWO, bare=True)


@pytest.mark.parametrize("act", ["score", "rank", "tune"])
def test_an_adapter_that_is_there_already_is_named(task, act):
    placed = get_peft_model(cases.tiny("bert"), cases.lora("bert")).eval()
    arguments = (task,) if act == "rank" else (cases.lora("bert"), task)
    for model in (placed, placed.get_base_model()):
        with pytest.raises(ModelError, match=r"carries an adapter already.*unload") as caught:
            getattr(ft, act)(model, cases.tokenizer(), *arguments)
        assert "base_layer" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "limit"), [(-1, None), (0, None), (None, None), (10**30, None), (1e30, None), ("x", None), (64, 64)]
)
def test_limits_of_positions_that_are_none(value, limit):
    model = cases.tiny("llama")
    object.__setattr__(model.config, "max_position_embeddings", value)
    assert position_limit(model) == limit


@pytest.mark.parametrize("limit", [-1, 0, 1e30, 10**30, float("inf"), float("nan"), 3.5, 8])
@pytest.mark.parametrize("family", ["xlnet", "bert", "t5"])
def test_lengths_that_a_tokenizer_says(family, limit):
    tokenizer = cases.tokenizer()
    classifier = own_classifier(cases.tiny(family), tokenizer, TWO, bare=True)
    tokenizer.model_max_length = limit
    encoded = encode(["good " * 40], None, classifier, max_length=20)
    assert encoded.max_length == {3.5: 3, 8: 8}.get(limit, 20)
    for short in (1, 2):  # [CLS] and [SEP] alone
        with pytest.raises(ModelError, match=f"max length {short} leaves no room"):
            encode(["good film"], None, classifier, max_length=short)
    with pytest.raises(ModelError, match="max length 3 leaves no room"):
        encode(["good film"], ["bad"], classifier, max_length=3)
    for wrong in (None, "512", []):
        tokenizer.model_max_length = wrong
        with pytest.raises(ModelError, match=r"model_max_length .* is no number"):
            encode(["good"], None, classifier, max_length=20)
