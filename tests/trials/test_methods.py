"""Trials of adapter methods beside LoRA: made early, kept by their content, and an order by comparison."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from math import inf, log, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, PromptTuningConfig

import foretune as ft
from foretune.cli import run
from foretune.forecasting.calibration import RunForecast
from foretune.forecasting.reach import Reach
from foretune.models.classifier import load_classifier
from foretune.ranking.candidates import Candidate as Placed
from foretune.ranking.finalists import Quick
from foretune.ranking.recommend import marked
from foretune.ranking.rows import Row
from foretune.settings.groups import Batching, Recipe
from foretune.trials.bench import Candidate, adapter_of, bench_of
from foretune.trials.compared import by_comparison, compared_early, to_try, without_level
from foretune.trials.plan import Extent, Trial, plan_trials
from foretune.trials.run import run_trial
from foretune.trials.store import Store, trial_key

import cases
import domains

FLAGS = ["--samples", "20", "--eval-samples", "10", "--draws", "1", "--ranks", "2", "--finalists", "4", "--epochs", "4",
         "--learning-rate", "2e-2", "--train-batch-size", "8", "--max-length", "32"]  # fmt: skip
RECIPE = Recipe(epochs=2, learning_rate=2e-2, train_batch_size=8)
N = 200
FAR = Reach(inf, ("nothing of the kind was seen",))
SIMULATED = object()


def logit(p):
    return math.log(p / (1 - p))


def logistic(x):
    return 1 / (1 + math.exp(-x))


def trial(rows, accuracy, loss=0.5):
    return {"rows": rows, "outcomes": {"train_loss": 0.4, "eval_loss": loss, "accuracy": accuracy}}


def row(method="lora", order=(0.8, 0.5), trials=(), *, simulated=True, score=0.0, recipe=RECIPE, collapsed=None):
    said = RunForecast(None, order if simulated else (nan, inf), FAR, calibrated=simulated)
    config = None if method == "lora" else IA3Config()
    quick = Quick(Placed((0,), 1), f"{method} {score}", 10, score, method=method, config=config)
    return Row(quick, recipe, 9, said, SIMULATED if simulated else None, 2, 0.0, 1.0, 0.1, 1.0,
               trials=tuple(trials), collapsed=collapsed)  # fmt: skip


def test_the_comparison_by_hand():
    """Two references on 32 rows gain 1.0 and 0.4 of a logit and −0.3 and −0.1 of a logarithm until the end."""
    rows = [
        row(order=(logistic(1.5), math.exp(-1.0)), trials=[trial(32, logistic(0.5), math.exp(-0.7))]),
        row("ia3", order=(logistic(0.9), math.exp(-0.9)), trials=[trial(32, logistic(0.5), math.exp(-0.8))]),
        row("prompt", trials=[trial(32, logistic(0.2), math.exp(-0.5))], simulated=False),
    ]
    *others, found = by_comparison(rows, N)
    assert others == rows[:2]
    assert found.said.order == pytest.approx((logistic(0.2 + 0.7), math.exp(-0.5 - 0.2)))
    assert found.said.levels is None
    assert found.said.reach is FAR


def test_what_collapsed_is_no_reference():
    one, other = (row(order=(0.9, 0.5), trials=[trial(32, value)]) for value in (0.8, 0.1))
    prompt = row("prompt", trials=[trial(32, 0.6)], simulated=False)
    alone = by_comparison([one, prompt], N)[-1]
    assert by_comparison([one, dataclasses.replace(other, collapsed=32), prompt], N)[-1] == alone
    assert by_comparison([one, other, prompt], N)[-1].said.order[0] > alone.said.order[0]


@pytest.mark.parametrize("others", [[], [row(trials=[trial(64, 0.8)])], [row("loha", trials=[trial(32, 0.9)],
                                                                             simulated=False)], [row()]])  # fmt: skip
def test_without_a_reference_its_own_outcome_stands(others):
    prompt = row("prompt", trials=[trial(32, 0.6, 0.7)], simulated=False)
    assert by_comparison([*others, prompt], N)[-1].said.order == pytest.approx((0.6, 0.7))


def test_a_larger_trial_gains_less():
    """On 100 of 200 rows half of what was gained from 50 on is left; another reference on fewer rows does not count."""
    rows = [
        row(order=(logistic(2.0), 0.5), trials=[trial(32, logistic(-1.0)), trial(50, logistic(1.0))]),
        row(order=(logistic(2.0), 0.5), trials=[trial(32, logistic(-2.0))]),
        row("prompt", trials=[trial(50, logistic(0.3)), trial(100, logistic(0.4))], simulated=False),
    ]
    expected = 0.4 + log(200 / 100) / log(200 / 50) * 1.0
    assert logit(by_comparison(rows, N)[-1].said.order[0]) == pytest.approx(expected)
    assert expected == pytest.approx(0.9)


def test_a_trial_that_diverged_has_no_order():
    rows = [row(trials=[trial(32, 0.8)]), row("prompt", trials=[trial(32, nan, nan)], simulated=False)]
    found = by_comparison(rows, N)[-1].said
    assert math.isnan(found.order[0])
    assert found.key[0] == inf


LOGITS = st.floats(-4, 4)
REFERENCES = st.lists(st.tuples(LOGITS, LOGITS, st.booleans()), max_size=5)


@given(REFERENCES, LOGITS, LOGITS)
def test_the_comparison_keeps_the_order_of_the_trials(references, one, other):
    known = [
        row(order=(logistic(p), 0.5), trials=[trial(32, logistic(y))], collapsed=32 if collapsed else None)
        for p, y, collapsed in references
    ]
    tried = [row("prompt", trials=[trial(32, logistic(y))], simulated=False) for y in (one, other)]
    found = [logit(entry.said.order[0]) for entry in by_comparison([*known, *tried], N)[len(known) :]]
    gaps = [p - y for p, y, collapsed in references if not collapsed]
    gain = sum(gaps) / len(gaps) if gaps else 0.0
    assert found == pytest.approx([one + gain, other + gain], abs=1e-6)


def test_what_nothing_simulates_is_tried_early():
    other = dataclasses.replace(RECIPE, learning_rate=1e-3)
    best, second = row(score=0.9), row(score=0.8)
    loha, worse, elsewhere = (row("loha", simulated=False, score=s, recipe=r)
                              for s, r in ((0.5, RECIPE), (0.4, RECIPE), (0.7, other)))  # fmt: skip
    prompt = row("prompt", simulated=False, score=-0.1)
    rows = to_try([best, second, elsewhere, loha, worse, prompt])
    assert rows == (best, loha, prompt, second, elsewhere, worse)
    assert compared_early(rows) == (0, 1, 2)
    assert compared_early((best, second)) == ()
    only = to_try([loha, worse, prompt])
    assert only == (loha, prompt, worse)
    assert compared_early(only) == (0, 1)


@given(st.integers(2, 6), st.floats(0.01, 1.0), st.integers(100, 20_000), st.integers(1, 500))
def test_early_trials_come_before_a_large_one(n_early, share, run_rows, eval_rows):
    recipes, extent = [RECIPE] * 8, Extent(run_rows, run_rows, eval_rows, 2)
    try:
        plan = plan_trials(recipes, extent, share, early=range(n_early))
    except ft.errors.ConfigError:
        return
    assert plan.passes <= plan.budget
    smallest = [one.candidate for one in plan.trials if one.rows == 32]
    assert smallest[:n_early] == list(range(min(n_early, len(smallest))))
    cost = next((one.passes for one in plan.trials if one.rows == 32), inf)
    if len(smallest) < n_early:
        assert plan.passes + cost > plan.budget
        assert {one.rows for one in plan.trials} <= {32} or not smallest
    larger = [one for one in plan.trials if one.rows > 32]
    assert all(one.rows >= 96 for one in larger) or not smallest
    again = plan_trials(recipes, extent, share, early=range(n_early), done=plan.trials)
    assert set(plan.trials) <= set(again.trials)
    assert again.passes <= plan.budget


def test_levels_are_withheld_of_all_but_lora():
    said = RunForecast({}, (0.8, 0.5), Reach(0.0, ()))
    assert without_level(said, row()) is said
    other = without_level(said, row("ia3"))
    assert other.levels is None
    assert other.order == said.order
    assert other.reach is FAR


def test_what_ties_for_want_of_any_finished_run_is_not_recommended():
    near = dataclasses.replace(row(score=0.9), said=RunForecast(None, (0.8, 0.5), Reach(3.0, ("far",))))
    small = dataclasses.replace(row("ia3"), tie=True, quick=dataclasses.replace(row("ia3").quick, parameters=1))
    assert [one.recommended for one in marked([near, small])] == [True, False]
    assert [one.recommended for one in marked([row("vera"), small])] == [False, True]


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods_tried")
    domains.write(folder / "calibration.json", cases.save(folder / "model"))
    cases.write_reviews(folder / "reviews", N, 20)
    return folder


@pytest.fixture(scope="module")
def bench(where):
    task = ft.load_task(ft.DataConfig(str(where / "reviews")))
    classifier = load_classifier(str(where / "model"), label_names=task.label_names, seed=3)
    return bench_of(classifier, task, Batching(max_length=32, batch_size=16, seed=3), eval_samples=12)


CONFIGS = {
    "lora": LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]),
    "ia3": IA3Config(task_type="SEQ_CLS", target_modules=["query", "output.dense", "intermediate.dense"],
                     feedforward_modules=["output.dense", "intermediate.dense"]),
    "loha": LoHaConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]),
    "prompt": PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=20),
    "adalora": AdaLoraConfig(task_type="SEQ_CLS", total_step=50, tinit=5, tfinal=16, target_modules=["query", "value"]),
}  # fmt: skip


def key_of(bench, config):
    return trial_key(Store(None, "m"), bench, Candidate("any", config, RECIPE), Trial(0, 32, 3, 68.0, 1))


def test_keys_tell_methods_apart_by_their_content(bench):
    keys = {name: key_of(bench, config) for name, config in CONFIGS.items()}
    assert len(set(keys.values())) == len(CONFIGS)
    for name in ("feedforward_modules", "target_modules"):
        turned = IA3Config(**{**vars(CONFIGS["ia3"]), name: sorted(getattr(CONFIGS["ia3"], name), reverse=True)})
        assert key_of(bench, turned) == keys["ia3"]
    fewer = IA3Config(**{**vars(CONFIGS["ia3"]), "feedforward_modules": {"output.dense"}})
    assert key_of(bench, fewer) != keys["ia3"]


def test_keys_are_the_same_in_every_process():
    """Sets of names have another order in each process."""
    code = (
        "import json; from peft import IA3Config; from foretune.models.adapter_file import plain; "
        "from foretune.trials.store import _json; names = [f'module_{i}' for i in range(9)]; "
        "print(_json(plain(IA3Config(target_modules=names, feedforward_modules=names[:5]))))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_ranks_of_adalora_fall_within_the_trial(bench, monkeypatch):
    config, seen = CONFIGS["adalora"], []
    candidate = Candidate("adalora", config, RECIPE)
    tried = Trial(0, 36, 3, 76.0, 1)
    found = adapter_of(bench, candidate, tried)
    assert (found.total_step, found.tinit, found.tfinal) == (10, 1, 3)  # 2 epochs of ⌈36/8⌉ steps; the run has 50
    assert (config.total_step, config.tinit, config.tfinal) == (50, 5, 16)
    assert adapter_of(bench, candidate, Trial(0, N, 3, 400.0, 1)) == config
    assert adapter_of(bench, Candidate("lora", CONFIGS["lora"], RECIPE), tried) is CONFIGS["lora"]
    assert adapter_of(bench, Candidate("own", None, RECIPE), tried) is None
    from foretune.training.fit import _Allocator

    real = _Allocator.on_optimizer_step

    def watched(self, args, state, control, **options):
        real(self, args, state, control, **options)
        config = self._config
        seen.append((config.total_step, sum(map(sum, (config.rank_pattern or {}).values()))))

    monkeypatch.setattr(_Allocator, "on_optimizer_step", watched)
    assert not run_trial(bench, candidate, tried).shown.diverged
    assert len(seen) == seen[0][0] == 10
    assert seen[-1][1] == 2 * 2 * config.target_r  # two modules of two layers


@pytest.mark.parametrize("name", ["ia3", "prompt"])
def test_a_trial_of_a_method_is_the_fine_tune_of_its_rows(bench, name):
    candidate, tried = Candidate(name, CONFIGS[name], RECIPE), Trial(0, 32, 3, 68.0, 1)
    before = {key: value.clone() for key, value in bench.model.state_dict().items()}
    first, second = (run_trial(bench, candidate, tried).shown for _ in range(2))
    assert first == second
    assert all((before[key] == value).all() for key, value in bench.model.state_dict().items())


def test_virtual_tokens_take_positions(bench):
    """A model of few positions: texts are cut so that they fit beside the virtual tokens."""
    from foretune.training.plan import prepare_tune

    room = bench.model.config.max_position_embeddings
    settings = ft.TuneSettings(**vars(RECIPE), max_length=room)
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=room - 10)
    plan = prepare_tune(bench.classifier, bench.task, config, settings)
    assert plan.train.encoded.max_length == 10


def test_rank_tries_methods_and_keeps_their_trials(where, tmp_path, capsys):
    argv = ["rank", "--model", str(where / "model"), "--dataset", str(where / "reviews"), "--calibration",
            str(where / "calibration.json"), *FLAGS, "--methods", "lora", "ia3", "loha", "prompt",
            "--spend", "60%"]  # fmt: skip
    assert run([*argv, "--output", str(tmp_path / "out")]) == 0
    assert "to make" in capsys.readouterr().err
    (held,) = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))["rankings"]
    tried = {one["method"] for one in held["rows"] if one["trials"]}
    assert {"lora", "loha", "prompt"} <= tried
    for one in held["rows"]:
        if one["method"] != "lora":
            assert one["forecast"] is None
    last = [one for one in held["rows"] if one["method"] in ("loha", "prompt") and not one["trials"]]
    assert held["rows"][len(held["rows"]) - len(last) :] == last
    assert any("loha, prompt: " in note and "trials tell their order" in note for note in held["notes"])
    assert sum("No level is forecast" in note for note in held["notes"]) <= 1
    assert run([*argv, "--output", str(tmp_path / "again")]) == 0
    assert "to make" not in capsys.readouterr().err
    (again,) = json.loads((tmp_path / "again" / "result.json").read_text(encoding="utf-8"))["rankings"]
    assert again["rows"] == held["rows"]
