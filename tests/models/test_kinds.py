"""Models of every kind of task: their heads are loaded, their losses transformers' own, the user's model left alone."""

import copy

import numpy as np
import pytest
import torch

from foretune.errors import ModelError
from foretune.models.classifier import load_classifier, own_classifier
from foretune.tasks.classification import Classification
from foretune.tasks.kinds import KINDS, objective_of
from foretune.tasks.multi_label import MultiLabel
from foretune.tasks.regression import Regression

import cases

OBJECTIVES = [
    Classification(("a", "b")),
    Classification(("a", "b", "c")),
    Regression(("score",)),
    Regression(("valence", "arousal")),
    MultiLabel(("a",)),
    MultiLabel(("a", "b", "c")),
]
IDS = [f"{objective.kind}-{len(objective.names)}" for objective in OBJECTIVES]


def load(source, objective, **options):
    options = {"seed": 0, "device": "cpu", "task": objective.kind, **options}
    return load_classifier(str(source), label_names=objective.names, **options)


def targets_of(objective, n):
    generator = np.random.default_rng(0)
    if objective.kind == "classification":
        return generator.integers(0, len(objective.names), n)
    targets = generator.normal(size=(n, len(objective.names)))
    return targets if objective.kind == "regression" else (targets > 0).astype(float)


def saved(folder, objective, family="bert", **changes):
    """A fine-tuned model as it comes from a training of the kind."""
    model = cases.tiny(family, len(objective.names), dtype=torch.float32)
    model.config.problem_type = objective.problem_type
    model.config.id2label = dict(enumerate(objective.names))
    model.config.label2id = {name: number for number, name in enumerate(objective.names)}
    for name, value in changes.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    cases.tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "llama", "xlnet", "t5"])
@pytest.mark.parametrize("n", [1, 5])
def test_the_loss_of_an_objective_is_that_of_the_model(family, objective, n):
    model = cases.tiny(family, len(objective.names))
    tokenizer = cases.tokenizer()
    classifier = own_classifier(model, tokenizer, objective, bare=True)
    batch = cases.batch_of([[5, 6, 7, 3]] * n).inputs
    torch.manual_seed(0)
    batch["input_ids"][:, :3] = torch.randint(4, cases.VOCABULARY, (n, 3))
    targets = objective.tensor(targets_of(objective, n))
    with torch.no_grad():
        output = classifier.model(**batch, labels=targets)
    expected = objective.loss(output.logits, targets).mean()
    torch.testing.assert_close(output.loss, expected, check_dtype=False, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_a_checkpoint_of_the_kind_is_loaded_with_its_head(tmp_path, objective):
    model = saved(tmp_path, objective)
    classifier = load(tmp_path, objective)
    assert (classifier.head_source, classifier.new, classifier.notes) == ("checkpoint", (), ())
    assert torch.equal(classifier.model.classifier.weight, model.classifier.weight)
    config = classifier.model.config
    assert (config.num_labels, config.problem_type) == (len(objective.names), objective.problem_type)
    assert tuple(config.id2label.values()) == objective.names


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_a_pretrained_model_gets_a_new_head_of_the_kind(tmp_path, objective):
    cases.save(tmp_path)
    classifier = load(tmp_path, objective)
    assert "classifier" in classifier.new
    assert classifier.model.config.problem_type == objective.problem_type
    assert classifier.model.classifier.out_features == len(objective.names)
    # the head of as many outputs is the same for every kind
    other = load_classifier(str(tmp_path), label_names=objective.names, seed=0, device="cpu")
    assert torch.equal(classifier.model.classifier.weight, other.model.classifier.weight)


def test_the_labels_of_a_checkpoint_follow_the_names_of_the_data(tmp_path):
    model = saved(tmp_path, MultiLabel(("b", "c", "a")))
    classifier = load(tmp_path, MultiLabel(("a", "b", "c")))
    assert torch.equal(classifier.model.classifier.weight, model.classifier.weight[[2, 0, 1]])
    assert "has the labels in the order 'b', 'c', 'a'" in classifier.notes[0]


def test_a_head_of_one_number_needs_no_name(tmp_path):
    model = saved(tmp_path, Regression(("LABEL_0",)))
    classifier = load(tmp_path, Regression(("similarity",)))
    assert torch.equal(classifier.model.classifier.weight, model.classifier.weight)
    assert classifier.notes == ()


def test_a_head_that_was_trained_for_another_kind_is_said(tmp_path):
    saved(tmp_path, Regression(("a", "b")))
    (note,) = load(tmp_path, MultiLabel(("a", "b"))).notes
    assert note == "the checkpoint's head was trained for 'regression', and is taken on for multi-label"


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
@pytest.mark.parametrize("stated", [None, *(kind.problem_type for kind in KINDS.values())])
def test_the_users_model_is_set_to_the_kind_on_a_copy_alone(objective, stated):
    model, tokenizer = cases.tiny("bert", len(objective.names)), cases.tokenizer()
    model.config.problem_type = stated
    before = copy.deepcopy(model.config.to_dict())
    classifier = own_classifier(model, tokenizer, objective, bare=True)
    assert model.config.to_dict() == before
    labels = objective.tensor(targets_of(objective, 2))
    batch = cases.batch_of([[5, 6, 7, 3]] * 2).inputs
    output = classifier.model(**batch, labels=labels)
    torch.testing.assert_close(output.loss, objective.loss(output.logits, labels).mean(), check_dtype=False)
    assert classifier.model.classifier.weight is model.classifier.weight
    if classifier.model is not model:  # transformers itself enters what a model of classes is for
        assert model.config.to_dict() == before


def test_a_model_with_other_outputs_is_refused():
    for objective in (Regression(("score",)), MultiLabel(("a", "b", "c")), Classification(("a", "b", "c"))):
        n = len(objective.names)
        with pytest.raises(
            ModelError, match=rf"2 outputs, the data set needs {n} \({objective.kind}\).*num_labels={n}"
        ):
            own_classifier(cases.tiny("bert", 2), cases.tokenizer(), objective, bare=True)


def test_kinds_are_those_of_the_settings():
    from typing import get_args

    from foretune.settings.groups import LabelKind

    assert tuple(KINDS) == get_args(LabelKind)
    assert objective_of("multi-label", ["a", "b"]) == MultiLabel(("a", "b"))
