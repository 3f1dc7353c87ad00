"""Encoder-decoders through the command line: run folders, replays, adapters for peft, refusals."""

import json
import warnings

import peft
import pytest
import transformers as tf

import language
import pairs
from foretune.cli import run

FLAGS = ["--epochs", "2", "--learning-rate", "5e-3", "--train-batch-size", "4", "--max-length", "24"]
FEW = ["--samples", "8", "--eval-samples", "4"]


def write(folder, make=pairs.rows, n_train=16, n_eval=5):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", make(n_train)), ("validation", make(n_eval, 100))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pairs.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def common(model, tmp_path_factory):
    return ["--model", model, "--dataset", write(tmp_path_factory.mktemp("data")), *FLAGS]


def result_of(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def error_of(capsys):
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line]
    assert lines[0].startswith("error:") or lines[-1].startswith("error:")
    return " ".join(" ".join(lines).split())


def test_a_forecast_and_its_run(common, model, tmp_path, capsys):
    forecast, tuned = tmp_path / "forecast", tmp_path / "tuned"
    known = ["--samples", "16", "--eval-samples", "4"]
    assert run(["forecast", *common, *known, "--lora-r", "4", "--output", str(forecast)]) == 0
    said = capsys.readouterr()
    assert "no run of this model" in " ".join(said.out.split())
    assert "prompt, completion (prompt-completion); loss on: completion" in said.err
    assert (
        run(["tune", "--config", str(forecast / "config.yaml"), "--forecast", str(forecast), "--output", str(tuned)])
        == 0
    )
    said, real = result_of(forecast), result_of(tuned)
    data = real["details"]["data"]
    assert (data["task"], data["train_rows"], data["eval_rows"]) == ("seq2seq", 16, 4)
    assert said["details"]["objective"]["kind"] == said["details"]["data"]["task"] == "seq2seq"
    before = real["before_training"]
    for name in ("eval_loss", "eval_perplexity", "eval_token_accuracy"):
        assert said["base"][name] == pytest.approx(before[name], rel=1e-5)
    change = real["final"]["eval_loss"] - before["eval_loss"]
    assert change < 0
    assert said["simulated_end"]["eval_loss"] == pytest.approx(real["final"]["eval_loss"], abs=0.5 * abs(change))
    assert said["sketches"]["kept_least"] == pytest.approx(1.0, abs=1e-3)
    config = json.loads((tuned / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = tf.AutoModelForSeq2SeqLM.from_pretrained(model)
        held = peft.PeftModel.from_pretrained(base, str(tuned / "adapter"))
    assert isinstance(held, peft.PeftModelForSeq2SeqLM)
    assert {name for name, _ in held.named_parameters() if "lora_B" in name}
    assert said["simulated_end"]["eval_loss"] < said["base"]["eval_loss"]


def test_a_ranking_and_the_forecast_of_its_first_row(common, tmp_path):
    out, forecast = tmp_path / "ranking", tmp_path / "forecast"
    assert run(["rank", *common, *FEW, "--finalists", "4", "--ranks", "2", "4", "--output", str(out)]) == 0
    (held,) = result_of(out)["rankings"]
    assert held["objective"]["kind"] == "seq2seq"
    assert any("no run of this model" in note for note in held["notes"])
    (row,) = [row for row in held["rows"] if row["recommended"]]
    assert run(["forecast", "--config", str(out / "chosen.yaml"), "--output", str(forecast)]) == 0
    said = result_of(forecast)
    assert said["placement"]["modules"] == row["modules"]
    assert said["simulated_end"]["eval_loss"] == pytest.approx(row["simulated"]["eval_loss"], abs=1e-4)
    assert peft.LoraConfig.from_pretrained(str(out)).task_type == "SEQ_2_SEQ_LM"


@pytest.mark.parametrize("kernel", ["loss", "fisher"])
def test_a_score(common, tmp_path, kernel):
    at = common.index("--epochs")
    tokens = ["score", *common[:at], "--max-length", "24", "--samples", "6", "--reduction", kernel]
    assert run([*tokens, "--output", str(tmp_path / "scored")]) == 0
    found = result_of(tmp_path / "scored")
    assert found["details"]["objective"]["kind"] == "seq2seq"
    assert found["kernel"]["lambda_max"] > 0
    assert found["base"]["train_loss"] > 0


def test_instructions_and_named_columns_are_found(model, tmp_path):
    def instructed(n, start=0):
        return [{"instruction": row["prompt"], "output": row["completion"]} for row in pairs.rows(n, start)]

    def named(n, start=0):
        return [{"english": row["prompt"], "german": row["completion"]} for row in pairs.rows(n, start)]

    ends = []
    for make, more in ((instructed, []), (named, ["--text-column", "english", "german"]), (pairs.rows, [])):
        out = tmp_path / f"out{len(ends)}"
        data = write(tmp_path / f"data{len(ends)}", make)
        tokens = ["tune", "--model", model, "--dataset", data, *FLAGS, *more, "--task", "seq2seq"]
        assert run([*(tokens if len(ends) == 2 else tokens[:-2]), "--output", str(out)]) == 0
        ends.append(result_of(out)["final"]["eval_loss"])
    assert ends[0] == ends[1] == ends[2]


def test_long_rows_are_cut_and_counted(model, tmp_path):
    tokens = ["tune", "--model", model, "--dataset", write(tmp_path / "data"), "--epochs", "1", "--max-length", "10"]
    assert run([*tokens, "--output", str(tmp_path / "out")]) == 0
    data = result_of(tmp_path / "out")["details"]["data"]
    assert data["max_length"] == 10
    assert 0 < data["truncated_rows"] <= 21
    assert data["emptied_rows"] == 0


def messages(n, start=0):
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in pairs.rows(n, start)
    ]


def texts(n, start=0):
    return [{"text": row["prompt"] + row["completion"]} for row in pairs.rows(n, start)]


def blank(n, start=0):
    return [{**row, "completion": " "} for row in pairs.rows(n, start)]


REMEDY = "a sequence-to-sequence model reads a prompt and writes a completion: give the columns prompt and completion"


@pytest.mark.parametrize(
    ("make", "more", "said"),
    [
        (texts, [], f"row 0 is a text, and {REMEDY}"),
        (messages, [], f"row 0 is a conversation, and {REMEDY}"),
        (blank, [], "split 'train' has no rows but 16 empty ones"),
        (pairs.rows, ["--task", "causal-lm"], "task = 'causal-lm', but model"),
        (pairs.rows, ["--loss-on", "all"], "of a sequence-to-sequence model the completion carries loss, leave it out"),
        (pairs.rows, ["--target-modules", "lm_head"], "target module 'lm_head' matches nothing"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(model, tmp_path, capsys, make, more, said):
    tokens = ["forecast", "--model", model, "--dataset", write(tmp_path / "data", make), *FLAGS, *more]
    assert run([*tokens, "--output", str(tmp_path / "out")]) == 2
    assert said in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_an_encoder_decoder_without_output_layer_is_refused(tmp_path, capsys):
    tf.BartModel(pairs.build("bart", tie_word_embeddings=False).config).save_pretrained(tmp_path / "bart")
    pairs.tokenizer_of("bart").save_pretrained(tmp_path / "bart")
    tokens = ["tune", "--model", str(tmp_path / "bart"), "--dataset", write(tmp_path / "data")]
    assert run([*tokens, "--output", str(tmp_path / "out")]) == 2
    assert "does not give the layer of the next token's logits (lm_head.weight)" in error_of(capsys)


def test_a_causal_model_for_pairs_is_refused(tmp_path, capsys):
    model = language.save_chat(tmp_path / "llama")
    tokens = ["tune", "--model", model, "--dataset", write(tmp_path / "data"), "--task", "seq2seq"]
    assert run([*tokens, "--output", str(tmp_path / "out")]) == 2
    assert "task = 'seq2seq', but model" in error_of(capsys)


def test_the_file_of_another_adapter_is_refused(model, tmp_path, capsys):
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2}))
    tokens = ["tune", "--model", model, "--dataset", write(tmp_path / "data"), "--adapter-config", str(file)]
    assert run(tokens) == 2
    assert "task_type 'CAUSAL_LM': only 'SEQ_2_SEQ_LM' is supported" in error_of(capsys)


def test_a_spend_buys_a_trial_of_an_encoder_decoder(model, tmp_path, capsys):
    data = write(tmp_path / "data", n_train=80)
    tokens = ["forecast", "--model", model, "--dataset", data, *FLAGS, *FEW, "--lora-r", "2", "--spend", "60%"]
    assert run([*tokens, "--output", str(tmp_path / "out")]) == 0
    (trial,) = result_of(tmp_path / "out")["trials"]
    assert 32 <= trial["rows"] <= 40
    assert trial["outcomes"]["eval_loss"] < result_of(tmp_path / "out")["base"]["eval_loss"]
    assert "to make" in capsys.readouterr().err
