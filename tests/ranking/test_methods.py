"""Adapter methods beside LoRA in a ranking: what is priced, simulated, written and refused."""

import dataclasses
import json
from math import isfinite
from typing import get_args

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LNTuningConfig, PeftConfig

import foretune as ft
from families import build
from foretune.cli import run
from foretune.errors import PlacementError
from foretune.models.adapter_file import adapter_from_file
from foretune.models.classifier import load_classifier
from foretune.models.placement import lora_config, place, read_adapters
from foretune.ranking.candidates import Candidate
from foretune.ranking.method_pass import _Pass, list_placements
from foretune.ranking.methods import METHODS, placements_of, with_steps
from foretune.settings.commands import METHOD_ROWS, RankSettings
from foretune.settings.groups import AdapterConfig, MethodName

import cases
import domains

FEW = ["--samples", "16", "--eval-samples", "10", "--draws", "2", "--epochs", "1", "--learning-rate", "1e-2",
       "--train-batch-size", "8", "--finalists", "4", "--ranks", "2"]  # fmt: skip
SIMULATED = ("dora", "ia3", "bitfit", "ln", "vera", "adalora")


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    model = cases.save(folder / "model")
    domains.write(folder / "calibration.json", model)
    return model, cases.write_reviews(folder / "reviews"), folder


@pytest.fixture(scope="module")
def common(where):
    model, dataset, folder = where
    return ["rank", "--model", model, "--dataset", dataset, "--calibration", str(folder / "calibration.json"), *FEW]


@pytest.fixture(scope="module")
def ranked(common, where):
    folder = where[2] / "ranked"
    assert run([*common, "--methods", "lora", *SIMULATED, "loha", "prompt", "--output", str(folder)]) == 0
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))["rankings"][0]


def of_method(ranking, name):
    return [row for row in ranking["rows"] if row["method"] == name]


def test_every_method_has_rows_and_no_level_but_lora(ranked):
    assert {row["method"] for row in ranked["rows"]} == {"lora", *SIMULATED, "loha", "prompt"}
    for name in (*SIMULATED, "loha", "prompt"):
        rows = of_method(ranked, name)
        assert 1 <= len(rows) <= METHOD_ROWS, name
        for row in rows:
            assert row["forecast"] is None
            assert name in row["reach"]["reasons"][-1]
            assert isfinite(row["quick_score"])
            assert row["parameters"] > 0
    assert any("simulated to first order" in note for note in ranked["notes"])
    assert any(note.startswith("loha, prompt: each placement priced by a pass of its own") for note in ranked["notes"])


def test_what_is_not_simulated_stands_last(ranked):
    methods = [row["method"] for row in ranked["rows"]]
    assert set(methods[-(len(of_method(ranked, "loha")) + 1) :]) == {"loha", "prompt"}


def test_sizes_are_those_that_train(ranked, where):
    classifier = load_classifier(where[0], label_names=("0", "1"), seed=0)
    (row,) = of_method(ranked, "ln")
    norms = [m for n, m in classifier.model.named_modules() if isinstance(m, torch.nn.LayerNorm)]
    assert row["parameters"] == sum(p.numel() for norm in norms for p in norm.parameters())
    assert row["rank"] is None
    assert {row["rank"] for row in of_method(ranked, "dora")} == {2}
    (prompt,) = of_method(ranked, "prompt")
    assert prompt["parameters"] == 20 * classifier.model.config.hidden_size
    assert prompt["modules"] == []


def test_a_step_counts_the_tokens_of_a_prompt(ranked, where):
    classifier = load_classifier(where[0], label_names=("0", "1"), seed=0)
    texts = ft.load_task(ft.DataConfig(where[1])).train.texts
    mean = sum(len(classifier.tokenizer(text)["input_ids"]) for text in texts) / len(texts)
    (prompt,) = of_method(ranked, "prompt")
    assert prompt["step_cost"] == pytest.approx(1 + 20 / mean, rel=0.2)  # the row has the mean of 16 of them
    assert of_method(ranked, "ln")[0]["step_cost"] <= 1.0


@pytest.mark.parametrize("name", [*SIMULATED, "loha", "prompt"])
def test_a_row_is_written_for_tune(common, where, ranked, name, tmp_path):
    place_of = 1 + next(i for i, row in enumerate(ranked["rows"]) if row["method"] == name)
    folder = tmp_path / "chosen"
    assert (
        run(
            [
                *common,
                "--methods",
                "lora",
                *SIMULATED,
                "loha",
                "prompt",
                "--choose",
                str(place_of),
                "--output",
                str(folder),
            ]
        )
        == 0
    )
    config = adapter_from_file(folder)
    assert isinstance(config, PeftConfig)
    if name == "adalora":
        assert isinstance(config, AdaLoraConfig)
        assert config.total_step == ranked["steps"]
    assert run(["tune", "--config", str(folder / "chosen.yaml"), "--output", str(tmp_path / "tuned")]) == 0


def test_a_quick_score_goes_by_the_kernel_of_the_placement(where):
    """Kernels of (IA)³ are sums over modules: those of a placement inside of the pass equal those of its own."""
    model, dataset, _ = where
    task = ft.load_task(ft.DataConfig(str(dataset)))
    classifier = load_classifier(model, label_names=task.label_names, seed=0)
    few = {"samples": 16, "eval_samples": 10, "epochs": (1,), "finalists": 4, "learning_rate": (1e-2,)}
    settings = RankSettings(**few, methods=("ia3",))
    together = ft.rank(classifier.model, classifier.tokenizer, task, settings=settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "ia3", dataclasses.replace(METHODS["ia3"], adds=False))
        apart = ft.rank(classifier.model, classifier.tokenizer, task, settings=settings)
    assert len(together.rows) == METHOD_ROWS
    one, other = ({row.quick.name: row for row in ranking.rows} for ranking in (together, apart))
    for name in one.keys() | other.keys():
        assert one[name].quick.score == pytest.approx(other[name].quick.score, rel=1e-3), name
        assert one[name].condition_number == pytest.approx(other[name].condition_number, rel=1e-3), name
        assert one[name].said.order == pytest.approx(other[name].said.order, rel=1e-3), name


@pytest.mark.parametrize("name", ["vera", "adalora"])
def test_evaluation_rows_that_go_through_later_give_the_same(where, name, monkeypatch):
    """The adapter is put on again with the same random numbers."""
    model, dataset, _ = where
    task = ft.load_task(ft.DataConfig(str(dataset)))
    classifier = load_classifier(model, label_names=task.label_names, seed=0)
    few = {"samples": 16, "eval_samples": 10, "epochs": (1,), "finalists": 4, "learning_rate": (1e-2,)}
    settings = RankSettings(**few, methods=(name,))
    later = ft.rank(classifier.model, classifier.tokenizer, task, settings=settings)
    real, late = _Pass.__init__, []

    def at_once(self, *arguments, evaluates):
        late.append(not evaluates)
        real(self, *arguments, evaluates=True)

    monkeypatch.setattr(_Pass, "__init__", at_once)
    found = ft.rank(classifier.model, classifier.tokenizer, task, settings=settings)
    assert all(late)
    assert [(row.quick.name, row.said.order) for row in found.rows] == [
        (row.quick.name, row.said.order) for row in later.rows
    ]


def test_a_method_that_peft_cannot_put_on_the_model_is_named():
    """BEFT knows no Conv1D."""
    model = build("gpt2")
    template = lora_config(model, AdapterConfig(("all-linear",), r=2, alpha=2))
    sites = read_adapters(place(model, template, seed=0)).sites
    everything = [Candidate(tuple(range(len(sites))), 2)]
    assert list_placements(("lora",), everything, sites, template, model) == ()
    with pytest.raises(PlacementError, match=r"methods = bitfit: .*BEFT"):
        list_placements(("lora", "ia3", "bitfit"), everything, sites, template, model)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--methods", "lora", "lora"], "each once"),
        (["--methods", "lora", "ia3", "--equal-size", "2k"], "leave one of them out"),
        (["--methods", "lorra"], "lorra"),
        (["--methods", "ln", "--budget", "10"], "budget"),
    ],
)
def test_wrong_settings(common, capsys, flags, words):
    assert run([*common, *flags]) == 2
    assert words in capsys.readouterr().err.replace("\n", " ")


def test_placements_and_configurations():
    model = build("bert", dtype=torch.float64)
    template = lora_config(model, AdapterConfig(("all-linear",), r=2, alpha=2))
    sites = read_adapters(place(model, template, seed=0)).sites
    everything = Candidate(tuple(range(len(sites))), 2)
    query = Candidate(tuple(i for i, site in enumerate(sites) if site.kind.endswith("query")), 2)
    listed = placements_of(METHODS["ia3"], [query, everything], sites, template, model)
    assert [placement.candidate.sites for placement in listed] == [everything.sites]  # a single kind is no group
    (placement,) = listed
    assert isinstance(placement.config, IA3Config)
    adapted = read_adapters(place(model, placement.config, seed=0))
    assert {site.name for site in adapted.sites} == {site.name for site in sites}
    outside = {site.name for site in sites if "attention" not in site.kind}
    feedforward = {
        a.site.name for a in adapted.adapters if a.site.others == a.module.in_features != a.module.out_features
    }
    assert feedforward == {name for name in outside if name in feedforward}
    assert placements_of(METHODS["ia3"], [query], sites, template, model)[0].candidate.sites == query.sites
    (norms,) = placements_of(METHODS["ln"], [query], sites, template, model)
    assert isinstance(norms.config, LNTuningConfig)
    assert set(METHODS) == set(get_args(MethodName))


def test_ranks_of_adalora_fall_over_its_run():
    config = AdaLoraConfig(total_step=1, init_r=12, target_r=8)
    changed = with_steps(config, 90)
    assert (changed.total_step, changed.tinit, changed.tfinal) == (90, 9, 30)
    assert config.total_step == 1
    assert with_steps(None, 90) is None
