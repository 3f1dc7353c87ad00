import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from foretune.errors import ConfigError
from foretune.models.classifier import load_classifier
from foretune.models.head import HeadWeights, current_weights, installed, random_heads
from foretune.models.placement import head_modules, place, read_adapters
from foretune.ntk.probe import head_inputs, probe_folds, probe_weights
from foretune.tasks.classification import Classification

import cases
from cases import batch_of, lora, ragged, tiny


def classes(count):
    return Classification(tuple(map(str, range(count))))


def placed(name, n_classes=2):
    return place(tiny(name, n_classes), lora(name), seed=0)


@pytest.mark.parametrize("name", cases.MODELS)
def test_head_inputs_are_what_the_output_layer_sees(name):
    """logits = V φ + b with the φ that was read off, wherever the model pools."""
    model, sequences = placed(name, 3), ragged()
    layer_name, layer = list(head_modules(model).items())[-1]
    batches = [batch_of(sequences, [3, 1, 5]), batch_of(sequences, [0, 2, 4])]
    inputs = head_inputs(read_adapters(model), {layer_name: layer}, batches, n=6, n_outputs=3)
    with torch.no_grad():
        logits = model(**batch_of(sequences).inputs).logits
        expected = inputs @ layer.weight.T + (0 if layer.bias is None else layer.bias)
    assert float((expected - logits).norm()) < cases.within(name, 1e-10) * float(logits.norm())


def test_random_heads_are_the_models_own_draws():
    model = placed("roberta")
    modules = head_modules(model)
    before = current_weights(modules)
    heads = random_heads(model.get_base_model(), modules, count=200, seed=0)
    assert len(heads) == 200
    after = current_weights(modules)
    for name, (weight, bias) in before.weights.items():
        assert torch.equal(heads[0].weights[name][0], weight)
        assert torch.equal(after.weights[name][0], weight)  # the model keeps its head
        assert torch.equal(after.weights[name][1], bias)
    drawn = torch.stack([head.weights["classifier.out_proj"][0] for head in heads[1:]])
    assert drawn.std().item() == pytest.approx(model.config.initializer_range, rel=0.05)
    assert not torch.equal(drawn[0], drawn[1])
    assert all(not head.weights["classifier.dense"][1].any() for head in heads[1:])
    again = random_heads(model.get_base_model(), modules, count=2, seed=0)
    assert torch.equal(again[1].weights["classifier.dense"][0], heads[1].weights["classifier.dense"][0])
    with pytest.raises(ConfigError, match="0 heads"):
        random_heads(model.get_base_model(), modules, count=0, seed=0)


def test_installed_puts_the_old_head_back_after_an_error():
    modules = head_modules(placed("bert"))
    (name, layer), before = *modules.items(), current_weights(modules)
    new = HeadWeights({name: (torch.ones_like(layer.weight), torch.ones_like(layer.bias))})

    def fail_inside():
        with installed(modules, new):
            assert (layer.weight == 1).all()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert torch.equal(layer.weight, before.weights[name][0])
    assert torch.equal(layer.bias, before.weights[name][1])


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("intercept", [True, False])
def test_probe_is_a_logistic_regression_on_standardised_inputs(n_classes, intercept):
    rng = np.random.default_rng(0)
    inputs = rng.normal(2.0, [1.0, 10.0, 0.1, 3.0, 0.0], (60, 5))  # the last column is constant
    labels = rng.integers(0, n_classes, 60)
    labels[inputs[:, 0] > 2.5] = 0
    weight, bias = classes(n_classes).fit_output(inputs, labels, intercept=intercept)
    assert weight.shape == (n_classes, 5)
    assert np.all(weight[:, 4] == 0)
    spread = inputs.std(0)[:4] * np.sqrt(5)
    shift = inputs.mean(0)[:4] if intercept else 0.0
    reference = LogisticRegression(C=1.0, fit_intercept=intercept, max_iter=1000)
    expected = reference.fit((inputs[:, :4] - shift) / spread, labels).predict_proba((inputs[:, :4] - shift) / spread)
    logits = inputs @ weight.T + (0 if bias is None else bias)
    found = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert np.allclose(found, expected, atol=1e-6)


def test_probe_of_an_absent_class_gives_it_the_least_chance():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(30, 4))
    labels = np.where(inputs[:, 0] > 0, 3, 1)
    weight, bias = classes(5).fit_output(inputs, labels, intercept=True)
    assert np.all(weight[[0, 2, 4]] == 0)
    assert set(np.argmax(inputs @ weight.T + bias, axis=1)) <= {1, 3}
    with pytest.raises(ConfigError, match="2 classes"):
        classes(2).fit_output(inputs, np.zeros(30, dtype=int), intercept=True)


def test_cross_fitted_heads_have_not_seen_their_fold():
    rng = np.random.default_rng(0)
    layer = torch.nn.Linear(4, 2).double()
    inputs = torch.as_tensor(rng.normal(size=(20, 4)))
    labels = (inputs[:, 0] > 0).long().numpy()
    folds = probe_folds(20, seed=0)
    assert sorted(np.concatenate(folds).tolist()) == list(range(20))
    assert len(folds) == 5
    heads = probe_weights("c", layer, inputs, classes(2), labels, left_out=folds)
    changed = inputs.clone()
    changed[folds[2]] = 100.0  # what is left out of head 2 does not move it, but moves the others
    others = probe_weights("c", layer, changed, classes(2), labels, left_out=folds)
    assert torch.equal(heads[2].weights["c"][0], others[2].weights["c"][0])
    assert not torch.allclose(heads[0].weights["c"][0], others[0].weights["c"][0])


def test_a_head_from_a_checkpoint_can_be_drawn_anew(tmp_path):
    """transformers marks loaded parameters so that its initialisation skips them."""
    source = cases.save(tmp_path / "m", head=True)
    model = load_classifier(source, label_names=("a", "b"), seed=0, device="cpu").model
    modules = head_modules(place(model, lora("bert"), seed=0))
    first, second, third = random_heads(model, modules, count=3, seed=0)
    weights = [head.weights["classifier"][0] for head in (first, second, third)]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert weights[1].std().item() < 0.05 < weights[0].std().item()  # the checkpoint's own is ten times as large
