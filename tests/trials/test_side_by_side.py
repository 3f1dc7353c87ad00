"""Trials side by side are those made one after the other, kept by the process that wants them."""

import dataclasses
import json

import pytest
from peft import LoraConfig

import foretune as ft
from foretune.cli import run
from foretune.engines import Processes, on_ray
from foretune.errors import ConfigError, ForetuneError
from foretune.models.classifier import load_classifier
from foretune.report.home import home
from foretune.sequence_plan import choose_rows
from foretune.settings.groups import Batching, DataConfig, Recipe
from foretune.tasks.load import load_task
from foretune.trials import carry
from foretune.trials.bench import Candidate, LanguageBench, bench_of
from foretune.trials.carry import run_trials
from foretune.trials.plan import Trial, TrialPlan
from foretune.trials.store import open_store

import cases
import sequences

RECIPE = Recipe(epochs=2, learning_rate=2e-2, train_batch_size=8)
TRIALS = (Trial(0, 32, 0, 68.0, 1), Trial(1, 32, 0, 68.0, 1), Trial(0, 40, 0, 84.0, 1))
PLAN = TrialPlan(TRIALS, 300.0, 220.0, "220 of 300")


def candidates(kind, *modules):
    return tuple(
        Candidate(module, LoraConfig(r=2, target_modules=[module], task_type=kind, lora_dropout=0.1), RECIPE)
        for module in modules
    )


def classifier_bench(folder):
    task = load_task(DataConfig(cases.write_reviews(folder / "reviews", 80, 20)))
    classifier = load_classifier(str(cases.save(folder / "model")), label_names=task.label_names, seed=0)
    return bench_of(classifier, task, Batching(max_length=32), eval_samples=12)


def language_bench(folder):
    language, batching = sequences.reader(), Batching(max_length=24, batch_size=4, seed=0)
    rows = [{"prompt": f"a user said {i} ", "completion": f"it is {i % 7}"} for i in range(90)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = ft.load_language_task(DataConfig(str(folder / "rows.jsonl")))
    chosen = choose_rows(language, task, batching.max_length, eval_samples=6, seed=0)
    return LanguageBench(language, task, chosen, batching)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("beside")


@pytest.fixture(scope="module")
def bench(folder):
    return classifier_bench(folder)


CLASSIFIERS = candidates("SEQ_CLS", "query", "key")


@pytest.fixture(scope="module")
def serially(bench, folder):
    return run_trials(bench, CLASSIFIERS, PLAN, open_store(bench, folder / "serially"))


@pytest.fixture
def one_thread_each(monkeypatch):
    monkeypatch.setattr("foretune.engines.usable_cores", lambda: 2)  # as here


def shown(tried):
    return [[one.shown for one in of_candidate] for of_candidate in tried]


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


def test_several_processes_make_the_same_trials(bench, serially, folder, tmp_path, one_thread_each):
    store, progress = open_store(bench, tmp_path), []
    made = run_trials(bench, CLASSIFIERS, PLAN, store, engine=Processes(2), on_progress=lambda *n: progress.append(n))
    assert shown(made) == shown(serially)
    assert names(store) == sorted(path.name for path in (folder / "serially").iterdir())
    done = [done for done, _ in progress]
    assert (progress[-1], done) == ((220, 220), sorted(done))
    assert len(set(done)) == 4  # moves as each trial ends
    again = run_trials(bench, CLASSIFIERS, PLAN, store, engine=Processes(2))
    assert again == made


def test_a_language_models_trials_go_into_processes(folder, tmp_path, one_thread_each):
    bench = language_bench(folder)
    each, plan = candidates("CAUSAL_LM", "q_proj", "v_proj"), dataclasses.replace(PLAN, trials=TRIALS[:2])
    one_by_one = run_trials(bench, each, plan, open_store(bench, tmp_path / "a"))
    made = run_trials(bench, each, plan, open_store(bench, tmp_path / "b"), engine=Processes(2))
    assert shown(made) == shown(one_by_one)


def test_ray_makes_the_same_trials(bench, serially, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default, which starves beside other tests
    ray.init(num_cpus=1, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    store, bad = open_store(bench, tmp_path), candidates("SEQ_CLS", "nothing")
    failing = dataclasses.replace(PLAN, trials=(Trial(0, 32, 0, 68.0, 1), Trial(1, 40, 0, 84.0, 1)))
    try:
        with pytest.raises(ForetuneError, match="nothing"):
            run_trials(bench, (*bad, CLASSIFIERS[0]), failing, store, engine=on_ray)
        assert len(names(store)) == 1  # begun first, and kept
        made = run_trials(bench, CLASSIFIERS, PLAN, store, engine=on_ray)
    finally:
        ray.shutdown()
    assert shown(made) == shown(serially)


def test_what_a_trial_raises_is_raised_and_the_finished_ones_are_kept(bench, serially, tmp_path, one_thread_each):
    store = open_store(bench, tmp_path)
    each = (*CLASSIFIERS, *candidates("SEQ_CLS", "nothing"))
    plan = dataclasses.replace(PLAN, trials=(*TRIALS, Trial(2, 32, 0, 8.0, 1)))
    with pytest.raises(ForetuneError, match="nothing") as serial_error:
        run_trials(bench, each[2:], dataclasses.replace(PLAN, trials=(Trial(0, 32, 0, 8.0, 1),)), store)
    with pytest.raises(type(serial_error.value)) as error:
        run_trials(bench, each, plan, store, engine=Processes(2))
    assert str(error.value) == str(serial_error.value)
    assert 1 <= len([name for name in names(store) if name.endswith(".json")]) <= 3
    assert not [name for name in names(store) if name.startswith(".")]
    assert shown(run_trials(bench, CLASSIFIERS, PLAN, store)) == shown(serially)


def test_an_interrupted_command_goes_on(bench, serially, tmp_path, monkeypatch, one_thread_each):
    def interrupt(done, total):
        if done:
            raise KeyboardInterrupt

    store = open_store(bench, tmp_path)
    with pytest.raises(KeyboardInterrupt, match="1 of 3 trials are kept, the same command goes on"):
        run_trials(bench, CLASSIFIERS, PLAN, store, engine=Processes(2), on_progress=interrupt)
    (first,) = names(store)
    made, real = [], carry.run_trial
    monkeypatch.setattr(carry, "run_trial", lambda *args, **options: made.append(args) or real(*args, **options))
    assert shown(run_trials(bench, CLASSIFIERS, PLAN, store)) == shown(serially)
    assert len(made) == 2
    assert first in names(store)


def flags(folder, *more):
    data = () if "--dataset" in more else ("--dataset", str(folder / "reviews"))
    return ["rank", "--model", str(folder / "model"), *data, "--samples", "20",
            "--eval-samples", "10", "--draws", "1", "--target-modules", "query", "value", "--ranks", "2",
            "--finalists", "4", "--methods", "lora", "prompt", "--epochs", "4", "--learning-rate", "2e-2",
            "--train-batch-size", "8", "--max-length", "32", *more]  # fmt: skip


def rows(folder):
    (ranking,) = json.loads((folder / "result.json").read_text(encoding="utf-8"))["rankings"]
    for row in ranking["rows"]:
        for trial in row["trials"]:
            del trial["seconds"]
    return ranking["rows"]


def test_a_ranking_with_its_trials_side_by_side(bench, folder, tmp_path, capsys, monkeypatch, one_thread_each):
    here, real = [], carry.run_trial
    monkeypatch.setattr(carry, "run_trial", lambda *args, **options: here.append(args) or real(*args, **options))
    spend = ("--dataset", cases.write_reviews(tmp_path / "more", 200, 20), "--spend", "100%")
    assert run(flags(folder, *spend, "--workers", "2", "--output", str(tmp_path / "a"))) == 0
    assert len(here) == 1  # the largest, which has all cores
    said = capsys.readouterr().err
    assert "to make" in said
    assert "Warning" not in said
    config = (tmp_path / "a" / "config.yaml").read_text(encoding="utf-8")
    assert "workers: 2" in config
    assert "engine: local" in config
    assert "workers" not in (tmp_path / "a" / "chosen.yaml").read_text(encoding="utf-8")
    kept = sorted(path.name for path in (home() / "trials").iterdir())
    assert len(kept) >= 3
    monkeypatch.setenv("FORETUNE_HOME", str(tmp_path / "home"))
    assert run(flags(folder, *spend, "--output", str(tmp_path / "b"))) == 0
    assert sorted(path.name for path in (home() / "trials").iterdir()) == kept
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--workers", "2"], "workers = 2: only trials are made side by side, and spend = '0' buys none"),
        (["--engine", "ray"], "engine = 'ray': only trials are made side by side, and spend = '0' buys none"),
        (["--spend", "100%", "--workers", "0"], "workers = 0: must be at least 1"),
        (["--spend", "100%", "--workers", "1025"], "workers = 1025: must be at most 1,024"),
        (
            ["--spend", "100%", "--workers", "2", "--engine", "ray"],
            "workers = 2: with --engine ray the cluster decides",
        ),
        (["--spend", "100%", "--engine", "slurm"], "slurm"),
    ],
)
def test_what_makes_no_sense_is_refused(bench, folder, given, words, capsys):
    assert run(flags(folder, *given)) == 2
    message = capsys.readouterr().err
    assert words in " ".join(message.split())
    assert message.count("\n") == 1


def test_without_ray_it_is_refused_before_the_work(bench, folder, capsys, monkeypatch):
    monkeypatch.setattr("foretune.engines.find_spec", lambda name: None)
    assert run(flags(folder, "--spend", "100%", "--engine", "ray")) == 2
    assert capsys.readouterr().err == "error: --engine ray needs Ray: pip install 'foretune[ray]'\n"
    settings = ft.RankSettings(spend="100%", engine="ray", samples=20, max_length=32)
    for model, task in ((bench.classifier, bench.task), (language_bench(folder).language, language_bench(folder).task)):
        with pytest.raises(ConfigError, match="needs Ray"):
            ft.rank(model.model, model.tokenizer, task, settings=settings)
