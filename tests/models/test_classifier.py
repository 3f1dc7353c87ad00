import numpy as np
import pytest
import torch

from foretune.errors import ModelError
from foretune.models.classifier import batches, encode, load_classifier, position_limit

import cases

NAMES = ("negative", "positive")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cases.save(tmp_path_factory.mktemp("model"))


def load(source, **options):
    return load_classifier(source, **{"label_names": NAMES, "seed": 0, "device": "cpu", **options})


def test_loads_in_eval_mode_with_the_classes(folder):
    classifier = load(folder)
    assert not classifier.model.training
    assert classifier.model.config.id2label == dict(enumerate(NAMES))
    assert classifier.head_source == "seed 0"
    assert classifier.device == torch.device("cpu")


def test_the_seed_fixes_the_new_head(folder):
    heads = [load(folder, seed=seed).model.classifier.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_head_in_the_checkpoint_is_kept_or_replaced_by_size(tmp_path):
    source = cases.save(tmp_path / "m", head=True)
    assert load(source).head_source == "checkpoint"
    other = load(source, label_names=("a", "b", "c"))
    assert other.head_source == "seed 0"
    assert other.model.classifier.out_features == 3


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_dtype(folder, dtype):
    assert next(load(folder, dtype=dtype).model.parameters()).dtype == getattr(torch, dtype)


def test_bad_models_say_what_is_wrong(tmp_path, folder):
    with pytest.raises(ModelError, match="unknown dtype 'int8'"):
        load(folder, dtype="int8")
    with pytest.raises(ModelError, match=r"'/no/such/model' does not exist"):
        load("/no/such/model")
    with pytest.raises(ModelError, match=r"'no-such-model-anywhere'.*HF_HUB_OFFLINE is set"):
        load("no-such-model-anywhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot load model"):
        load(str(tmp_path / "empty"))
    with pytest.raises(ModelError, match="device 'cuda:77'"):
        load(folder, device="cuda:77")


def test_pickled_weights_are_never_read(tmp_path):
    source = tmp_path / "m"
    cases.save(source)
    from safetensors.torch import load_file

    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        load(str(source))


def test_weights_that_are_not_finite_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    source = tmp_path / "m"
    cases.save(source)
    weights = load_file(source / "model.safetensors")
    weights["encoder.layer.1.attention.self.value.weight"][0, 0] = float("inf")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layer\.1\.attention\.self\.value\.weight.*not finite"):
        load(str(source))


@pytest.mark.parametrize(("name", "limit"), [("bert", 512), ("roberta", 38), ("mpnet", 38), ("gpt2", 40)])
def test_position_limit(name, limit):
    assert position_limit(cases.tiny(name)) == limit


def test_encode_truncates_and_counts(folder):
    classifier = load(folder)
    texts = ["good film", "good " * 50, "bad"]
    encoded = encode(texts, None, classifier, max_length=512)
    assert encoded.max_length == 32  # the tokenizer's own limit
    assert encoded.n_truncated == 1
    assert encoded.lengths.tolist() == [4, 32, 3]
    assert encode(texts, None, classifier, max_length=3).n_truncated == 2
    pairs = encode(["good", "bad"], ["film", "very bad film"], classifier, max_length=512)
    assert pairs.lengths.tolist() == [5, 7]
    with pytest.raises(ModelError, match="max length 0"):
        encode(texts, None, classifier, max_length=0)


def test_batches_are_of_like_length_and_trimmed(folder):
    classifier = load(folder)
    texts = ["good", "good bad good bad", "good bad", "good bad good", "bad"]
    encoded = encode(texts, None, classifier, max_length=32)
    found = list(batches(encoded, classifier, batch_size=2))
    assert [batch.rows.tolist() for batch in found] == [[1, 3], [2, 0], [4]]
    assert [batch.inputs["input_ids"].shape[1] for batch in found] == [6, 4, 3]
    assert found[1].inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    some = list(batches(encoded, classifier, batch_size=8, rows=[4, 1]))
    assert [batch.rows.tolist() for batch in some] == [[1, 4]]
    assert np.concatenate([batch.rows for batch in found]).tolist() == [1, 3, 2, 0, 4]


def test_a_decoder_without_padding_token_gets_one(tmp_path):
    classifier = load(cases.save(tmp_path / "m", "gpt2", pad=False))
    assert classifier.tokenizer.pad_token == "[SEP]"
    encoded = encode(["good", "good bad good"], None, classifier, max_length=32)
    (batch,) = batches(encoded, classifier, batch_size=2)
    assert batch.inputs["attention_mask"].tolist()[1] == [1, 1, 1, 0, 0]  # on the right, whatever the tokenizer's side
