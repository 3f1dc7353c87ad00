import dataclasses
import json
import math

import pytest
import torch

import foretune as ft
from foretune.errors import DataError
from foretune.forecasting.schedule import Schedule
from foretune.forecasting.seal import is_unaltered
from foretune.forecasting.sequence_forecast import forecast_sequences
from foretune.forecasting.sequence_simulation import (
    linearise_sequences,
    measure_sequences,
    n_passed,
    plug_steps,
    simulate_sequences,
)
from foretune.models.placement import lora_config
from foretune.models.plugged import plugged_in
from foretune.sequence_plan import prepare_sequences, sequence_batches
from foretune.settings.commands import ForecastSettings
from foretune.settings.groups import AdapterConfig

import sequences as made

SETTINGS = ForecastSettings(
    samples=12, eval_samples=6, epochs=2, learning_rate=1e-3, train_batch_size=4, max_length=16, batch_size=3
)


@pytest.fixture(scope="module")
def language():
    return made.reader()


@pytest.fixture(scope="module")
def task():
    return ft.language_task_from_datasets(made.texts(20), made.texts(8, offset=1))


def plan_of(language, task, settings=SETTINGS, adapter=None):
    config = lora_config(language.model, adapter or AdapterConfig(("all-linear",), alpha=16, r=4))
    return prepare_sequences(language, task, config, settings)


@pytest.fixture(scope="module")
def forecast(language, task):
    return forecast_sequences(plan_of(language, task), SETTINGS)


def mean_loss(model, batches):
    total, count = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            logits = model(**batch.inputs).logits[:, :-1].flatten(0, 1).double()
        labels = batch.labels[:, 1:].flatten()
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def test_it_begins_where_the_model_is_and_ends_at_the_model_with_the_simulated_adapter(language, task):
    plan = plan_of(language, task)
    linearised = linearise_sequences(plan, 10**9)
    schedule = Schedule(train_rows=plan.train_rows, epochs=2, batch_size=4, learning_rate=1e-3)
    (run,) = simulate_sequences(plan, linearised, [linearised.start(range(len(linearised.sites)))], schedule)
    batches = list(sequence_batches(plan, plan.rows.evaluation))
    assert run.run.trajectory.eval_loss[0] == pytest.approx(mean_loss(language.model, batches), abs=1e-5)
    assert run.run.trajectory.eval_metric[0] == pytest.approx(math.exp(run.run.trajectory.eval_loss[0]), rel=1e-9)
    assert run.run.end.eval_loss < run.run.probe_loss
    assert run.run.end.eval_loss == pytest.approx(run.linear_loss, abs=0.2 * (run.run.probe_loss - run.linear_loss))
    assert len(run.token_accuracy) == len(run.run.trajectory.steps) == 1 + len(plug_steps(schedule))


def test_a_plugged_adapter_is_the_change_of_the_weights_and_leaves_no_trace(language, task):
    plan = plan_of(language, task)
    before = {name: value.clone() for name, value in plan.placed.state_dict().items()}
    sites = plan.adapted.sites[:3]
    generator = torch.Generator().manual_seed(0)
    weights = {
        site.name: (
            torch.randn(2, site.d_in, generator=generator),
            0.1 * torch.randn(site.d_out, 2, generator=generator),
        )
        for site in sites
    }
    with plugged_in(plan.placed, weights):
        plugged = measure_sequences(plan).loss
    merged = made.tiny_language_model(torch.float32, vocabulary=len(language.tokenizer))
    with torch.no_grad():
        for name, (a, scaled_b) in weights.items():
            merged.get_submodule(name).weight += scaled_b @ a
    assert plugged == pytest.approx(mean_loss(merged, sequence_batches(plan, plan.rows.evaluation)), abs=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in plan.placed.state_dict().items())


def test_at_a_small_rate_it_is_the_real_run(language, task):
    """The whole chain, data to loss, against the Trainer."""
    settings = dataclasses.replace(SETTINGS, samples=20, learning_rate=2e-4)
    forecast = forecast_sequences(plan_of(language, task, settings), settings)
    recipe = {name: getattr(settings, name) for name in ("epochs", "learning_rate", "train_batch_size", "max_length")}
    config = lora_config(language.model, AdapterConfig(("all-linear",), alpha=16, r=4))
    real = ft.tune(
        language.model, language.tokenizer, config, task, settings=ft.TuneSettings(eval_samples=6, **recipe)
    ).to_dict()
    change = real["final"]["eval_loss"] - real["before_training"]["eval_loss"]
    assert forecast.run.run.probe_loss == pytest.approx(real["before_training"]["eval_loss"], abs=1e-5)
    assert forecast.run.run.end.eval_loss == pytest.approx(real["final"]["eval_loss"], abs=0.15 * abs(change))
    assert forecast.to_dict()["train_rows"] == real["details"]["data"]["train_rows"]
    assert forecast.to_dict()["steps"] == real["steps"]
    assert forecast.to_dict()["weights"] == real["details"]["weights"]


def test_the_result_says_that_it_is_not_calibrated(forecast):
    said = forecast.to_dict()
    assert said["end"] is None
    assert said["points"] is None
    assert said["simulated"][0]["eval_loss"] == pytest.approx(said["base"]["eval_loss"])
    assert said["simulated"][-1]["eval_loss"] == pytest.approx(said["simulated_end"]["eval_loss"])
    assert "the calibration has seen no run of this model" in said["notes"][0]
    assert any("12 known rows is simulated, of 20" in note for note in said["notes"])
    assert said["cautions"] == []
    assert 0.9 < said["sketches"]["kept"] <= 1.0 + 1e-6
    assert said["details"]["objective"]["kind"] == "causal-lm"
    assert is_unaltered(json.loads(json.dumps(said)))


def test_a_run_that_leaves_its_linearisation_says_so(language, task):
    settings = dataclasses.replace(SETTINGS, learning_rate=0.1)
    wild = forecast_sequences(plan_of(language, task, settings), settings)
    assert any("leaves the ground" in note for note in wild.to_dict()["notes"])


def test_a_smaller_rank_and_fewer_modules_are_taken_out_of_one_pass(language, task):
    plan = plan_of(language, task)
    linearised = linearise_sequences(plan, 10**9)
    schedule = Schedule(train_rows=plan.train_rows, epochs=1, batch_size=4, learning_rate=1e-3)
    starts = [linearised.start(range(len(linearised.sites))), linearised.start([0, 3], rank=2)]
    together = simulate_sequences(plan, linearised, starts, schedule)
    for start, run in zip(starts, together, strict=True):
        (alone,) = simulate_sequences(plan, linearised, [start], schedule)
        assert run.run.trajectory.eval_loss == pytest.approx(alone.run.trajectory.eval_loss, rel=1e-5)
    assert together[0].run.end.eval_loss < together[1].run.end.eval_loss


def test_sequences_that_pass_are_counted(language, task):
    plan, passed = plan_of(language, task), []
    forecast_sequences(plan, SETTINGS, on_batch=passed.append)
    assert sum(passed) == n_passed(plan, SETTINGS)


@pytest.mark.parametrize(
    ("epochs", "rows_", "steps"), [(3, 8, (2, 4, 6)), (1, 40, (2, 4, 6, 8, 10)), (9, 4, (2, 4, 5, 7, 9)), (1, 4, (1,))]
)
def test_it_is_plugged_in_after_epochs_or_five_times(epochs, rows_, steps):
    assert plug_steps(Schedule(train_rows=rows_, epochs=epochs, batch_size=4, learning_rate=1e-3)) == steps


def test_one_row_is_too_few(language):
    task = ft.language_task_from_datasets(made.texts(1), made.texts(2))
    with pytest.raises(DataError, match="a forecast needs 2"):
        plan_of(language, task)
