import csv
import dataclasses
import json
import math

import pytest

import foretune as ft
from foretune.forecasting.files import save_sequence_forecast
from foretune.forecasting.reach import INSIDE
from foretune.forecasting.schedule import schedule_of
from foretune.forecasting.sequence_calibration import grown
from foretune.forecasting.sequence_forecast import forecast_sequences
from foretune.forecasting.sequence_levels import levels_of, speed_of
from foretune.forecasting.sequence_simulation import linearise_sequences, n_passed, simulate_sequences
from foretune.forecasting.shown import Shown
from foretune.models.identity import fingerprint
from foretune.models.placement import lora_config
from foretune.sequence_plan import prepare_sequences
from foretune.settings.commands import ForecastSettings
from foretune.settings.groups import AdapterConfig

import sequences as made

SETTINGS = ForecastSettings(
    samples=12,
    eval_samples=6,
    epochs=2,
    learning_rate=1e-3,
    train_batch_size=4,
    max_length=16,
    batch_size=3,
    rows=(8, 12, 24, 48),
)


@pytest.fixture(scope="module")
def plan():
    language = made.reader()
    task = ft.language_task_from_datasets(made.texts(24), made.texts(8, offset=1))
    config = lora_config(language.model, AdapterConfig(("all-linear",), alpha=16, r=4))
    return prepare_sequences(language, task, config, SETTINGS)


@pytest.fixture(scope="module")
def calibration(plan):
    return made.calibration(fingerprint(plan.placed))


@pytest.fixture(scope="module")
def result(plan, calibration):
    return forecast_sequences(plan, SETTINGS, calibration=calibration)


def test_the_level_is_that_of_the_run_on_the_known_rows_and_of_what_more_rows_bring(plan, calibration, result):
    linearised = linearise_sequences(plan, 2 * 10**9)
    start = linearised.start(range(len(linearised.sites)))
    (run,) = simulate_sequences(plan, linearised, [start], schedule_of(SETTINGS, 12, seed=0))
    losses = run.run.trajectory.eval_loss
    third = losses[0] + (losses[1] - losses[0]) * 2 / 3  # of six steps the second; it is looked at after three
    gain = max(losses[0] - losses[-1], 1.5 * (losses[0] - third))
    expected = losses[0] - grown(losses[0], gain, 0.2)  # 24 rows are a doubling of 12
    level = result.curve.end["eval_loss"]
    assert level.value == pytest.approx(expected, abs=1e-5)
    assert result.curve.forecast.reach == INSIDE
    assert level.low < level.value < level.high
    said = result.to_dict()
    assert said["end"]["eval_loss"]["value"] == pytest.approx(expected, abs=1e-5)
    assert said["end"]["train_loss"] is None
    assert said["calibration"] == "made"
    assert said["steps"] == said["points"][-1]["step"] == 12
    assert said["points"][-1]["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert said["points"][0]["eval_loss"] == pytest.approx(losses[0], abs=1e-5)
    assert "The run on the 12 known rows is simulated, of 24" in said["notes"][-1]


def test_what_may_go_wrong_is_told_with_its_probability(result):
    no_effect, worse = result.curve.cautions
    assert (no_effect.trouble, worse.trouble) == ("no effect", "worse")
    assert 0.0 <= no_effect.probability <= 1.0
    assert no_effect.probability + worse.probability <= 1.0 + 1e-12


def test_a_run_that_hardly_moves_is_told(plan, calibration):
    slow = forecast_sequences(
        plan, dataclasses.replace(SETTINGS, learning_rate=2e-5, rows=None), calibration=calibration
    )
    no_effect, worse = slow.curve.cautions
    assert no_effect.probability > 0.8
    assert "without training" in no_effect.sentence
    assert worse.probability < 0.1


def test_rows_are_forecast_from_as_many_as_are_known(plan, calibration, result):
    points = result.rows.points
    assert [point.rows for point in points] == [8, 12, 24, 48]
    assert points[2].forecast.levels == result.curve.end
    linearised = linearise_sequences(plan, 2 * 10**9)
    start = linearised.start(range(len(linearised.sites)))
    levels = levels_of(plan, calibration)
    for number, point in zip((8, 12, 24, 48), points, strict=True):
        schedule = schedule_of(SETTINGS, min(12, number), seed=0)
        (run,) = simulate_sequences(plan, linearised, [start], schedule)
        expected = levels.forecast(run, levels.run(SETTINGS, number, speed_of(start)))
        assert point.forecast.levels["eval_loss"].value == pytest.approx(expected.levels["eval_loss"].value, abs=1e-5)
    assert result.rows.sentence
    passed = []
    forecast_sequences(plan, SETTINGS, calibration=calibration, on_batch=passed.append)
    assert sum(passed) == n_passed(plan, SETTINGS)


def test_a_run_on_fewer_rows_than_are_known_sees_the_first_of_them(plan):
    """Whatever the other known rows hold, it is the same."""
    linearised = linearise_sequences(plan, 2 * 10**9)
    start = linearised.start(range(len(linearised.sites)))
    schedule = schedule_of(SETTINGS, 8, seed=0)
    (run,) = simulate_sequences(plan, linearised, [start], schedule)
    sketches = linearised.train.sketches
    wiped = tuple(torch_zeros_from(part, 8) for part in sketches.sketches)
    other = dataclasses.replace(
        linearised,
        train=dataclasses.replace(linearised.train, sketches=dataclasses.replace(sketches, sketches=wiped)),
    )
    (again,) = simulate_sequences(plan, other, [start], schedule)
    assert again.run.trajectory.eval_loss == pytest.approx(run.run.trajectory.eval_loss, rel=1e-6)


def torch_zeros_from(part, row):
    wiped = part.clone()
    wiped[row:] = 0.0
    return wiped


def test_a_trial_is_the_level_where_it_counts(plan, calibration):
    trial = Shown(12, 0, 6, {"eval_loss": 1.5, "perplexity": math.exp(1.5)}, math.exp(1.5), 2, diverged=False)
    with_trial = forecast_sequences(
        plan, dataclasses.replace(SETTINGS, rows=None), calibration=calibration, shown=[trial]
    )
    base = with_trial.base.loss
    expected = base - grown(base, base - 1.5, 0.2)  # trust 1 and 12 of 24 rows: nothing but the trial
    assert with_trial.curve.end["eval_loss"].value == pytest.approx(expected, abs=1e-6)


def test_the_files_hold_the_course_and_the_rows(plan, result, tmp_path):
    save_sequence_forecast(result, tmp_path / "run")
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"result.json", "curve.csv", "curve.png", "rows.csv", "rows.png"} <= files
    with (tmp_path / "run" / "rows.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["rows"] for line in lines] == ["8", "12", "24", "48"]
    assert all(float(line["eval_loss_low"]) < float(line["eval_loss"]) for line in lines)
    assert json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))["rows"]["points"]
