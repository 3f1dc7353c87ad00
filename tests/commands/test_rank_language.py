"""`foretune rank` of causal language models: files, replays, adapters for TRL, refusals."""

import csv
import json

import datasets
import pytest
import transformers as tf
import trl
import yaml
from peft import LoraConfig

import language
from chats import CHATML, make_tokenizer
from foretune.cli import run

FLAGS = ["--epochs", "2", "--learning-rate", "5e-3", "--train-batch-size", "4", "--max-length", "48", "--samples", "8"]
FEW = ["--finalists", "4", "--ranks", "2", "4", "--eval-samples", "4"]


def row(number):
    asked, answer = f"what is the colour {'of it ' * (number % 3)}?", ("it is blue", "the plot was thin")[number % 2]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def write(folder, n_train=16):
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in (("train", range(n_train)), ("validation", range(100, 105))):
        lines = [json.dumps(row(number)) for number in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return language.save_chat(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def common(model, tmp_path_factory):
    return ["--model", model, "--dataset", write(tmp_path_factory.mktemp("data"))]


@pytest.fixture(scope="module")
def ranked(common, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranking") / "out"
    assert run(["rank", *common, *FLAGS, *FEW, "--output", str(out)]) == 0
    return out


def result_of(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def recommended(folder):
    (held,) = result_of(folder)["rankings"]
    (row,) = [row for row in held["rows"] if row["recommended"]]
    return row


def test_the_folder_holds_what_a_ranking_holds(ranked):
    assert {path.name for path in ranked.iterdir()} == {
        *("ranking.csv", "ranking.md", "ranking.tex", "candidates.csv", "result.json", "config.yaml"),
        *("adapter_config.json", "chosen.yaml"),
    }
    (held,) = result_of(ranked)["rankings"]
    with (ranked / "ranking.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["adapter"] for line in lines] == [row["adapter"] for row in held["rows"]]
    assert [float(line["eval_loss"]) for line in lines] == pytest.approx(
        [row["eval_loss"] for row in held["rows"]], rel=1e-5
    )
    assert [float(line["simulated_eval_loss"]) for line in lines] == pytest.approx(
        [row["simulated"]["eval_loss"] for row in held["rows"]], rel=1e-5
    )
    assert {line["eval_loss_low"] for line in lines} == {""}
    with (ranked / "candidates.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == held["candidates"]
    config = json.loads((ranked / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["task_type"], config["r"]) == ("CAUSAL_LM", recommended(ranked)["rank"])


def test_forecast_and_tune_replay_the_chosen_row(ranked, tmp_path, capsys):
    forecast, tuned = tmp_path / "forecast", tmp_path / "tuned"
    chosen = ["--config", str(ranked / "chosen.yaml")]
    assert run(["forecast", *chosen, "--output", str(forecast)]) == 0
    assert run(["tune", *chosen, "--forecast", str(forecast), "--output", str(tuned)]) == 0
    said, real, row = result_of(forecast), result_of(tuned), recommended(ranked)
    assert said["placement"]["modules"] == row["modules"]
    assert said["simulated_end"]["eval_loss"] == pytest.approx(row["simulated"]["eval_loss"], abs=1e-5)
    assert said["steps"] == row["steps"] == real["steps"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # trl 1.16 on 5.23
def test_trl_trains_the_adapter_on_the_same_file(ranked, common, tmp_path):
    adapter = LoraConfig.from_pretrained(str(ranked))
    train = datasets.Dataset.from_list([row(number) for number in range(16)])
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=2,
        per_device_train_batch_size=4,
        max_length=48,
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = trl.SFTTrainer(
        model=tf.AutoModelForCausalLM.from_pretrained(common[1]),
        args=arguments,
        train_dataset=train,
        processing_class=make_tokenizer(CHATML),
        peft_config=adapter,
    )
    trainer.train()
    assert trainer.state.global_step == 2
    trained = {name for name, value in trainer.model.named_parameters() if value.requires_grad and "lora_B" in name}
    names = {name.removeprefix("base_model.model.").split(".lora_B")[0] for name in trained}
    assert names == set(recommended(ranked)["modules"])


def test_json_replay_and_another_row(ranked, tmp_path, capsys):
    again = tmp_path / "again"
    tokens = ["rank", "--config", str(ranked / "config.yaml"), "--choose", "3", "--json", "--output", str(again)]
    assert run(tokens) == 0
    printed, before = json.loads(capsys.readouterr().out), result_of(ranked)
    assert printed["rankings"][0]["rows"] == before["rankings"][0]["rows"] == result_of(again)["rankings"][0]["rows"]
    assert printed["chosen"]["place"] == 3
    wanted = before["rankings"][0]["rows"][2]
    assert json.loads((again / "adapter_config.json").read_text(encoding="utf-8"))["r"] == wanted["rank"]
    assert yaml.safe_load((again / "chosen.yaml").read_text(encoding="utf-8"))["epochs"] == 2


def test_the_table_says_that_it_is_not_calibrated(common, capsys):
    flags = ["--epochs", "1", "2", "--finalists", "2", "--budget", "300", "--samples", "8", "--max-length", "48"]
    assert run(["rank", *common, *flags]) == 0
    said = capsys.readouterr()
    words = " ".join(said.out.split())
    assert "Not calibrated for such runs: no level is forecast." in words
    assert "no level is forecast" in words
    assert "learning rate" in words
    assert "without training:" in words
    assert "(messages); loss on: all" in said.err
    assert "nothing saved" in said.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--spend", "2%"], "spend = 2%: the smallest trial takes 32 rows, and a run of 16 rows has trials of 8"),
        (
            ["--calibration", "there"],
            "--calibration 'there': language models are ranked by the one that comes with foretune, leave it out",
        ),
        (["--budget", "3"], "fits no candidate: the smallest"),
        (["--exclude-modules", "nothing"], "excluded module 'nothing' matches nothing"),
        (["--memory", "much"], "memory = 'much': give an amount of memory, such as 2GB or 500MB"),
        (["--memory", "1kB"], "raise the memory, or lower the samples"),
    ],
)
def test_what_does_not_fit_is_refused(common, tmp_path, capsys, more, said):
    assert run(["rank", *common, *FLAGS, *more, "--output", str(tmp_path / "out")]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_spend_buys_trials_and_they_are_kept(model, tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    tokens = ["rank", "--model", model, "--dataset", write(tmp_path / "data", n_train=80), *FLAGS, *FEW]
    assert run([*tokens, "--spend", "100%", "--output", str(out)]) == 0
    said = capsys.readouterr()
    assert "to make" in said.err
    assert "of 100% asked for" in " ".join(said.out.split())
    (held,) = result_of(out)["rankings"]
    tried = [row for row in held["rows"] if row["trials"]]
    assert len(tried) == 1  # two of the smallest cost 84% of a run, and the largest of the best comes first
    assert held["spend"] == pytest.approx(held["trial_passes"] / 160)
    assert held["compared_rows"] is None
    with (out / "ranking.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["trial_eval_loss"]) for line in lines if line["trial_eval_loss"]] == pytest.approx(
        [row["trials"][-1]["outcomes"]["eval_loss"] for row in tried], rel=1e-5
    )
    assert run(["rank", "--config", str(out / "config.yaml"), "--output", str(again)]) == 0
    assert "to make" not in capsys.readouterr().err
    assert result_of(again)["rankings"][0]["rows"] == held["rows"]


@pytest.mark.parametrize("flag", ["--model", "--dataset"])
def test_several_at_once_are_refused(common, tmp_path, capsys, flag):
    place = common.index(flag) + 1
    tokens = [*common[: place + 1], common[place], *common[place + 1 :]]
    assert run(["rank", *tokens, *FLAGS, "--output", str(tmp_path / "out")]) == 2
    assert "takes language models one at a time yet: name one --model and one --dataset" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_language_model_behind_a_classifier_is_refused(common, tmp_path, capsys):
    labelled = tmp_path / "labelled.csv"
    labelled.write_text("text,label\n" + "".join(f"a text {n},{n % 2}\n" for n in range(40)), encoding="utf-8")
    tokens = ["rank", "--model", common[1], "--dataset", str(labelled), common[3], "--finalists", "2", *FLAGS]
    assert run([*tokens, "--eval-samples", "4"]) == 2
    assert "takes language models one at a time yet" in " ".join(capsys.readouterr().err.split())


def test_a_row_that_the_table_lacks_is_told_after_everything_is_saved(common, tmp_path, capsys):
    out = tmp_path / "out"
    flags = [*FLAGS, "--finalists", "200", "--target-modules", "q_proj", "--choose", "150", "--output", str(out)]
    assert run(["rank", *common, *flags]) == 2
    assert "choose = 150: the table has" in " ".join(capsys.readouterr().err.split())
    assert (out / "result.json").exists()
    assert not (out / "chosen.yaml").exists()


def test_methods_and_the_run_of_one(common, tmp_path, capsys):
    out, tuned = tmp_path / "out", tmp_path / "tuned"
    few = ["--finalists", "2", "--ranks", "2", "--eval-samples", "4", "--methods", "lora", "ia3", "prompt"]
    short = [*FLAGS[:-3], "28", "--samples", "8"]  # the model has few positions, of which virtual tokens take 20
    assert run(["rank", *common, *short, *few, "--choose", "6", "--output", str(out)]) == 0
    said = capsys.readouterr()
    assert "ia3, prompt: no run is simulated and nothing forecast" in said.out
    (held,) = result_of(out)["rankings"]
    rows = held["rows"]
    assert [row["method"] for row in rows[:2]] == ["lora", "lora"]
    assert {row["method"] for row in rows[2:]} == {"ia3", "prompt"}
    assert rows[5]["eval_loss"] is None
    wanted = {"ia3": "IA3", "prompt": "PROMPT_TUNING"}[rows[5]["method"]]
    assert json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"] == wanted
    assert run(["tune", "--config", str(out / "chosen.yaml"), "--output", str(tuned)]) == 0
    assert (
        result_of(tuned)["details"]["placement"]["method"]
        == {
            "IA3": "(IA)³",
            "PROMPT_TUNING": "prompt tuning",
        }[wanted]
    )
