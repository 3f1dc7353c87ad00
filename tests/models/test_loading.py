"""What is read of a model: weights that fit, a tokenizer that knows words, no code, and one line for every fault."""

import ast
import io
import json
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
import yaml
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from foretune.cli import run
from foretune.errors import ForetuneError, ModelError
from foretune.models.classifier import batches, encode, load_classifier
from foretune.models.form import Form
from foretune.models.loading import load_parts, model_files, read_skeleton
from foretune.models.source import locate
from foretune.tasks.classification import Classification

import cases

NAMES = ("negative", "positive")
LAYERS = {"gpt2": "n_layer", "distilbert": "n_layers"}


def load(source, **options):
    return load_classifier(str(source), **{"label_names": NAMES, "seed": 0, "device": "cpu", **options})


def edit(path, **changes):
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def rewrite(folder, change):
    path = folder / "model.safetensors"
    weights = {name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}
    save_file(weights, path, metadata={"format": "pt"})


def prefixed(prefix):
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def renamed(old, new):
    return lambda weights: {name.replace(old, new): tensor for name, tensor in weights.items()}


def without(part):
    return lambda weights: {name: tensor for name, tensor in weights.items() if part not in name}


# --- weights that do not fit


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "llama", "mpnet"])
@pytest.mark.parametrize(
    ("change", "hint"),
    [
        (prefixed("module."), "module"),
        (prefixed("_orig_mod."), "_orig_mod"),
        (prefixed("base_model.model."), "base_model"),
        (prefixed("my.wrapper."), "weights of the architecture"),
        (renamed(".weight", ".base_layer.weight"), "merge the adapter"),
        (renamed("1.", "1._orig_mod."), "_orig_mod"),
        (renamed("0.", "zero."), "config.json"),
        (without(".1."), "fewer layers"),
    ],
)
def test_a_backbone_that_the_checkpoint_does_not_give_is_refused(tmp_path, family, head, change, hint):
    source = tmp_path / "m"
    cases.save(source, family, head=head)
    rewrite(source, change)
    with pytest.raises(ModelError, match=r"does not give \d+ weights? of the architecture") as caught:
        load(source)
    assert hint in str(caught.value)
    assert len(str(caught.value)) <= 450
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["bert", "gpt2", "distilbert"])
def test_one_missing_weight_is_named(tmp_path, family):
    source = tmp_path / "m"
    cases.save(source, family)
    gone = sorted(load_file(source / "model.safetensors"))[5]
    rewrite(source, without(gone))
    with pytest.raises(ModelError, match="does not give 1 weight") as caught:
        load(source)
    assert gone in str(caught.value)


@pytest.mark.parametrize(
    ("change", "shape"),
    [({"vocab_size": 60}, "50 × 16 instead of 60 × 16"), ({"intermediate_size": 32}, "24 × 16 instead of 32 × 16")],
)
def test_other_sizes_than_in_the_configuration_are_named(tmp_path, change, shape):
    source = tmp_path / "m"
    cases.save(source, head=True)
    edit(source / "config.json", **change)
    with pytest.raises(ModelError, match=shape):
        load(source)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "llama"])
def test_more_layers_and_fewer_than_in_the_configuration(tmp_path, family):
    for n_layers, words in ((1, "more layers than config"), (3, "fewer layers than config"), (0, "num_hidden_layers")):
        source = tmp_path / str(n_layers)
        cases.save(source, family)
        edit(source / "config.json", **{LAYERS.get(family, "num_hidden_layers"): n_layers})
        with pytest.raises(ModelError, match=words):
            load(source)


NEW = {
    "bert": ("classifier",),
    "albert": ("classifier",),
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "electra": ("classifier.dense", "classifier.out_proj"),
    "distilbert": ("pre_classifier", "classifier"),
    "deberta-v2": ("pooler.dense", "classifier"),
    "mpnet": ("classifier.dense", "classifier.out_proj"),
    "modernbert": ("head.dense", "head.norm", "classifier"),
    "xlm": ("sequence_summary.summary",),
    "xlnet": ("sequence_summary.summary", "logits_proj"),
    "gpt2": ("score",),
    "llama": ("score",),
    "opt": ("score",),
    "bart": ("classification_head.dense", "classification_head.out_proj"),
    "t5": ("classification_head.dense", "classification_head.out_proj"),
}
OF_LANGUAGE_MODEL = {
    "bert": ("bert.pooler.dense", "classifier"),
    "albert": ("albert.pooler", "classifier"),
    "modernbert": ("classifier",),  # its head is that of the masked words, by design
}


@pytest.mark.parametrize("family", NEW)
def test_new_is_the_head_and_a_pooler_that_never_was(tmp_path, family):
    base, masked, whole = (tmp_path / name for name in ("base", "masked", "whole"))
    cases.save(base, family)
    classifier = load(base)
    assert classifier.new == NEW[family]
    assert classifier.head_source == "seed 0"
    cases.save(whole, family, head=True)
    assert load(whole).new == ()
    others = load(whole, label_names=("a", "b", "c"))
    assert set(others.new) <= set(NEW[family])
    assert others.new[-1] == NEW[family][-1]
    config = tf.AutoConfig.from_pretrained(base)
    kinds = (tf.AutoModelForMaskedLM, tf.AutoModelForSeq2SeqLM, tf.AutoModelForCausalLM)
    kind = next(kind for kind in kinds if type(config) in kind._model_mapping)
    kind.from_config(config).save_pretrained(masked)
    cases.tokenizer().save_pretrained(masked)
    assert load(masked).new == OF_LANGUAGE_MODEL.get(family, NEW[family])


def test_a_pooler_that_the_checkpoint_has_under_another_name_is_refused(tmp_path):
    cases.save(tmp_path / "m")
    rewrite(tmp_path / "m", renamed("pooler.dense", "pooler.linear"))
    with pytest.raises(ModelError, match=r"pooler\.dense\.weight"):
        load(tmp_path / "m")


def test_the_start_up_lines_name_what_is_new(tmp_path, capsys):
    model, data = cases.save(tmp_path / "m"), cases.write_reviews(tmp_path / "d")
    rewrite(tmp_path / "m", without("pooler"))
    few = ["--model", model, "--dataset", data, "--target-modules", "query"]
    assert run(["score", *few, "--samples", "8", "--eval-samples", "4", "--draws", "1"]) == 0
    assert "bert.pooler.dense, classifier from seed 0" in capsys.readouterr().err
    assert run(["tune", *few, "--epochs", "1", "--output", str(tmp_path / "out")]) == 0
    assert "bert.pooler.dense, classifier from seed 0" in capsys.readouterr().err


# --- tokenizers


@pytest.mark.parametrize("family", [*cases.MODELS, *cases.OTHERS])
def test_a_folder_without_tokenizer_is_refused(tmp_path, family):
    cases.save(tmp_path / "m", family)
    for path in (tmp_path / "m").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"tokenizer.*tokenizer\.save_pretrained\(folder\)"):
        load(tmp_path / "m")


def test_a_vocabulary_of_special_tokens_alone_is_refused(tmp_path):
    cases.save(tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vocab"] = {token: number for token, number in content["model"]["vocab"].items() if "[" in token}
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelError, match="empty vocabulary"):
        load(tmp_path / "m")


def test_texts_of_which_no_word_is_known_are_refused(tmp_path):
    classifier = load(cases.save(tmp_path / "m"))
    with pytest.raises(ModelError, match="knows no word"):
        encode(["xyzzy", "plugh xyzzy"], None, classifier, max_length=8)
    assert encode(["xyzzy", "good"], None, classifier, max_length=8).lengths.tolist() == [3, 3]


# --- checkpoints that bring a task


def logits(classifier, batch_size=32, n=6):
    texts = [cases.review(index)[0] for index in range(n)]
    encoded = encode(texts, None, classifier, max_length=20)
    found = torch.zeros(n, int(classifier.model.config.num_labels), dtype=torch.float64)
    for batch in batches(encoded, classifier, batch_size=batch_size):
        with torch.no_grad():
            found[batch.rows] = classifier.model(**batch.inputs).logits.double()
    return found


@pytest.mark.parametrize("family", [*cases.MODELS, *cases.OTHERS])
def test_a_head_follows_the_names_of_its_classes(tmp_path, family):
    source = tmp_path / "m"
    cases.save(source, family, head=True)
    edit(source / "config.json", id2label={"0": "negative", "1": "positive"}, label2id={"negative": 0, "positive": 1})
    as_named = load(source)
    assert as_named.notes == ()
    assert as_named.head_source == "checkpoint"
    swapped = load(source, label_names=("positive", "negative"))
    assert "in the order 'negative', 'positive'" in swapped.notes[0]
    assert torch.equal(logits(swapped), logits(as_named)[:, [1, 0]])
    assert swapped.model.config.id2label == {0: "positive", 1: "negative"}
    assert torch.equal(logits(load(source, label_names=("Positive", "NEGATIVE"))), logits(swapped))


def test_three_classes_are_put_in_order(tmp_path):
    model = cases.MODELS["roberta"](3)
    model.config.id2label = {0: "contradiction", 1: "entailment", 2: "neutral"}
    model.config.label2id = {name: number for number, name in model.config.id2label.items()}
    model.save_pretrained(tmp_path)
    cases.tokenizer().save_pretrained(tmp_path)
    mine = ("entailment", "neutral", "contradiction")
    theirs = load(tmp_path, label_names=tuple(model.config.id2label.values()))
    assert torch.equal(logits(load(tmp_path, label_names=mine)), logits(theirs)[:, [1, 2, 0]])


def test_other_names_and_none_are_noted_and_contradictions_refused(tmp_path):
    source = tmp_path / "m"
    cases.save(source, head=True)
    assert "no names of classes" in load(source).notes[0]
    assert load(source, label_names=("0", "1")).notes == ()
    plain = logits(load(source))
    edit(source / "config.json", id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1})
    assert "other names of classes, 'bad', 'good'" in load(source).notes[0]
    assert torch.equal(logits(load(source)), plain)
    edit(source / "config.json", id2label={"0": "LABEL_0", "1": "LABEL_1"}, label2id={"positive": 0, "negative": 1})
    assert torch.equal(logits(load(source)), plain[:, [1, 0]])
    edit(source / "config.json", id2label={"0": "negative", "1": "positive"})
    with pytest.raises(ModelError, match=r"id2label.*label2id.*agree"):
        load(source)
    assert load(source, label_names=("a", "b", "c")).notes == ()  # a new head has no order of its own


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart"])
def test_settings_of_another_task_do_not_count(tmp_path, family):
    source = tmp_path / "m"
    cases.save(source, family, head=True)
    plain = load(source)
    edit(
        source / "config.json",
        problem_type="multi_label_classification",
        return_dict=False,
        torchscript=True,
        gradient_checkpointing=True,
        output_hidden_states=True,
    )
    other = load(source)
    assert torch.equal(logits(other), logits(plain))
    assert other.model.config.problem_type == "single_label_classification"
    inputs = next(iter(batches(encode(["good film"], None, other, max_length=9), other, batch_size=1))).inputs
    output = other.model(**inputs, labels=torch.tensor([1]))
    assert torch.allclose(output.loss, torch.nn.functional.cross_entropy(output.logits, torch.tensor([1])))
    assert not any(getattr(module, "gradient_checkpointing", False) for module in other.model.modules())


# --- adapters


@pytest.mark.parametrize("files", [["adapter_config.json"], ["adapter_config.json", "config.json", "tokenizer.json"]])
def test_a_saved_adapter_is_no_model_and_names_its_base(tmp_path, files):
    base = cases.save(tmp_path / "base", head=True)
    placed = get_peft_model(tf.AutoModelForSequenceClassification.from_pretrained(base), cases.lora("bert"))
    placed.save_pretrained(tmp_path / "adapter")
    for name in files[1:]:
        shutil.copy(tmp_path / "base" / name, tmp_path / "adapter" / name)
    for act in (load, read_skeleton, model_files):
        with pytest.raises(ModelError, match=r"saved adapter.*/base'.*--adapter-config") as caught:
            act(str(tmp_path / "adapter"))
        assert "base_layer" not in str(caught.value)
    for content in (b"", b"[]", b"{}", b'{"base_model_name_or_path": 3}', b"\xff"):
        (tmp_path / "adapter" / "adapter_config.json").write_bytes(content)
        with pytest.raises(ModelError, match=r"saved adapter.*its base model"):
            load(tmp_path / "adapter")


def test_a_folder_above_the_model_is_pointed_down(tmp_path):
    cases.save(tmp_path / "run" / "adapter")
    with pytest.raises(ModelError, match=r"holds no config\.json: give '.*adapter'"):
        load(tmp_path / "run")


# --- remote code


CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
import transformers
class Own(transformers.{base}):
    model_type = "own"
"""


def with_code(folder, where, marker):
    """A model folder whose configuration, or tokenizer, is a class of its own module."""
    cases.save(folder)
    if where == "tokenizer":
        edit(
            folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}
        )
    else:
        kinds = ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification")
        edit(folder / "config.json", model_type="own", auto_map=dict.fromkeys(kinds, "own.Own"))
    base = "PreTrainedTokenizerFast" if where == "tokenizer" else "BertConfig"
    (folder / "own.py").write_text(CODE.format(marker=str(marker), base=base), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("where", ["config", "tokenizer"])
@pytest.mark.parametrize("command", ["score", "rank", "tune", "study", "paper"])
def test_no_command_runs_code_of_a_model_or_asks(tmp_path, monkeypatch, capsys, command, where):
    if (command, where) == ("paper", "tokenizer"):
        pytest.skip("the tiny model has too few layers for the paper: no tokenizer is read")
    marker = tmp_path / "marker"
    model, data = with_code(tmp_path / "m", where, marker), cases.write_reviews(tmp_path / "d")
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 100))
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    tokens = [command, "--model", model, "--dataset", data, "--output", str(tmp_path / "out")]
    tokens += ["--epochs", "1"] if command in ("rank", "tune") else ["--draws", "1", "--target-modules", "query"]
    tokens += ["--target-modules", "query"] if command == "tune" else []
    tokens += [] if command == "tune" else ["--samples", "8", "--eval-samples", "4"]
    if command == "study":
        few = {"samples": 8, "eval_samples": 4, "draws": 1}
        grid = {"models": [model], "datasets": [data], "placements": [{"target_modules": ["query"]}]}
        grid |= {"score": few, "train": {"epochs": 1}}
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid), encoding="utf-8")
        tokens = ["study", str(tmp_path / "grid.yaml"), "--output", str(tmp_path / "out")]
    elif command == "paper":
        for name in ("cola", "sst2", "imdb", "yelp"):
            cases.write_reviews(tmp_path / "data" / name)
        tokens = ["paper", "table1", "--model", model, "--data-dir", str(tmp_path / "data")]
        tokens += ["--output", str(tmp_path / "out")]
    code = run(tokens)
    printed = capsys.readouterr()
    assert not marker.exists()
    assert "[y/N]" not in printed.out + printed.err
    if where == "config":  # for a tokenizer transformers has its own class of the model's type, and takes that
        assert code == 2
        assert "trust-remote-code" in printed.err
        assert "Traceback" not in printed.err


def test_trusted_code_runs(tmp_path):
    marker = tmp_path / "marker"
    model = with_code(tmp_path / "m", "tokenizer", marker)
    load(model, trust_remote_code=True)
    assert marker.exists()


def test_a_kernel_from_the_hub_is_code(tmp_path):
    cases.save(tmp_path / "m")
    edit(tmp_path / "m" / "config.json", attn_implementation="kernels-community/flash-attn")
    with pytest.raises(ModelError, match="attention kernel"):
        load(tmp_path / "m")


def test_nothing_else_loads():
    source = Path(sys.modules["foretune"].__file__).parent
    for path in source.rglob("*.py"):
        calls = [
            node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
        ]
        names = {call.attr for call in calls if isinstance(call, ast.Attribute)}
        assert path.name == "loading.py" or not names & {"from_pretrained", "from_config", "snapshot_download"}, path


# --- broken and odd folders


WEIGHTS = {
    "empty": lambda whole: b"",
    "pointer": lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 9\n",
    "cut in the header": lambda whole: whole[:100],
    "cut at the end": lambda whole: whole[:-10],
    "longer": lambda whole: whole + b"\0" * 9,
    "no header": lambda whole: b"\0" * 8 + whole[8:],
    "huge header": lambda whole: b"\xff" * 8 + whole[8:],
    "no json": lambda whole: whole[:8] + b"{" * 50 + whole[58:],
    "noise": lambda whole: random.Random(0).randbytes(4000),
    "html": lambda whole: b"<!DOCTYPE html><html>not found</html>",
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return Path(cases.save(tmp_path_factory.mktemp("sound") / "m"))


@pytest.fixture
def copied(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "m"))


@pytest.mark.parametrize("fault", WEIGHTS)
def test_broken_safetensors(copied, fault):
    path = copied / "model.safetensors"
    path.write_bytes(WEIGHTS[fault](path.read_bytes()))
    with pytest.raises(ModelError, match=r"safetensors.*(git lfs pull)") as caught:
        load(copied)
    assert len(str(caught.value)) <= 400


@pytest.mark.parametrize("fault", ["no weights", "pickled", "folder", "index"])
def test_weights_that_are_not_there(copied, fault):
    weights = copied / "model.safetensors"
    if fault == "pickled":
        torch.save(load_file(weights), copied / "pytorch_model.bin")
    weights.unlink()
    if fault == "folder":
        weights.mkdir()
    if fault == "index":
        index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
        (copied / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    words = {"pickled": r"'pytorch_model\.bin'.*only safetensors.*save_pretrained", "folder": "no file"}
    with pytest.raises(ModelError, match=words.get(fault, "safetensors")):
        load(copied)


def refusal(act):
    """What is said, or None where it works; anything but an error of ours goes through."""
    try:
        act()
    except ForetuneError as error:
        return str(error)
    return None


def is_one_line(said):
    return said is None or ("\n" not in said and len(said) <= 450)


JSONS = [b"", b"{", b"[]", b"null", b"3", b'"x"', b"\xff\xfe\x00", b"[" * 50_000, b"{}", b'{"model_type": null}']


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", JSONS, ids=lambda content: repr(content[:12]))
def test_files_of_other_content_are_one_line(copied, name, content):
    (copied / name).write_bytes(content)
    said = refusal(lambda: load(copied))
    assert is_one_line(said)
    # transformers has defaults for a mapping without entries
    assert said is not None or (name == "tokenizer_config.json" and b"{" in content)


VALUES = ["x", -3, 0, None, [], {}, 2.5, True, "some/repo", 1e30, 10**12, ["a"], {"a": 1}]
FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size", "pad_token_id"),
    *("max_position_embeddings", "model_type", "architectures", "id2label", "label2id", "num_labels", "problem_type"),
    *("hidden_act", "dtype", "layer_norm_eps", "hidden_dropout_prob", "initializer_range", "torchscript", "auto_map"),
    *("return_dict", "quantization_config", "tie_word_embeddings", "attn_implementation", "is_decoder", "pruned_heads"),
    *("output_attentions", "chunk_size_feed_forward", "gradient_checkpointing"),
)
TOKENIZER_FIELDS = (
    *("tokenizer_class", "model_max_length", "pad_token", "unk_token", "auto_map", "padding_side", "backend"),
    *("model_input_names", "added_tokens_decoder", "extra_special_tokens", "truncation_side", "chat_template"),
)


@pytest.mark.parametrize(
    ("file", "name"),
    [*(("config.json", name) for name in FIELDS), *(("tokenizer_config.json", name) for name in TOKENIZER_FIELDS)],
)
def test_settings_of_other_types_work_or_are_one_line(copied, file, name):
    whole = (copied / file).read_bytes()
    for value in VALUES:
        edit(copied / file, **{name: value})
        said = refusal(lambda: encode(["good film", "bad"], None, load(copied), max_length=16))
        assert is_one_line(said), (value, said)
        (copied / file).write_bytes(whole)


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes_work_or_are_one_line(copied, seed):
    generator = random.Random(seed)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        whole = (copied / name).read_bytes()
        for _ in range(8):
            damaged = bytearray(whole)
            for _ in range(generator.choice([1, 20])):
                damaged[generator.randrange(min(len(whole), 3000))] = generator.randrange(256)
            (copied / name).write_bytes(bytes(damaged))
            said = refusal(lambda: load(copied))
            assert is_one_line(said), (name, said)
        (copied / name).write_bytes(whole)


@pytest.mark.parametrize("number", [0, 2])
def test_a_tokenizer_that_panics_is_one_line(copied, number):
    path = copied / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["post_processor"]["single"][number]["SpecialToken"]["id"] = "x"  # a panic in Rust is no Exception
    path.write_text(json.dumps(content), encoding="utf-8")
    assert is_one_line(refusal(lambda: encode(["good film"], None, load(copied), max_length=8)))


def test_places_that_are_no_folder(tmp_path, sound):
    (tmp_path / "empty").mkdir()
    for source, words in {
        str(sound / "config.json"): "is a file",
        str(tmp_path / "empty"): r"holds no config\.json",
        "": "does not exist",
        "~nobody-of-this-name/model": "nobody-of-this-name|does not exist",
        "/x" * 5000: "File name too long|does not exist",
        "a\0b": "load|look|exist",
        "no good/id at all": "load|exist",
    }.items():
        with pytest.raises(ModelError, match=words) as caught:
            load(source)
        assert len(str(caught.value)) <= 500
        with pytest.raises(ModelError):
            model_files(source)
    assert locate(str(sound)) == str(sound)


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator reads everything")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "."])
def test_what_may_not_be_read(copied, name):
    (copied / name).chmod(0)
    try:
        with pytest.raises(ModelError):
            load(copied)
    finally:
        (copied / name).chmod(0o755)


# --- seeds


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_the_head_of_a_seed_is_the_same_and_the_generators_stay_as_they_were(tmp_path, family):
    source = cases.save(tmp_path / "m", family)
    tf.set_seed(7)
    expected = tf.AutoModelForSequenceClassification.from_pretrained(source, num_labels=2).state_dict()
    for set_all in (random.seed, np.random.seed, torch.manual_seed):
        set_all(3)
    before = random.random(), np.random.random(), torch.rand(1)
    for set_all in (random.seed, np.random.seed, torch.manual_seed):
        set_all(3)
    found = load(source, seed=7).model.state_dict()
    assert (random.random(), np.random.random(), torch.rand(1)) == before
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_parts_are_on_the_processor_and_unchanged(sound):
    parts = load_parts(str(sound), Classification(NAMES), seed=0, form=Form(torch.float32, torch.device("cpu")))
    assert parts.new == ("classifier",)
    assert next(parts.model.parameters()).device.type == "cpu"
