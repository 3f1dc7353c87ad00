"""The whole score on the real MiniLM and on tiny models, against independent computations."""

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel

import foretune as ft
from foretune.problem import describe, prepare
from foretune.scoring.passes import measure
from foretune.scoring.score import run_score
from foretune.tasks.classification import Classification
from foretune.tasks.demo import bbc_news, model_folder

import cases
import references

CLASSES = Classification(("negative", "positive"))
SETTINGS = {"samples": 10, "eval_samples": 6, "draws": 2, "max_length": 32, "batch_size": 4}


@pytest.fixture(scope="module")
def task():
    texts, labels = zip(*(cases.review(i) for i in range(60)), strict=True)
    train = datasets.Dataset.from_dict({"text": texts[:40], "label": labels[:40]})
    return ft.task_from_datasets(train, datasets.Dataset.from_dict({"text": texts[40:], "label": labels[40:]}))


@pytest.fixture
def model():
    return cases.tiny("bert")


def score_of(model, task, config=None, **options):
    settings = ft.ScoreSettings(**{**SETTINGS, **options})
    return ft.score(model, cases.tokenizer(), config or cases.lora("bert"), task, settings=settings)


def sequences_of(task, rows, split):
    tokenizer = cases.tokenizer()
    return [tokenizer(getattr(task, split).texts[row])["input_ids"] for row in rows]


def logits_of(model, sequences):
    with torch.no_grad():
        return np.array([model(input_ids=torch.tensor([sequence])).logits[0].numpy() for sequence in sequences])


def test_kernels_and_forecast_equal_slow_references(model, task):
    """Train and cross kernel from autograd loops; regression by solving the linear system."""
    result = score_of(model, task, ridge=0.5)
    m = result.measurement
    placed = ft.place(model, cases.lora("bert"), seed=0)
    parameters = references.named_parameters(placed, "lora_")
    directions = np.array([[-1.0], [1.0]])
    train = sequences_of(task, m.train_indices, "train")
    held = sequences_of(task, m.eval_indices, "evaluation")
    gradients = [references.parameter_gradients(placed, s, directions, parameters)[:, 0] for s in (train, held)]
    k, k_eval = gradients[0] @ gradients[0].T, gradients[1] @ gradients[0].T
    assert np.allclose(m.k_train_train[0], k, rtol=1e-9, atol=1e-12 * k.max())
    assert np.allclose(m.k_eval_train[0], k_eval, rtol=1e-9, atol=1e-12 * k.max())
    for sequences, found in ((train, m.f_train_0), (held, m.f_eval_0)):
        assert np.allclose(found, logits_of(model, sequences), rtol=1e-9)
    y = 2.0 * m.y_train - 1
    z, z_eval = m.f_train_0 @ directions[:, 0], m.f_eval_0 @ directions[:, 0]
    predicted = z_eval + k_eval @ np.linalg.solve(k + 0.5 * np.eye(10), y - z)
    own = result.draws[0]
    assert own.kernel_regression.metrics["eval_accuracy"] == np.mean((predicted > 0) == m.y_eval)
    assert own.kernel_regression.eval_mse == pytest.approx(np.mean((2 * m.y_eval - 1 - predicted) ** 2))
    residual = y - z - k @ np.linalg.solve(k + 1e-4 * np.eye(10), y - z)
    assert own.bounds.empirical_risk == pytest.approx(np.mean(residual**2), rel=1e-6)
    assert own.kernel.trace == pytest.approx(np.trace(k))
    assert own.kernel.condition_number == pytest.approx(
        (np.linalg.eigvalsh(k)[-1] + 1e-4) / (max(np.linalg.eigvalsh(k)[0], 0) + 1e-4), rel=1e-6
    )


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_batch_size_changes_nothing(model, task, batch_size):
    expected, found = score_of(model, task), score_of(model, task, batch_size=batch_size)
    assert np.allclose(found.measurement.k_eval_train, expected.measurement.k_eval_train, rtol=1e-10)
    assert np.allclose(found.measurement.k_train_train, expected.measurement.k_train_train, rtol=1e-10)


def test_the_users_model_is_left_as_it_is(model, task):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = score_of(model, task, head="probe").to_dict()
    score_of(model, task, head="average", heads=2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert score_of(model, task, head="probe").to_dict() | {"seconds": 0} == first | {"seconds": 0}


def test_a_peft_model_is_scored_as_it_is(model, task, tmp_path):
    """A saved adapter, loaded again by peft, has the kernel that it had before."""
    placed = ft.place(model, cases.lora("bert"), seed=3)
    trained = cases.with_nonzero_b(placed)
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(cases.tiny("bert"), tmp_path).eval()
    settings = ft.ScoreSettings(**SETTINGS)
    kernels = [
        ft.score(m, cases.tokenizer(), None, task, settings=settings).measurement.k_train_train
        for m in (trained, loaded)
    ]
    assert kernels[0].shape == (1, 10, 10)
    assert np.allclose(kernels[0], kernels[1], rtol=1e-6)


def test_probe_gives_every_sample_a_head_that_has_not_seen_it(model, task):
    """Logits and kernel of the cross-fitted head, sample by sample."""
    from foretune.ntk.probe import probe_folds

    result = score_of(model, task, head="probe")
    m = result.measurement
    placed = ft.place(model, cases.lora("bert"), seed=0)
    train = sequences_of(task, m.train_indices, "train")
    seen = []
    classifier = placed.base_model.model.classifier.modules_to_save["default"]
    handle = classifier.register_forward_hook(lambda _, args, __: seen.append(args[0][0].detach().numpy()))
    logits_of(placed, [*train, *sequences_of(task, m.eval_indices, "evaluation")])
    handle.remove()
    inputs, held = np.array(seen[:10]), np.array(seen[10:])
    for fold in probe_folds(10, seed=0):
        keep = np.setdiff1d(np.arange(10), fold)
        weight, bias = CLASSES.fit_output(inputs[keep], m.y_train[keep], intercept=True)
        assert np.allclose(m.f_train_0[fold], inputs[fold] @ weight.T + bias, rtol=1e-6)
    weight, bias = CLASSES.fit_output(inputs, m.y_train, intercept=True)  # nothing was held out of the evaluation
    assert np.allclose(m.f_eval_0, held @ weight.T + bias, rtol=1e-6)


def test_averaging_heads_is_the_mean_of_their_kernels(model, task):
    from foretune.models.head import installed, random_heads
    from foretune.models.placement import head_modules

    average = score_of(model, task, head="average", heads=3).measurement
    classifier = ft.Classifier("tiny", model, cases.tokenizer(), "given")
    plan = prepare(classifier, task, cases.lora("bert"), ft.ScoreSettings(**SETTINGS))
    modules = head_modules(plan.placed)
    singles = []
    for head in random_heads(plan.placed.get_base_model(), modules, count=3, seed=0):
        with installed(modules, head):
            singles.append(measure(plan))
    assert np.allclose(average.k_train_train, np.mean([s.k_train_train for s in singles], axis=0))
    assert np.allclose(average.f_eval_0, np.mean([s.f_eval_0 for s in singles], axis=0))
    assert len(set(average.head_traces)) == 3


def test_the_head_adds_its_kernel_when_asked_for(model, task):
    alone, both = score_of(model, task), score_of(model, task, ntk_params="adapter+head")
    head = alone.measurement.head_train_train
    assert np.allclose(both.measurement.k_train_train, alone.measurement.k_train_train + head)
    config = LoraConfig(r=2, target_modules=["query"])  # no task type: the head does not train
    assert score_of(model, task, config).head is None
    with pytest.raises(ft.ForetuneError, match="no head of linear modules trains"):
        score_of(model, task, config, ntk_params="adapter+head")


def test_repeats_draw_other_samples_and_keep_the_evaluation_rows(model, task):
    classifier = ft.Classifier("tiny", model, cases.tokenizer(), "given")
    plan = prepare(classifier, task, cases.lora("bert"), ft.ScoreSettings(**SETTINGS, repeats=3))
    counted = []
    result = run_score(plan, on_batch=counted.append)
    assert sum(counted) == plan.n_passes == 3 * 16
    assert len(result.repeats) == 3
    one, two = measure(plan, repeat=0), measure(plan, repeat=1)
    assert set(one.train_indices) != set(two.train_indices)
    assert np.array_equal(one.eval_indices, two.eval_indices)
    spread = result.to_dict()["spread"]["repeats"]["trace"]
    traces = [r.kernel.trace for r in result.repeats]
    assert spread["mean"] == pytest.approx(np.mean(traces))
    assert spread["standard_deviation"] == pytest.approx(np.std(traces, ddof=1))


def test_what_was_understood(model, task):
    classifier = ft.Classifier("tiny", model, cases.tokenizer(), "given")
    plan = prepare(classifier, task, cases.lora("bert"), ft.ScoreSettings(**{**SETTINGS, "max_length": 8}))
    facts = describe(plan)
    assert facts["architecture"] == "BertForSequenceClassification"
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["data"]["class_counts"] == [20, 20]
    assert sum(facts["data"]["sample_class_counts"]) == 10
    assert 0 < facts["data"]["truncated_share"] < 1
    assert facts["data"]["max_length"] == 8
    memory = facts["expected_bytes"]
    features = ft.tangent_features(plan.adapted, ft.batches(plan.train, classifier, batch_size=4), plan.reduction, n=10)
    assert memory["features"] == sum(b.numel() * b.element_size() for b in features.b)
    assert memory["total"] == memory["weights"] + memory["features"] + memory["activations"]


def test_classes_and_outputs_must_agree(task):
    with pytest.raises(ft.ForetuneError, match="3 outputs, the data set needs 2"):
        score_of(cases.tiny("bert", 3), task)


@pytest.mark.parametrize("name", cases.MODELS)
def test_every_architecture_scores(name, task):
    result = score_of(cases.tiny(name), task, cases.lora(name)).to_dict()
    assert result["kernel"]["trace"] > 0


@pytest.mark.real
def test_a_sensible_forecast_on_real_weights_and_texts():
    """MiniLM separates BBC topics from 32 samples; labels that were shuffled cannot be learned."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts, topics = bbc_news()
    rows = np.random.default_rng(0).permutation(len(texts))[:400]
    texts, topics = [texts[row] for row in rows], [topics[row] for row in rows]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=5).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["value"], layers_to_transform=[4, 5])
    settings = ft.ScoreSettings(samples=48, eval_samples=100, draws=2, max_length=32)
    accuracies = []
    for labels in (topics, np.random.default_rng(1).permutation(topics).tolist()):
        corpus = datasets.Dataset.from_dict({"text": texts, "label": labels})
        result = ft.score(model, tokenizer, config, ft.task_from_datasets(corpus), settings=settings)
        accuracies.append(result.draws[0].kernel_regression.eval_metric)
        assert result.measurement.epsilon == pytest.approx(1.19e-7, rel=0.01)
    assert accuracies[0] > 0.6
    assert accuracies[1] < 0.4


@pytest.mark.real
def test_real_weights_in_float32_agree_with_autograd_in_float64():
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=2).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], layers_to_transform=[0, 2, 5])
    placed = ft.place(model, config, seed=0)
    classifier = ft.Classifier("MiniLM", placed, tokenizer, "given")
    encoded = ft.encode(bbc_news()[0][:5], None, classifier, max_length=24)
    batches = ft.batches(encoded, classifier, batch_size=2)
    features = ft.tangent_features(ft.read_adapters(placed), batches, ft.output_reduction("margin", 2), n=5)
    found = ft.tangent_kernel(features).matrices()[0]
    exact = placed.double()
    sequences = [feature["input_ids"] for feature in encoded.features]
    parameters = references.named_parameters(exact, "lora_")
    gradients = references.parameter_gradients(exact, sequences, np.array([[-1.0], [1.0]]), parameters)
    expected = references.scalar_kernel(gradients)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
