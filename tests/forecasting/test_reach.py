"""What lies outside of what a calibration has seen: wider by the stated rule, or withheld, and said so everywhere."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

import foretune as ft
from foretune.cli import run
from foretune.errors import ConfigError
from foretune.forecasting.calibration import apply_calibration, tied
from foretune.forecasting.calibration_file import calibration_from, shipped_calibration
from foretune.forecasting.calibration_fit import Case, fit_calibration
from foretune.forecasting.linearise import linearise
from foretune.forecasting.outcomes import OUTCOMES, scale
from foretune.forecasting.reach import RUN, Run, domain_of, reach, run_from, run_values
from foretune.forecasting.risk import Risk
from foretune.forecasting.schedule import Schedule
from foretune.forecasting.simulated_runs import kind_of, runs_of
from foretune.models.identity import fingerprint
from foretune.models.placement import lora_config
from foretune.problem import prepare
from foretune.report.curves import read_curve

import cases
import domains

SEEN = Run(
    model="00000000000aa",
    hidden_head=False,
    classes=4,
    known_rows=400,
    train_rows=400,
    eval_rows=300,
    longest=50,
    epochs=5,
    steps=100,
    batch_size=32,
    learning_rate=1e-3,
    update_rate=8e-3,
)
DOMAIN = domain_of([SEEN], most_rows=1.0, most_classes=4.0)
VALUES = domains.best_at_end(
    {
        "simulated_train_loss": 0.1,
        "simulated_eval_loss": 0.4,
        "simulated_accuracy": 0.8,
        "probe_loss": 0.6,
        "probe_accuracy": 0.75,
        "movement": 0.5,
        "doublings": 0.0,
    }
)
# each changes one number of the run by a factor; the words that must be said
OUTSIDE = {
    "rows over known rows": (lambda k: {"train_rows": int(400 * k)}, "training rows"),
    "few known rows": (lambda k: {"known_rows": int(400 / k), "train_rows": int(400 / k)}, "known rows"),
    "more steps": (lambda k: {"steps": int(100 * k)}, "steps"),
    "more epochs": (lambda k: {"epochs": int(5 * k), "steps": int(100 * k**0.5)}, "epochs"),
    "fewer steps": (lambda k: {"steps": int(100 / k)}, "steps"),
    "a higher learning rate": (lambda k: {"learning_rate": 1e-3 * k, "update_rate": 8e-3 * k}, "learning rate"),
    "a lower learning rate": (lambda k: {"learning_rate": 1e-3 / k, "update_rate": 8e-3 / k}, "learning rate"),
    "another α": (lambda k: {"update_rate": 8e-3 * k}, "learning rate times α"),
    "larger batches": (lambda k: {"batch_size": int(32 * k)}, "texts in a step"),
    "longer texts": (lambda k: {"longest": int(50 * k)}, "tokens"),
    "more classes": (lambda k: {"classes": int(4 * k)}, "classes"),
    "fewer classes": (lambda k: {"classes": int(4 / k)}, "classes"),
}


@pytest.mark.parametrize(("change", "words"), OUTSIDE.values(), ids=OUTSIDE)
def test_each_kind_of_outside_widens_then_withholds(change, words):
    near, far = (reach(DOMAIN, dataclasses.replace(SEEN, **change(k))) for k in (2.0, 4.0))
    assert near.doublings == pytest.approx(1.0, abs=1e-9)
    assert near.widening == pytest.approx(2.0)
    assert not near.withheld
    assert far.doublings == pytest.approx(2.0)
    assert far.withheld
    for found in (near, far):
        assert len(found.reasons) == 1
        assert words in found.reasons[0]
        assert words in found.verdict


@pytest.mark.parametrize(
    ("change", "words"),
    [({"model": "00000000000bb"}, "no run of this model"), ({"hidden_head": True}, "hidden layer")],
)
def test_another_model_and_a_hidden_head_withhold_at_once(change, words):
    found = reach(DOMAIN, dataclasses.replace(SEEN, **change))
    assert found.withheld
    assert words in found.reasons[0]
    assert words in found.verdict
    assert found.to_dict() == {"inside": False, "withheld": True, "widening": None, "reasons": list(found.reasons)}


def test_a_hidden_head_that_was_seen_is_no_reason():
    seen = domain_of([SEEN, dataclasses.replace(SEEN, hidden_head=True)], most_rows=1.0, most_classes=4.0)
    assert reach(seen, dataclasses.replace(SEEN, hidden_head=True)).reasons == ()


def test_inside_nothing_is_said():
    found = reach(DOMAIN, SEEN)
    assert (found.doublings, found.reasons, found.verdict, found.widening) == (0.0, (), "", 1.0)
    easier = dataclasses.replace(SEEN, known_rows=800, train_rows=700, longest=9)
    assert reach(DOMAIN, easier).reasons == ()


def test_distances_add_up():
    """Half as far in three directions is too far."""
    k = 2.0**0.5
    change = {"train_rows": int(400 * k), "steps": int(100 * k), "longest": int(50 * k)}
    found = reach(DOMAIN, dataclasses.replace(SEEN, **change))
    assert found.doublings == pytest.approx(1.5, abs=0.05)
    assert found.withheld
    assert len(found.reasons) == 3


@given(st.integers(1, 10**7), st.integers(1, 10**7), st.integers(1, 10**6), st.floats(1e-8, 1.0), st.integers(2, 1000))
def test_farther_is_never_more_certain(known, rows, steps, rate, classes):
    run_ = dataclasses.replace(
        SEEN, known_rows=known, train_rows=max(rows, known), steps=steps, learning_rate=rate, classes=classes
    )
    found = reach(DOMAIN, run_)
    assert found.doublings >= 0.0
    assert bool(found.reasons) == (found.doublings > 0.0)
    more = reach(DOMAIN, dataclasses.replace(run_, train_rows=2 * run_.train_rows))
    assert more.doublings >= found.doublings


@pytest.mark.parametrize("outcome", ["accuracy", "eval_loss"])
def test_the_interval_widens_by_the_rule(outcome):
    calibration = domains.by_hand(DOMAIN, coefficients=(0.0, 0.0))
    inside = apply_calibration(calibration, VALUES, "margin", run=SEEN).levels[outcome]
    away = apply_calibration(calibration, VALUES, "margin", run=dataclasses.replace(SEEN, steps=200)).levels[outcome]
    assert away.value == inside.value
    half = float(student.ppf(0.95, 5)) * 0.4
    assert scale(outcome, inside.high) - scale(outcome, inside.value) == pytest.approx(half)
    assert scale(outcome, away.high) - scale(outcome, away.value) == pytest.approx(half * 2)
    assert scale(outcome, away.value) - scale(outcome, away.low) == pytest.approx(half * 2)


def test_outside_no_training_loss_is_forecast():
    calibration = domains.by_hand(DOMAIN)
    found = apply_calibration(calibration, VALUES, "margin", run=dataclasses.replace(SEEN, steps=150))
    assert set(found.levels) == {"accuracy", "eval_loss"}
    assert found.to_dict()["levels"]["train_loss"] is None
    assert "no training loss" in found.reach.verdict
    assert set(apply_calibration(calibration, VALUES, "margin", run=SEEN).levels) == set(OUTCOMES)


def test_fewer_evaluation_rows_add_their_noise():
    calibration = domains.by_hand(DOMAIN, coefficients=(0.0, 0.0), spread=0.0)
    found = apply_calibration(calibration, VALUES, "margin", run=dataclasses.replace(SEEN, eval_rows=50)).levels
    extra = 1 / 50 - 1 / 300
    quantile = float(student.ppf(0.95, 5))
    accuracy, loss = found["accuracy"], found["eval_loss"]
    wanted = quantile * math.sqrt(extra / (0.8 * 0.2))
    assert scale("accuracy", accuracy.high) - scale("accuracy", accuracy.value) == pytest.approx(wanted)
    assert math.log(loss.high / loss.value) == pytest.approx(quantile * math.sqrt(extra))


def test_withheld_is_no_level_but_an_order():
    calibration = domains.by_hand(DOMAIN)
    far = dataclasses.replace(SEEN, model="00000000000bb")
    good, bad = (
        apply_calibration(calibration, VALUES | {"simulated_accuracy": a}, "margin", run=far) for a in (0.9, 0.7)
    )
    assert good.levels is None
    assert good.to_dict()["levels"] is None
    assert good.key < bad.key
    assert not tied(calibration, good, bad) or tied(calibration, bad, good)


def test_no_term_grows_without_bound():
    """The more a simulated run fits the rows that it sees again, the more was forecast for new rows, without end."""
    calibration = shipped_calibration()
    seen = {}
    for loss in (1e-1, 1e-2, 1e-3, 1e-9):
        for doublings in (4.0, 10.0, 40.0):
            values = VALUES | {"simulated_train_loss": loss, "doublings": doublings, "movement": 5.0}
            found = apply_calibration(calibration, values, "margin").levels
            lines = calibration.lines
            for name in OUTCOMES:
                shift = abs(scale(name, found[name].value) - scale(name, values[f"simulated_{name}"]))
                beta = lines[name].coefficients
                of_probe = abs(beta[0]) * 10.0
                assert shift <= of_probe + abs(beta[1]) * max(map(abs, lines[name].limits)) + 1e-9
            eval_loss = found["eval_loss"].value
            assert eval_loss == seen.setdefault(doublings, eval_loss)  # whatever the training loss
    assert seen[40.0] == pytest.approx(seen[10.0], rel=0.02)  # what is still to come from ever more rows has an end


def test_a_run_that_is_likelier_to_collapse_than_not_has_no_level():
    # a half at a rate of 1 over 100 steps
    risk = Risk(-math.log2(100), 2.0, 1.0, slowest=1e-3, fastest=2.0, shortest=48.0, fine=0.1, runs=40, collapsed=5)
    calibration = dataclasses.replace(domains.by_hand(domains.everywhere("00000000000aa")), risk=risk)

    def said(rate):
        run_ = dataclasses.replace(SEEN, update_rate=rate)
        return apply_calibration(calibration, VALUES, "margin", run=run_)

    assert said(0.99).levels == said(8e-3).levels is not None
    assert said(None).levels == said(0.99).levels  # no adapter, no collapse
    likely = said(1.5)
    assert likely.levels is None
    assert likely.order == said(0.99).order
    assert "76 of 100 runs of 100 steps at a mean learning rate times α of 1.5 collapse" in likely.reach.verdict


def test_a_calibration_that_does_not_say_what_it_has_seen_makes_no_promise():
    calibration = domains.by_hand(None)
    with pytest.raises(ConfigError, match="does not say which runs it has seen"):
        apply_calibration(calibration, VALUES, "margin", run=SEEN)


def of_study(sizes):
    """For each ratio so many runs of each data set, which miss their simulation by so much, this way and that."""
    found = []
    for group in range(4):
        for ratio, (count, error) in sizes.items():
            for number in range(count):
                wrong = error * (1 if number % 2 else -1) + 0.01 * (number - 5)
                values = VALUES | {"doublings": math.log2(ratio)} | domains.best_at_end({"simulated_accuracy": 0.7})
                outcomes = {"train_loss": 0.1 * math.exp(wrong), "eval_loss": 0.4 * math.exp(wrong)}
                p = 1 / (1 + math.exp(-(math.log(0.7 / 0.3) + wrong)))
                run_ = dataclasses.replace(SEEN, train_rows=400 * ratio)
                found.append(Case(values, outcomes | {"accuracy": p}, f"data {group}", run_))
    return found


def test_rows_count_as_seen_only_as_far_as_the_intervals_held():
    held = fit_calibration(of_study({1: (10, 0.1), 2: (10, 0.1), 4: (2, 0.12), 16: (2, 0.1)}), ["margin"], "held")
    assert held.domain.rows_ratio == (1.0, 16.0)
    broken = fit_calibration(of_study({1: (10, 0.1), 2: (10, 0.1), 4: (2, 1.0), 16: (2, 0.1)}), ["margin"], "broken")
    assert broken.domain.rows_ratio == (1.0, 2.0)


def test_a_size_of_few_runs_is_cut_where_the_failure_is_sure_and_where_there_is_next_to_none():
    """One miss in eight is no proof against nine in ten, eight are; two runs prove nothing at all."""

    def reaches(wrong, runs=8):
        study = of_study({1: (10, 0.1), 2: (10, 0.1), 4: (2, 0.1), 16: (10, 0.1)})
        far = [index for index, case in enumerate(study) if case.run.train_rows == 1600]
        for index in far[:wrong]:
            outcomes = {**study[index].outcomes, "accuracy": 1 / (1 + math.exp(-1.8))}  # a logit of 1 more
            study[index] = dataclasses.replace(study[index], outcomes=outcomes)
        kept = [case for index, case in enumerate(study) if index not in far[runs:]]
        return fit_calibration(kept, ["margin"], "x").domain.rows_ratio[1]

    assert reaches(0) == reaches(1) == 16.0
    assert reaches(8) == 2.0
    assert reaches(0, runs=3) == 16.0
    assert reaches(0, runs=2) == 2.0


def test_classes_count_as_seen_only_as_far_as_the_intervals_held():
    def with_classes(cases_):
        kinds = [dataclasses.replace(case.run, classes=case.run.train_rows // 200, train_rows=400) for case in cases_]
        whole = [case.simulated | {"doublings": 0.0} for case in cases_]  # all rows are known
        return [
            dataclasses.replace(case, simulated=values, run=kind)
            for case, values, kind in zip(cases_, whole, kinds, strict=True)
        ]

    sizes = {1: (10, 0.1), 2: (10, 0.1), 4: (2, 0.12), 16: (10, 0.1)}
    assert fit_calibration(with_classes(of_study(sizes)), ["margin"], "held").domain.classes == (2.0, 32.0)
    broken = fit_calibration(with_classes(of_study(sizes | {4: (2, 1.0)})), ["margin"], "broken")
    assert broken.domain.classes == (2.0, 4.0)


def test_a_fit_without_the_kind_of_its_runs_has_no_domain():
    some = of_study({1: (10, 0.1)})
    assert fit_calibration([*some, dataclasses.replace(some[0], run=None)], ["margin"], "x").domain is None


@pytest.mark.parametrize("field", ["steps", "classes", "learning_rate", "eval_rows"])
@pytest.mark.parametrize("value", [[0.0, 1.0], [2.0, 1.0], [1.0], "wide", None, [1.0, math.inf]])
def test_a_domain_of_nonsense_is_refused(field, value):
    content = domains.by_hand(DOMAIN).to_dict()
    content["domain"] = json.loads(json.dumps(content["domain"])) | {field: value}
    with pytest.raises(ConfigError, match="calibration"):
        calibration_from(content)


@given(st.integers(0, 2**52 - 1), st.booleans(), st.integers(1, 10**9))
def test_a_run_survives_being_written_as_numbers(model, hidden, rows):
    run_ = dataclasses.replace(SEEN, model=f"{model:013x}", hidden_head=hidden, train_rows=rows)
    values = {name: float(value) for name, value in run_values(run_).items()}
    assert set(values) == set(RUN)
    assert run_from(values) == run_
    assert run_from(values | {"run_steps": None}) is None


def test_the_fingerprint_is_that_of_the_pretrained_weights(tmp_path):
    torch.manual_seed(1)
    model = cases.bert(2)
    same = fingerprint(model)
    assert len(same) == 13
    assert fingerprint(model.to(torch.bfloat16)) == same
    model = model.float()
    assert fingerprint(ft.place(model, cases.lora("bert"), seed=0)) == same
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    assert fingerprint(model) == same
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] += 1.0
    assert fingerprint(model) != same


def test_a_plan_says_what_kind_of_run_it_makes(place):
    model, dataset, _ = place
    task = ft.load_task(ft.DataConfig(dataset, max_train=50))
    given = ft.load_classifier(model, label_names=task.label_names, seed=0)
    settings = ft.ScoreSettings(samples=20, eval_samples=10, draws=1, max_length=8)
    plan = prepare(given, task, lora_config(given.model, ft.AdapterConfig(("query",))), settings)
    schedule = Schedule(train_rows=50, epochs=2, batch_size=8, learning_rate=1e-2)
    kind = kind_of(plan, schedule)
    longest = max(
        len(given.tokenizer(text)["input_ids"]) for text in np.array(task.train.texts)[plan.sample.train_indices]
    )
    assert kind == Run(
        model=fingerprint(given.model),
        hidden_head=False,
        classes=2,
        known_rows=20,
        train_rows=50,
        eval_rows=10,
        longest=min(longest, 8),
        epochs=2,
        steps=14,
        batch_size=8,
        learning_rate=float(schedule.rates().mean()),
        update_rate=None,
    )
    assert 4e-3 < kind.learning_rate < 6e-3


@pytest.mark.parametrize(("rslora", "factors"), [(False, (8.0, 8.0)), (True, (8.0 * 2**0.5, 8.0 * 4**0.5))])
def test_the_rate_of_an_adapter_is_alpha_times_the_rate_whatever_its_rank(place, rslora, factors):
    model, dataset, _ = place
    task = ft.load_task(ft.DataConfig(dataset))
    given = ft.load_classifier(model, label_names=task.label_names, seed=0)
    config = lora_config(given.model, ft.AdapterConfig(("query",), r=4, alpha=8, rslora=rslora))
    settings = ft.ScoreSettings(samples=20, eval_samples=10, draws=1, reduction="margin")
    held = linearise(prepare(given, task, config, settings))
    alone, *runs = runs_of(SEEN, [held.start([]), held.start([0], 2), held.start([0], 4)])
    assert alone == dataclasses.replace(SEEN, update_rate=alone.update_rate)
    assert [one.update_rate for one in runs] == pytest.approx([1e-3 * factor for factor in factors])


def test_the_shipped_calibration_says_what_it_has_seen():
    shipped = shipped_calibration()
    assert shipped.kind == "classification"
    for domain in filter(None, (shipped.domain, shipped.trial_domain)):
        domain.check()
        assert domain.models
    assert shipped.domain.rows_ratio[0] == 1  # runs of which all rows are known are among its
    assert {line.groups for line in shipped.lines.values()} == {len(shipped.groups)}


# every command that forecasts a run says so


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reach")
    return cases.save(folder / "model"), cases.write_reviews(folder / "reviews"), folder


FEW = ["--samples", "20", "--eval-samples", "10", "--draws", "1"]
RUN_FLAGS = ["--epochs", "1", "--learning-rate", "1e-2", "--train-batch-size", "8"]


def test_rank_shows_the_order_and_the_reason_alone(place, tmp_path, capsys):
    model, dataset, _ = place
    out = tmp_path / "out"
    tokens = ["rank", "--model", model, "--dataset", dataset, *FEW, *RUN_FLAGS, "--finalists", "3"]
    assert run([*tokens, "--output", str(out)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "no run of this model" in printed
    assert "withheld" in printed
    held = json.loads((out / "result.json").read_text(encoding="utf-8"))["rankings"][0]
    assert held["head_alone"] is None
    assert any("no run of this model" in note for note in held["notes"])
    for row in held["rows"]:
        assert row["forecast"] is None
        assert row["simulated"] is None
        assert row["reach"]["withheld"]
    with (out / "ranking.csv").open(encoding="utf-8", newline="") as file:
        first = next(csv.DictReader(file))
    assert {first[f"accuracy{end}"] for end in ("", "_low", "_high")} == {""}


def test_a_curve_is_withheld_with_its_reason(place, tmp_path, capsys):
    model, dataset, _ = place
    out = tmp_path / "out"
    tokens = ["forecast", "--model", model, "--dataset", dataset, *FEW[:4], "--target-modules", "query"]
    assert run([*tokens, *RUN_FLAGS, "--output", str(out)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "No level is forecast" in printed
    assert "Forecast of the run, 90% intervals" not in printed
    curve = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert curve["points"] is None
    assert curve["end"] is None
    assert curve["reach"]["withheld"]
    assert "no run of this model" in curve["note"]
    assert not (out / "curve.csv").exists()
    assert any("no run of this model" in note for note in curve["notes"])
    assert any("foretune rank" in note for note in curve["notes"])  # the order is left to it
    # a run beside it has nothing to draw; the ledger notes that there was no level
    assert (
        run(["tune", "--config", str(out / "config.yaml"), "--forecast", str(out), "--output", str(tmp_path / "t")])
        == 0
    )
    assert "withheld" in capsys.readouterr().err
    (out / "result.json").unlink()
    assert run(["tune", "--config", str(out / "config.yaml"), "--forecast", str(out), "--output", "u"]) == 2
    assert "withheld" in capsys.readouterr().err


def test_a_widened_forecast_says_by_how_much(place, tmp_path, capsys):
    model, dataset, folder = place
    calibration = Path(domains.write(folder / "calibration.json", model))
    content = json.loads(calibration.read_text(encoding="utf-8"))
    content["domain"]["steps"] = [1.0, 4.0]  # the run has 8 of them
    calibration.write_text(json.dumps(content), encoding="utf-8")
    tokens = ["--model", model, "--dataset", dataset, *FEW[:4], *RUN_FLAGS, "--calibration", str(calibration)]
    assert run(["rank", *tokens, "--finalists", "2", "--json"]) == 0
    held = json.loads(capsys.readouterr().out)["rankings"][0]
    for row in held["rows"]:
        assert row["reach"]["widening"] == pytest.approx(2.0)
        assert row["forecast"]["train_loss"] is None
        assert row["forecast"]["accuracy"]["low"] < row["forecast"]["accuracy"]["high"]
    assert any("2 times as wide" in note and "8 steps" in note for note in held["notes"])
    scored = tmp_path / "scored"
    assert run(["forecast", *tokens, "--target-modules", "query", "--output", str(scored)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 times as wide" in printed
    assert "Forecast of the run, 90% intervals" in printed
    # the curves of evaluation loss and accuracy are drawn, beside a fine-tune too
    assert all(point.train_loss is None for point in read_curve(scored / "curve.csv"))
    tune = ["tune", "--config", str(scored / "config.yaml"), "--forecast", str(scored)]
    assert run([*tune, "--output", str(tmp_path / "tuned")]) == 0
    assert (tmp_path / "tuned" / "loss.png").exists()


def test_python_says_so_too(place):
    model, dataset, _ = place
    task = ft.load_task(ft.DataConfig(str(dataset)))
    given = ft.load_classifier(str(model), label_names=task.label_names, seed=0)
    settings = ft.RankSettings(
        target_modules=("query",),
        finalists=2,
        samples=20,
        eval_samples=10,
        draws=1,
        epochs=1,
        learning_rate=1e-2,
        train_batch_size=8,
    )
    ranking = ft.rank(given.model, given.tokenizer, task, settings=settings)
    assert all(row.forecast is None and row.said.reach.withheld for row in ranking.rows)
    assert any("no run of this model" in note for note in ranking.notes)
