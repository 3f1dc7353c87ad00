"""`adapter_config.json` of any method, from the file to the run."""

import json

import pytest
from peft import AdaLoraConfig, IA3Config, LNTuningConfig, LoraConfig, PromptTuningConfig, VeraConfig

import methods
from foretune.cli import run
from foretune.errors import ConfigError
from foretune.models.adapted import describe_placement
from foretune.models.adapter_file import adapter_from_file, adapter_in_words, same_adapter, save_adapter
from foretune.models.placement import place, read_adapters

import cases


@pytest.mark.parametrize("method", methods.METHODS)
def test_a_file_says_what_the_configuration_says(method, tmp_path):
    config = methods.METHODS[method].config("bert")
    save_adapter(config, tmp_path / "adapter_config.json")
    again = adapter_from_file(tmp_path)
    assert type(again) is type(config)
    assert same_adapter(again, adapter_from_file(tmp_path / "adapter_config.json"))
    other = methods.METHODS["BEFT" if method != "BEFT" else "LoRA"].config("bert")
    assert not same_adapter(again, other)
    save_adapter(again, tmp_path / "again.json")
    assert same_adapter(adapter_from_file(tmp_path / "again.json"), again)
    one, same = (place(cases.tiny("bert"), each, seed=0) for each in (config, again))
    names = [[name for name, p in model.named_parameters() if p.requires_grad] for model in (one, same)]
    assert names[0] == names[1]


def test_sets_are_written_in_one_order(tmp_path):
    for number, modules in enumerate((["key", "value", "output.dense"], ["output.dense", "value", "key"])):
        config = IA3Config(target_modules=modules, feedforward_modules=modules[:1] and ["output.dense"])
        save_adapter(config, tmp_path / f"{number}.json")
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes()


def test_what_a_run_of_adalora_has_kept_is_left_out(tmp_path):
    config = AdaLoraConfig(target_modules=["query"], total_step=9, rank_pattern={"x.lora_E": [True, False]})
    save_adapter(config, tmp_path / "adapter_config.json")
    assert adapter_from_file(tmp_path).rank_pattern is None


WORDS = [
    (LoraConfig(target_modules=["query"], use_dora=True), "DoRA, query of all layers, r = 8, α = 8, init default"),
    (LoraConfig(target_modules=["query"], bias="all"), "query of all layers, r = 8, α = 8, init default, biases all"),
    (IA3Config(target_modules=["value", "key"], feedforward_modules=[]), "(IA)³, key, value of all layers"),
    (LNTuningConfig(target_modules="x.*"), "LN tuning, modules by a pattern"),
    (LNTuningConfig(), "LN tuning, peft's default modules of all layers"),
    (VeraConfig(target_modules=["query"], layers_to_transform=[1]), "VeRA, query of layers 1, r = 256"),
    (
        AdaLoraConfig(target_modules=["query"], total_step=9, lora_alpha=4),
        "AdaLoRA, query of all layers, r = 12, target r = 8, α = 4",
    ),
    (PromptTuningConfig(num_virtual_tokens=7), "prompt tuning, virtual tokens = 7"),
]


@pytest.mark.parametrize(("config", "words"), WORDS)
def test_in_words(config, words):
    assert adapter_in_words(config) == words


def test_a_result_says_the_method():
    def described(method):
        placed = methods.placed(method, "bert")
        return describe_placement(placed.active_peft_config, read_adapters(placed).sites)

    of_ia3, of_dora = described("(IA)³"), described("DoRA")
    assert (of_ia3["method"], of_ia3["r"], of_ia3["alpha"], of_ia3["init"]) == ("(IA)³", None, None, None)
    assert of_ia3["layers"] == [0, 1]
    assert of_ia3["target_modules"] == ["output.dense", "query", "value"]
    assert (of_dora["method"], of_dora["r"], of_dora["rslora"]) == ("DoRA", 3, False)
    assert described("AdaLoRA")["r"] == 3


def write(folder, **content):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


REFUSED = [
    ({"peft_type": "IA3", "task_type": "CAUSAL_LM"}, "task_type 'CAUSAL_LM': only 'SEQ_CLS'"),
    ({"peft_type": "IA3", "r": 4}, "r=4, which this peft does not know"),
    ({"peft_type": "IA3", "target_modules": 3}, "target_modules=3: must be"),
    ({"peft_type": "IA3", "init_ia3_weights": "yes"}, "init_ia3_weights='yes': must be bool"),
    ({"peft_type": "IA3", "target_modules": ["key"], "feedforward_modules": ["dense"]}, "refused by peft"),
    ({"peft_type": "VERA", "r": 0}, "r=0: must be a number above 0"),
    ({"peft_type": "VERA", "d_initial": True}, "d_initial=True: must be float"),
    ({"peft_type": "LN_TUNING", "modules_to_save": ["embeddings"]}, "only the classifier's head"),
    ({"peft_type": "ADALORA", "target_modules": ["query"]}, "refused by peft.*total_step"),
    ({"peft_type": ["IA3"]}, r"peft_type \['IA3'\]: this peft knows"),
    ({"peft_type": "BOFT", "bias": 3}, "bias=3: must be str"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED)
def test_bad_files_are_named(tmp_path, content, message):
    path = write(tmp_path, **content)
    with pytest.raises(ConfigError, match=message) as error:
        adapter_from_file(path)
    assert repr(str(path)) in str(error.value)
    assert "\n" not in str(error.value)


# --adapter-config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return cases.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return cases.write_reviews(tmp_path_factory.mktemp("reviews"))


def adapter_file(folder, method):
    save_adapter(methods.METHODS[method].config("bert"), folder / "adapter_config.json")
    return folder


def result_of(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", ["(IA)³", "LN tuning", "DoRA", "LoRA with all biases", "VeRA", "AdaLoRA"])
def test_score_and_tune(model, dataset, tmp_path, method, capsys):
    given = ["--model", model, "--dataset", dataset, "--adapter-config", str(adapter_file(tmp_path, method))]
    assert run(["score", *given, "--samples", "8", "--eval-samples", "8", "--output", str(tmp_path / "score")]) == 0
    scored = result_of(tmp_path / "score")
    assert scored["placement"]["trainable_parameters"] > 0
    assert scored["kernel"]["trace"] > 0
    assert scored["details"]["expected_bytes"]["features"] > 0
    tokens = ["--epochs", "2", "--learning-rate", "2e-2", "--train-batch-size", "8"]
    assert run(["tune", *given, *tokens, "--output", str(tmp_path / "tune")]) == 0
    tuned = result_of(tmp_path / "tune")
    assert tuned["placement"]["trainable_parameters"] == scored["placement"]["trainable_parameters"]
    assert tuned["placement"]["method"] == scored["placement"]["method"]
    trained = adapter_from_file(tmp_path / "tune" / "adapter")
    assert type(trained) is type(methods.METHODS[method].config("bert"))
    capsys.readouterr()
    assert run(["forecast", *given, "--samples", "8", "--eval-samples", "8"]) == 2
    assert "forecasts simulate plain LoRA: module" in " ".join(capsys.readouterr().err.split())


def test_the_kernel_of_the_command_is_that_of_the_library(model, dataset, tmp_path):
    import foretune as ft

    adapter_file(tmp_path, "(IA)³")
    given = ["--model", model, "--dataset", dataset, "--adapter-config", str(tmp_path)]
    assert run(["score", *given, "--samples", "8", "--eval-samples", "8", "--output", str(tmp_path / "score")]) == 0
    task = ft.load_task(ft.DataConfig(dataset))
    classifier = ft.load_classifier(model, label_names=task.label_names, seed=0)
    settings = ft.ScoreSettings(samples=8, eval_samples=8)
    config = methods.METHODS["(IA)³"].config("bert")
    found = ft.score(classifier.model, classifier.tokenizer, config, task, settings=settings)
    assert json.loads(json.dumps(found.to_dict()["kernel"])) == result_of(tmp_path / "score")["kernel"]
