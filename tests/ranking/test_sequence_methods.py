"""Adapter methods beside LoRA in rankings of language models: their scores by loops, rows, order and files."""

import csv
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from peft import PeftConfig

import foretune as ft
import language_methods as methods
import pairs
from foretune.errors import ConfigError, PlacementError
from foretune.models.placement import place
from foretune.ranking.methods import METHODS
from foretune.ranking.report import RankRun
from foretune.ranking.sequence_methods import by_trials
from foretune.ranking.sequence_report import save_sequence_ranking, sequence_content
from foretune.ranking.sequence_rows import comparison_of, in_order
from foretune.ranking.sequence_table import sequence_numbers, sequence_table
from foretune.ranking.sequences import n_ranked, prepare_ranking, rank_sequences
from foretune.settings.commands import RankSettings
from foretune.settings.groups import DataConfig, ModelConfig

import sequences as made

SETTINGS = RankSettings(samples=8, eval_samples=4, max_length=16, batch_size=3, ranks=(2,), finalists=3, epochs=2,
                        learning_rate=5e-3, train_batch_size=4, methods=("lora", "dora", "ia3", "prompt"))  # fmt: skip
RUN = RankRun((ModelConfig("tiny"),), (DataConfig("made"),), SETTINGS)


@pytest.fixture(scope="module")
def task():
    return ft.language_task_from_datasets(made.texts(16), made.texts(4, offset=1))


@pytest.fixture(scope="module")
def ready(task):
    return prepare_ranking(made.reader(), task, SETTINGS)


@pytest.fixture(scope="module")
def ranking(ready):
    passed = []
    ranking = rank_sequences(ready, SETTINGS, passed.append)
    assert sum(passed) == n_ranked(ready, SETTINGS)
    return ranking


def mean_gradient(placed, features):
    parameters = [p for p in placed.parameters() if p.requires_grad]
    given = [(feature["input_ids"], feature["labels"]) for feature in features]
    sums = methods.gradients(placed, "llama", given, parameters)[:, 0].sum(0)
    return sums / methods.counts("llama", given).sum()


def test_quick_scores_are_those_of_loops(ready, ranking):
    others = [entry for entry in ranking.quick if entry.config is not None]
    assert {entry.method for entry in others} == {"dora", "ia3", "prompt"}
    for entry in others:
        placed = place(ready.plan.language.model, entry.config, seed=0)
        parts = [mean_gradient(placed, tokens.features) for tokens in (ready.plan.known, ready.plan.rows.evaluation)]
        assert entry.parameters == len(parts[0])
        expected = parts[0] @ parts[1] / math.sqrt(len(parts[0]))
        assert entry.score == pytest.approx(expected, rel=1e-3, abs=1e-3 * np.linalg.norm(parts[0]) ** 2)


def test_rows_of_lora_are_what_they_are_alone(task, ranking):
    alone = ft.rank(made.reader().model, made.reader().tokenizer, task,
                    settings=dataclasses.replace(SETTINGS, methods=("lora",)))  # fmt: skip
    with_run = [row for row in ranking.rows if row.found is not None]
    assert [row.quick.name for row in alone.rows] == [row.quick.name for row in with_run]
    assert [row.loss for row in alone.rows] == pytest.approx([row.loss for row in with_run], rel=1e-5)
    assert [row.recommended for row in alone.rows] == [row.recommended for row in with_run]
    assert not any("methods" in note or "no run is simulated" in note for note in alone.notes)


def test_others_stand_last_and_nothing_is_said_of_them(ranking, tmp_path):
    count = sum(row.found is not None for row in ranking.rows)
    assert count == 3
    last = ranking.rows[count:]
    assert {row.quick.method for row in last} == {"dora", "ia3", "prompt"}
    assert all(math.isnan(row.loss) and row.forecast.levels is None and not row.tie for row in last)
    table = sequence_table(ranking)
    column = table.header.index("eval loss")
    assert [row[column] == "" for row in table.rows] == [row.found is None for row in ranking.rows]
    assert "no forecast" in table.caption
    assert any("dora, ia3, prompt: no run is simulated" in note for note in ranking.notes)
    place_of = 1 + next(i for i, row in enumerate(ranking.rows) if row.quick.method == "prompt")
    save_sequence_ranking(ranking, RUN, tmp_path / "out", choose=place_of)
    config = PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert (config.peft_type, config.task_type, config.num_virtual_tokens) == ("PROMPT_TUNING", "CAUSAL_LM", 20)
    content = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    row = content["rankings"][0]["rows"][place_of - 1]
    assert row["method"] == "prompt"
    assert row["rank"] is row["simulated"] is row["apart"] is row["best_step"] is row["eval_loss"] is None
    assert row["modules"] == row["layers"] == []
    with (tmp_path / "out" / "ranking.csv").open(encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file))[place_of - 1]
    assert cells["eval_loss"] == cells["simulated_eval_loss"] == cells["rank"] == cells["best_step"] == ""
    assert float(cells["parameters"]) == 20 * 8


def tried(row, rows, loss):
    outcomes = {"train_loss": 1.0, "eval_loss": loss, "perplexity": math.exp(loss), "token_accuracy": 0.5}
    return dataclasses.replace(row, trials=({"rows": rows, "outcomes": outcomes, "diverged": False},))


def test_trials_put_rows_without_a_run_among_the_others(ranking):
    known = [row for row in ranking.rows if row.found is not None]
    losses = [row.loss for row in known]
    prompt = next(row for row in ranking.rows if row.quick.method == "prompt")
    best = tried(known[0], 64, losses[0] + 0.5)
    # ahead of all that was tried
    rows = by_trials([best, *known[1:], tried(prompt, 64, losses[0] + 0.4)])
    assert rows[-1].loss == pytest.approx(losses[0] - 0.1)
    assert in_order(rows)[0].quick.method == "prompt"
    assert comparison_of(rows).worst == losses[0] + 0.5
    # behind the one that was tried, which says nothing against the others
    far = by_trials([best, *known[1:], tried(prompt, 64, losses[0] + 9.0)])
    assert far[-1].loss == pytest.approx(losses[0] + 8.5)
    assert [row.quick.method for row in in_order(far)] == ["lora", "lora", "lora", "prompt"]
    # tried alone: as its trial ended
    alone = by_trials([*known, tried(prompt, 64, 4.0)])
    assert alone[-1].loss == 4.0
    assert sequence_numbers(dataclasses.replace(ranking, rows=tuple(alone))).rows[-1][-3] == ""


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("lora", "dora", "fourierft")])
def test_every_method_is_priced(task, method):
    settings = dataclasses.replace(SETTINGS, methods=("lora", method), finalists=1)
    if method in ("oft", "boft", "vblora"):
        settings = dataclasses.replace(settings, target_modules=("q_proj", "o_proj"))  # widths of one power of 2
    language = made.reader()
    ranking = ft.rank(language.model, language.tokenizer, task, settings=settings)
    row = next(row for row in ranking.rows if row.quick.method == method)
    assert math.isfinite(row.quick.score)
    assert row.quick.parameters > 0


def test_trials_are_made(task):
    many = ft.language_task_from_datasets(made.texts(280), made.texts(4, offset=1))
    settings = dataclasses.replace(SETTINGS, methods=("lora", "ia3", "prompt", "adalora"), finalists=2, spend="100%",
                                   train_batch_size=8)  # fmt: skip
    language = made.reader()
    before = {name: tensor.clone() for name, tensor in language.model.state_dict().items()}
    ranking = ft.rank(language.model, language.tokenizer, many, settings=settings)
    assert all(torch.equal(before[name], tensor) for name, tensor in language.model.state_dict().items())
    of_methods = {row.quick.method for row in ranking.rows if row.trials}
    assert of_methods == {"lora", "ia3", "prompt", "adalora"}
    for row in ranking.rows:
        if row.found is None and row.trials:
            assert math.isfinite(row.loss)
            assert row.forecast.levels is None
    json.dumps(sequence_content(ranking, RUN))


def test_encoder_decoders():
    language = pairs.own("t5")
    settings = dataclasses.replace(SETTINGS, methods=("lora", "ia3", "ptuning"), finalists=1, max_length=24)
    ranking = ft.rank(language.model, language.tokenizer, pairs.task_of(), settings=settings)
    assert {row.quick.method for row in ranking.rows} == {"lora", "ia3", "ptuning"}
    assert {row.quick.config.task_type for row in ranking.rows if row.quick.config} == {"SEQ_2_SEQ_LM"}


def test_refusals(task):
    language = made.reader()
    with pytest.raises(ConfigError, match=r"methods = \['ia3'\].*name lora too"):
        prepare_ranking(language, task, dataclasses.replace(SETTINGS, methods=("ia3",)))
    short = dataclasses.replace(SETTINGS, methods=("lora", "prompt"))
    language.model.config.max_position_embeddings = 24
    with pytest.raises(ConfigError, match=r"20 virtual tokens before 16 others .* use --max-length 4"):
        prepare_ranking(language, task, short)
    tight = dataclasses.replace(short, budget="100")
    ready = prepare_ranking(made.reader(), task, tight)
    with pytest.raises(ConfigError, match=r"budget = '100' fits no placement of prompt: .* has 160 parameters"):
        rank_sequences(ready, tight)
    with pytest.raises(PlacementError, match=r"methods = fourierft: peft refuses"):  # 1000 numbers for 64 weights
        prepare_ranking(made.reader(), task, dataclasses.replace(SETTINGS, methods=("lora", "fourierft")))
