"""`foretune rank` from files to files, and the score behind it."""

import csv
import gc
import json
import weakref

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig

import foretune as ft
from foretune.cli import run
from foretune.errors import KernelError
from foretune.forecasting.outcomes import OUTCOMES
from foretune.models.sites import Site
from foretune.problem import prepare
from foretune.ranking import rank as ranks
from foretune.ranking.candidates import Candidate
from foretune.ranking.finalists import Quick, choose_finalists
from foretune.ranking.quick_score import Blocks, quick_scores

import cases
import domains

FEW = ["--samples", "16", "--eval-samples", "10", "--draws", "2", "--epochs", "1", "--learning-rate", "1e-2",
       "--train-batch-size", "8", "--finalists", "6"]  # fmt: skip


def changed(tokens, *flags):
    """The same command with some flags given otherwise."""
    given = {flag for flag in flags if flag.startswith("--")}
    kept, skip = [], False
    for token in tokens:
        skip = token in given if token.startswith("--") else skip
        if not skip:
            kept.append(token)
    return [*kept, *flags]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rank")
    model = cases.save(folder / "model")
    domains.write(folder / "calibration.json", model)
    return model, cases.write_reviews(folder / "reviews"), folder


@pytest.fixture(scope="module")
def common(place):
    model, dataset, folder = place
    return ["rank", "--model", model, "--dataset", dataset, "--calibration", str(folder / "calibration.json"), *FEW]


@pytest.fixture(scope="module")
def ranked(common, place):
    folder = place[2] / "ranked"
    assert run([*common, "--ranks", "4", "2", "4", "--output", str(folder)]) == 0
    return folder


def rows_of(folder, name="ranking.csv"):
    with (folder / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_files_of_a_ranking(ranked):
    names = {"adapter_config.json", "candidates.csv", "config.yaml", "heatmap.png", "ranking.csv", "ranking.md"}
    names |= {"ranking.tex", "result.json", "chosen.yaml", "calibration.json"}  # the last because it was given
    assert {path.name for path in ranked.iterdir()} == names
    assert (ranked / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((ranked / "config.yaml").read_text(encoding="utf-8"))["samples"] == 16


def test_rows_are_ordered_and_hold_their_intervals(ranked):
    rows = rows_of(ranked)
    assert len(rows) == 6
    assert [int(row["place"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    accuracies = [float(row["accuracy"]) for row in rows]
    assert accuracies == sorted(accuracies, reverse=True)
    for row in rows:
        for name in OUTCOMES:
            assert float(row[f"{name}_low"]) < float(row[name]) < float(row[f"{name}_high"])
        assert int(row["parameters"]) > 0
        assert float(row["megabytes"]) == pytest.approx(4e-6 * int(row["parameters"]))
    assert rows[0]["tie"] == "no"
    # 13 linear modules and their usual groups at two ranks, each once whatever the order that the ranks come in
    names = [(row["adapter"], row["rank"]) for row in rows_of(ranked, "candidates.csv")]
    assert len(names) == len(set(names))
    assert {rank for _, rank in names} == {"2", "4"}


def test_the_chosen_adapter_can_be_trained(ranked, place, tmp_path):
    model, dataset, _ = place
    config = LoraConfig.from_pretrained(str(ranked))
    (best,) = (row for row in rows_of(ranked) if row["recommended"] == "yes")
    assert config.r == int(best["rank"])
    out = tmp_path / "tuned"
    assert run(["tune", "--model", model, "--dataset", dataset, "--adapter-config", str(ranked), "--epochs", "1",
                "--output", str(out)]) == 0  # fmt: skip
    tuned = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert tuned["placement"]["trainable_parameters"] == int(best["parameters"])


def test_own_objects_are_ranked_as_from_files(ranked, place, tmp_path):
    model, dataset, folder = place
    task = ft.load_task(ft.DataConfig(str(dataset)))
    given = ft.load_classifier(str(model), label_names=task.label_names, seed=0)
    before = {name: value.clone() for name, value in given.model.state_dict().items()}
    settings = ft.RankSettings(
        ranks=(4, 2),
        finalists=6,
        samples=16,
        eval_samples=10,
        draws=2,
        epochs=1,
        learning_rate=1e-2,
        train_batch_size=8,
    )
    calibration = ft.read_calibration(folder / "calibration.json")
    ranking = ft.rank(given.model, given.tokenizer, task, settings=settings, calibration=calibration)
    rows = rows_of(ranked)
    assert [row.quick.name for row in ranking.rows] == [row["adapter"] for row in rows]
    assert [row.forecast["accuracy"].value for row in ranking.rows] == pytest.approx(
        [float(row["accuracy"]) for row in rows], abs=1e-5
    )
    after = given.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    (best,) = (row for row in ranking.rows if row.recommended)
    written = ft.save_adapter(ranking, best.quick, str(tmp_path / "best"))
    assert written.read_text(encoding="utf-8") == (ranked / "adapter_config.json").read_text(encoding="utf-8")


def test_a_head_with_a_hidden_layer_is_spoken_of(common, place, tmp_path, capsys):
    model = cases.save(tmp_path / "model", "roberta")
    seen = domains.write(tmp_path / "calibration.json", place[0], model, hidden_head=False)
    assert run(changed(common, "--model", model, "--calibration", seen)) == 0
    assert "head has a hidden layer" in capsys.readouterr().out
    assert run(changed(common, "--calibration", seen)) == 0
    assert "head has a hidden layer" not in capsys.readouterr().out


def test_fewer_rows_than_samples_are_all_taken(common, tmp_path):
    texts = [("a good film", "good"), ("a bad film", "bad")] * 15
    data = tmp_path / "few.csv"
    with data.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [("text", "label"), *[(f"{text} {i}", label) for i, (text, label) in enumerate(texts)]]
        )
    out = tmp_path / "out"
    flags = changed(common, "--dataset", str(data), "--samples", "512", "--eval-samples", "512", "--output", str(out))
    assert run(flags) == 0
    held = json.loads((out / "result.json").read_text(encoding="utf-8"))["rankings"][0]
    assert (held["samples"], held["train_rows"]) == (24, 24)  # without an evaluation split a fifth is predicted


def test_a_memory_that_no_batch_fits_into_is_refused(common, tmp_path, capsys):
    out = tmp_path / "out"
    assert run([*common, "--memory", "1KB", "--output", str(out)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "memory = 0.001MB: a batch of this pass needs" in error
    assert "at least; raise --memory, or lower --batch-size" in error
    assert not out.exists()


def test_a_run_is_replayed_from_its_config(common, place, tmp_path, capsys):
    """With its own calibration and the row that was chosen, wherever the folder lies by now."""
    first, moved, out = tmp_path / "first", tmp_path / "moved", tmp_path / "again"
    assert run([*common, "--ranks", "4", "2", "4", "--choose", "3", "--output", str(first)]) == 0
    first.rename(moved)
    capsys.readouterr()
    assert run(["rank", "--config", str(moved / "config.yaml"), "--output", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    held, before = (json.loads((folder / "result.json").read_text(encoding="utf-8")) for folder in (out, moved))
    assert printed["rankings"][0]["rows"] == held["rankings"][0]["rows"] == before["rankings"][0]["rows"]
    assert held["calibration"]["source"] == "a study"
    for name in ("ranking.csv", "ranking.md", "calibration.json"):
        assert (out / name).read_bytes() == (moved / name).read_bytes(), name
    for name in ("adapter_config.json", "config.yaml"):  # 8.0 for 8
        one, two = (yaml.safe_load((folder / name).read_text(encoding="utf-8")) for folder in (out, moved))
        assert one == two, name
    assert LoraConfig.from_pretrained(str(out)).r == int(rows_of(out)[2]["rank"])
    other = run(["rank", "--config", str(moved / "config.yaml"), "--choose", "1", "--output", str(tmp_path / "one")])
    assert other == 0
    assert LoraConfig.from_pretrained(str(tmp_path / "one")).r == int(rows_of(out)[0]["rank"])
    model, dataset, _ = place  # other commands pass over what is a ranking's
    assert run(["score", "--config", str(moved / "config.yaml"), "--model", model, "--dataset", dataset,
                "--target-modules", "query"]) == 0  # fmt: skip


def test_a_ranking_without_its_own_calibration_has_no_file_of_one(common, tmp_path):
    out = tmp_path / "out"
    tokens = changed(common, "--target-modules", "query", "--finalists", "1")
    at = tokens.index("--calibration")
    assert run([*tokens[:at], *tokens[at + 2 :], "--output", str(out)]) == 0
    assert not (out / "calibration.json").exists()
    assert "calibration" not in yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))


def test_a_row_that_the_table_lacks_loses_nothing(common, tmp_path, capsys):
    """Three candidates for six finalists: known only when all is done."""
    out = tmp_path / "out"
    tokens = [*changed(common, "--target-modules", "query"), "--ranks", "2", "--choose", "6", "--output", str(out)]
    assert run(tokens) == 2
    captured = capsys.readouterr()
    assert "choose = 6: the table has 3 rows; all but adapter_config.json is saved" in captured.err
    assert "head without adapter" in captured.out
    assert len(rows_of(out)) == 3
    assert (out / "result.json").exists()
    assert not (out / "adapter_config.json").exists()


def test_a_ranking_keeps_no_model(place, monkeypatch):
    """Neither the model that was given nor the copy that carried the adapters outlives it."""
    model, dataset, folder = place
    task = ft.load_task(ft.DataConfig(str(dataset)))
    given = ft.load_classifier(str(model), label_names=task.label_names, seed=0)
    settings = ft.RankSettings(
        target_modules=("query",),
        ranks=(2,),
        finalists=2,
        samples=16,
        eval_samples=10,
        draws=1,
        epochs=1,
        train_batch_size=8,
    )
    watched = [weakref.ref(given.model)]

    def prepared(*args, **options):
        plan = prepare(*args, **options)
        watched.append(weakref.ref(plan.placed))
        return plan

    monkeypatch.setattr(ranks, "prepare", prepared)
    ranking = ft.rank(given.model, given.tokenizer, task, settings=settings)
    del given
    gc.collect()
    assert len(watched) == 2
    assert [model() for model in watched] == [None, None]
    assert ft.save_adapter(ranking, ranking.rows[0].quick, folder / "kept").exists()


def test_the_kappa_is_that_of_a_score(ranked, place, tmp_path):
    """One draw of A, all modules: the same samples, A and head as `foretune score` takes."""
    model, dataset, folder = place
    out = tmp_path / "one"
    tokens = ["--model", model, "--dataset", dataset, "--samples", "16", "--eval-samples", "10", "--draws", "1"]
    assert run(["rank", *tokens, "--target-modules", "query", "--layers", "1", "--ranks", "4", "--epochs", "1",
                "--calibration", str(folder / "calibration.json"), "--output", str(out)]) == 0  # fmt: skip
    (row,) = rows_of(out)
    assert run(["score", *tokens, "--target-modules", "query", "--layers", "1", "--r", "4", "--head", "probe",
                "--output", str(tmp_path / "score")]) == 0  # fmt: skip
    score = json.loads((tmp_path / "score" / "result.json").read_text(encoding="utf-8"))
    # factors are kept in bfloat16
    assert float(row["condition_number"]) == pytest.approx(score["kernel"]["condition_number"], rel=0.02)


def test_a_budget_keeps_adapters_small_and_searches(common, tmp_path):
    out = tmp_path / "budget"
    assert run([*common, "--ranks", "2", "--budget", "400", "--output", str(out)]) == 0
    rows = rows_of(out, "candidates.csv")
    assert all(int(row["parameters"]) <= 400 for row in rows)
    free = tmp_path / "free"
    assert run([*common, "--ranks", "2", "--output", str(free)]) == 0
    small = {row["adapter"] for row in rows_of(free, "candidates.csv") if int(row["parameters"]) <= 400}
    assert small < {row["adapter"] for row in rows}  # what a search found besides


def test_two_models_and_two_data_sets_are_one_table(place, common, tmp_path):
    model, dataset, _ = place
    other = cases.write_reviews(tmp_path / "others", n_train=40)
    second = cases.save(tmp_path / "roberta", "roberta")
    flags = ["--model", model, second, "--dataset", dataset, other, "--target-modules", "query", "--finalists", "2"]
    tokens = changed(common, *flags)
    out = tmp_path / "table"
    assert run([*tokens, "--choose", "2", "--output", str(out)]) == 0
    rows = rows_of(out)
    assert len(rows) == 8
    assert [row["dataset"] for row in rows] == [dataset] * 4 + [other] * 4
    assert {row["model"] for row in rows[:4]} == {model, second}
    assert len(list(out.glob("heatmap-*.png"))) == 4
    config = LoraConfig.from_pretrained(str(out))
    assert config.r == int(rows[1]["rank"])
    assert "not comparable" not in (out / "ranking.md").read_text(encoding="utf-8").split("comparable across")[0]


def test_more_than_two_classes(common, tmp_path):
    data = tmp_path / "three"
    data.mkdir()
    for name, rows in (("train", range(60)), ("validation", range(60, 84))):
        lines = [f"{cases.review(row)[0]},{row % 3}" for row in rows]
        (data / f"{name}.csv").write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    assert run(changed(common, "--dataset", str(data), "--samples", "24", "--target-modules", "value")) == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--budget", "10"], ["'10'", "smallest", "parameters"]),
        (["--budget", "a lot"], ["'a lot'", "500k"]),
        (["--ranks", "64"], ["rank 64", "width 16"]),
        (["--ranks", "0"], ["ranks"]),
        (["--samples", "3"], ["samples = 3", "at least 4"]),
        (["--target-modules", "qery"], ["'qery'", "'query'"]),
        (["--layers", "7"], ["layer 7", "2 layers"]),
        (["--finalists", "0"], ["finalists = 0"]),
        (["--choose", "9"], ["choose = 9"]),
        (["--init", "pissa"], ["pissa"]),
        (["--eval-samples", "0"], ["eval_samples = 0"]),
    ],
)
def test_wrong_input_is_refused_and_nothing_is_written(common, flags, words, tmp_path, capsys):
    out = tmp_path / "refused"
    assert run([*changed(common, *flags), "--output", str(out)]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"outputs": ["class:1"]}, ["class:1", "'margin'"]),
        ({"schema": 99}, ["99"]),
        ({"lines": {}}, ["accuracy"]),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused(common, place, change, words, tmp_path, capsys):
    content = json.loads((place[2] / "calibration.json").read_text(encoding="utf-8"))
    path = tmp_path / "other.json"
    path.write_text(json.dumps({**content, **change}), encoding="utf-8")
    assert run(changed(common, "--calibration", str(path))) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


def site(name, layer, d=8, rank=4):
    return Site(f"layer.{layer}.{name}", layer, name, d, d, rank, 1.0)


SITES = tuple(site(name, layer) for layer in range(3) for name in ("query", "value"))


def blocks_of(n=12, ranks=(2, 4), seed=0):
    random = np.random.default_rng(seed)
    factors = random.normal(size=(len(SITES), len(ranks), n, 3))
    labels = random.integers(0, 2, n)
    probability = random.uniform(0.2, 0.8, n)
    residual = np.stack([-(labels - probability), labels - probability], axis=1)
    return Blocks(SITES, ranks, factors @ factors.swapaxes(-1, -2), residual)


def test_quick_scores_are_those_of_refits():
    """Each sample left out and predicted by a fit on the others, one candidate at a time."""
    blocks = blocks_of()
    candidates = [Candidate((0,), 4), Candidate((1, 4), 2), Candidate(tuple(range(6)), 4)]
    whole = blocks.steps.sum(axis=(0, 1))
    ridge = 0.01 * np.trace(whole) / 12
    for candidate, score in zip(candidates, quick_scores(blocks, candidates), strict=True):
        kernel = sum(
            (blocks.steps[m, 0] if candidate.rank == 2 else blocks.steps[m].sum(0))
            * (4 / candidate.rank) ** SITES[m].rank_exponent
            for m in candidate.sites
        )
        left = 0.0
        for i in range(12):
            rest = np.delete(np.arange(12), i)
            dual = np.linalg.solve(kernel[np.ix_(rest, rest)] + ridge * np.eye(11), blocks.residual[rest])
            left += np.sum((blocks.residual[i] - kernel[i, rest] @ dual) ** 2)
        assert score == pytest.approx(1.0 - left / np.sum(blocks.residual**2), rel=1e-9)


def test_quick_scores_come_in_chunks(monkeypatch):
    import foretune.ranking.quick_score as screen

    blocks = blocks_of()
    candidates = [Candidate((i, (i + 1) % 6), 4) for i in range(6)]
    together = quick_scores(blocks, candidates)
    monkeypatch.setattr(screen, "CHUNK", 3 * 12 * 12 * 2)
    assert quick_scores(blocks, candidates) == pytest.approx(together, rel=1e-12)


def test_nothing_to_predict_scores_zero():
    blocks = blocks_of()
    nothing = Blocks(SITES, blocks.ranks, np.zeros_like(blocks.steps), blocks.residual)
    assert quick_scores(nothing, [Candidate((0,), 4)]).tolist() == [0.0]
    with pytest.raises(KernelError, match="rank 3 was not kept"):
        blocks.kernels([Candidate((0,), 3)])


def test_finalists_are_spread_over_sizes_and_hold_whole_kinds():
    quick = [Quick(Candidate((i,), 4), f"one {i}", 64, 0.1 + 0.01 * i) for i in range(6)]
    quick += [Quick(Candidate((0, 1), 4), "two", 128, 0.5), Quick(Candidate((0, 2, 4), 4), "queries", 192, 0.2)]
    quick += [Quick(Candidate(tuple(range(6)), 4), "all", 384, 0.05)]
    chosen = [entry.name for entry in choose_finalists(quick, SITES, 6)]
    assert chosen[:2] == ["one 5", "two"]  # the front
    assert chosen[2:4] == ["queries", "all"]
    assert chosen[4:] == ["one 4", "one 3"]
    assert len(choose_finalists(quick, SITES, 1)) == 1
    assert len(choose_finalists(quick, SITES, 100)) == len(quick)
