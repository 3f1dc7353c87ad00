"""The forecast over training rows: `foretune forecast --rows`."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import foretune as ft
from foretune.cli import run
from foretune.forecasting.calibration import Interval, RunForecast
from foretune.forecasting.curve import linearise_run
from foretune.forecasting.forecast import prepare_forecast, run_forecast
from foretune.forecasting.reach import INSIDE, Reach
from foretune.forecasting.rows import RowsPoint, rows_curve
from foretune.models.identity import fingerprint
from foretune.models.placement import lora_config

import cases
import domains

FEW = ["--samples", "20", "--eval-samples", "10", "--target-modules", "query", "value"]
RUN = ["--epochs", "2", "--learning-rate", "2e-2", "--train-batch-size", "8"]
SETTINGS = ft.ForecastSettings(samples=20, eval_samples=10, epochs=2, learning_rate=2e-2, train_batch_size=8)
FAR = RunForecast(None, (float("nan"),) * 2, Reach(3.0, ("too many steps",)))
PERFECT = Interval(0.5, 0.5, 0.5)


def at(rows, value, half=0.0, kind="classification"):
    name = {"classification": "accuracy", "regression": "spearman"}[kind]
    levels = {name: Interval(value, value - half, value + half), "eval_loss": PERFECT, "train_loss": PERFECT}
    return RowsPoint(rows, RunForecast(levels, (value, 0.5), INSIDE, kind))


def curve_of(rows, values, **options):
    return rows_curve([at(n, value, **options) for n, value in zip(rows, values, strict=True)])


def test_from_where_more_rows_gain_less_than_a_point():
    curve = curve_of([500, 1000, 2000, 4000, 8000], [0.70, 0.75, 0.78, 0.785, 0.786])
    assert curve.enough == 2000
    assert curve.sentence == "From 2,000 rows on, twice as many gain less than a point of accuracy."


def test_a_list_without_doublings_is_read_in_between():
    """2,000 to 5,000 gains 1.3 points in 1.32 doublings, 0.98 in one."""
    curve = curve_of([1000, 2000, 5000, 10_000], [0.70, 0.75, 0.763, 0.772])
    assert curve.enough == 2000
    assert curve_of([1000, 2000, 5000, 10_000], [0.70, 0.75, 0.764, 0.772]).enough == 5000


def test_gains_at_the_end_of_the_list():
    curve = curve_of([500, 1000, 2000], [0.60, 0.70, 0.723])
    assert curve.enough is None
    assert "the last doubling, to 2,000 rows, gains 2.3 points" in curve.sentence
    late = curve_of([1000, 1490, 2970], [0.60, 0.65, 0.651])
    assert late.enough is None
    assert "though" in late.sentence


def test_noise_is_no_gain_and_no_loss():
    """A value that falls is pooled with the one before it: from 500 to 1,000 rows less than a point is gained."""
    assert curve_of([500, 1000, 2000], [0.700, 0.690, 0.700]).enough == 500
    falling = curve_of([500, 1000, 2000], [0.75, 0.72, 0.70])
    assert falling.enough == 500
    dip = curve_of([500, 1000, 2000, 4000], [0.60, 0.80, 0.70, 0.80])
    assert dip.enough is None  # 0.60, 0.75, 0.75, 0.80
    assert "gains 5.0 points" in dip.sentence


def test_a_band_wider_than_the_gain_is_said():
    wide = curve_of([500, 1000], [0.70, 0.72], half=0.05)
    assert wide.sentence.endswith(
        "The 90% band at 1,000 rows, 10.0 points wide, is wider than the gain from 500 rows to there, 2.0 points."
    )
    assert "band" not in curve_of([500, 1000], [0.70, 0.72], half=0.009).sentence


def test_correlations_are_no_points():
    curve = curve_of([500, 1000, 2000], [0.50, 0.60, 0.61], kind="regression", half=0.2)
    assert curve.enough is None
    assert "gains 0.010 of Spearman correlation" in curve.sentence
    enough = curve_of([500, 1000, 2000], [0.60, 0.60, 0.605], kind="regression")
    assert enough.sentence.startswith("From 500 rows on, twice as many gain less than 0.01 of Spearman")


def test_what_is_withheld():
    points = [at(500, 0.7), at(1000, 0.705), RowsPoint(2000, FAR), RowsPoint(5000, FAR)]
    curve = rows_curve(points)
    assert curve.enough == 500
    assert curve.sentence.endswith("No level is forecast for 2,000 and 5,000 rows.")
    assert rows_curve([RowsPoint(9, FAR)]).enough is None
    assert "any of these" in rows_curve([RowsPoint(9, FAR)]).sentence
    short = rows_curve([at(1000, 0.7), at(1500, 0.7), RowsPoint(3000, FAR)])
    assert short.enough is None
    assert "hold no doubling" in short.sentence
    assert "1,000 to 2,000" in short.sentence


def most_gain(rows, values, start):
    """By hand: the best pooled rise at every point of a fine grid."""
    risen = [
        max(min(np.mean(values[low : high + 1]) for high in range(k, len(values))) for low in range(k + 1))
        for k in range(len(values))
    ]
    logs = np.log2(rows)
    grid = np.union1d(np.linspace(np.log2(start), logs[-1] - 1, 4000), [*logs, *(logs - 1)])
    grid = grid[(grid >= np.log2(start) - 1e-12) & (grid <= logs[-1] - 1 + 1e-12)]
    gains = np.interp(grid + 1, logs, risen) - np.interp(grid, logs, risen)
    return gains.max() if len(gains) else np.inf


@given(st.lists(st.tuples(st.integers(2, 4000), st.floats(0.3, 0.4)), min_size=1, max_size=7, unique_by=lambda x: x[0]))
def test_enough_is_what_its_words_say(pairs):
    rows, values = zip(*sorted(pairs), strict=True)
    gains = [most_gain(rows, values, start) for start in rows]
    if any(abs(gain - 0.01) < 1e-9 for gain in gains):
        return
    assert curve_of(rows, values).enough == next((n for n, g in zip(rows, gains, strict=True) if g < 0.01), None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    domains.write(folder / "calibration.json", cases.save(folder / "model"))
    return str(folder / "model"), cases.write_reviews(folder / "reviews"), folder


@pytest.fixture(scope="module")
def plan(place):
    model, dataset, _ = place
    task = ft.load_task(ft.DataConfig(dataset))
    classifier = ft.load_classifier(model, label_names=task.label_names, seed=0)
    lora = lora_config(classifier.model, ft.AdapterConfig(("query", "value")))
    return prepare_forecast(classifier, task, lora, SETTINGS)


def calibration_of(plan, **spans):
    return domains.by_hand(dataclasses.replace(domains.everywhere(fingerprint(plan.placed)), **spans))


def listing(*rows):
    return dataclasses.replace(SETTINGS, rows=rows)


@pytest.fixture(scope="module")
def forecast(place):
    model, dataset, folder = place
    out = folder / "forecast"
    tokens = ["--model", model, "--dataset", dataset, *FEW, *RUN, "--rows", "10", "30", "60", "240"]
    tokens += ["--calibration", str(folder / "calibration.json")]
    assert run(["forecast", *tokens, "--output", str(out)]) == 0
    return out


def test_the_files_of_a_forecast_over_rows(forecast):
    result = json.loads((forecast / "result.json").read_text(encoding="utf-8"))
    points = result["rows"]["points"]
    assert [point["rows"] for point in points] == [10, 30, 60, 240]
    assert points[2]["levels"] == result["end"]  # the run's own
    assert (forecast / "rows.png").read_bytes().startswith(b"\x89PNG")
    with (forecast / "rows.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    for line, point in zip(lines, points, strict=True):
        assert int(line["rows"]) == point["rows"]
        assert line["withheld"] == ""
        for name in ("train_loss", "eval_loss", "accuracy"):
            ends = {f"{name}{part}": point["levels"][name][end] for part, end in
                    (("", "value"), ("_low", "low"), ("_high", "high"))}  # fmt: skip
            assert {column: float(line[column]) for column in ends} == pytest.approx(ends, rel=1e-5)


def test_it_is_replayed(forecast, tmp_path):
    assert yaml.safe_load((forecast / "config.yaml").read_text(encoding="utf-8"))["rows"] == [10, 30, 60, 240]
    assert run(["forecast", "--config", str(forecast / "config.yaml"), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "rows.csv").read_text() == (forecast / "rows.csv").read_text()
    assert (tmp_path / "again" / "rows.png").read_bytes() == (forecast / "rows.png").read_bytes()


def test_the_list_changes_nothing_else(plan):
    alone = run_forecast(plan, SETTINGS, calibration_of(plan))
    both = run_forecast(plan, listing(30, 120), calibration_of(plan))
    assert alone.rows is None
    assert alone.to_dict()["rows"] is None
    assert both.curve == alone.curve


def test_each_point_is_the_forecast_of_a_run_of_so_many_rows(plan, place):
    """More rows than known, and as many as are known: as if the data set had so many."""
    _, dataset, _ = place
    found = run_forecast(plan, listing(20, 40), calibration_of(plan)).rows
    for n_rows, point in zip((20, 40), found.points, strict=True):
        few = ft.load_task(ft.DataConfig(dataset))
        keep = [int(row) for row in plan.sample.train_indices]
        keep += [row for row in range(len(few.train.labels)) if row not in keep]
        fewer = dataclasses.replace(plan, sample=dataclasses.replace(plan.sample, training=np.sort(keep[:n_rows])))
        said = run_forecast(fewer, SETTINGS, calibration_of(plan)).curve.forecast
        assert point.forecast.reach == said.reach
        for name, interval in said.levels.items():
            assert point.forecast.levels[name].value == pytest.approx(interval.value, rel=1e-4), name


def test_fewer_rows_than_known_are_that_many(plan, monkeypatch):
    """A run on 8 rows sees 8, not all that are known."""
    import foretune.forecasting.rows as module

    seen = []
    whole = module.simulate_runs

    def watch(linearised, starts, schedule, **options):
        seen.append((linearised.train.factors.n, schedule.train_rows))
        return whole(linearised, starts, schedule, **options)

    monkeypatch.setattr(module, "simulate_runs", watch)
    run_forecast(plan, listing(8, 60, 100), calibration_of(plan))
    assert seen == [(8, 8), (20, 100)]


def test_one_pass_for_all_and_every_step_counted(plan, monkeypatch):
    passes, steps = [], []

    def once(of):
        passes.append(1)
        return linearise_run(of)

    monkeypatch.setattr("foretune.forecasting.forecast.linearise_run", once)
    run_forecast(plan, listing(10, 60, 100), calibration_of(plan), on_step=lambda *told: steps.append(told))
    total = 16 + 2 * 2 + 2 * 13  # the run's own 60 rows once
    assert steps == [(done, total) for done in range(1, total + 1)]
    assert len(passes) == 1


def test_rows_out_of_reach_are_withheld_before_the_work(plan, monkeypatch):
    calibration = calibration_of(plan, rows_ratio=(1.0, 3.0), steps=(14.0, 17.0))
    steps = []
    found = run_forecast(plan, listing(4, 60, 100, 1000), calibration, on_step=lambda *told: steps.append(told))
    assert [point.forecast.levels is None for point in found.rows.points] == [True, False, True, True]
    assert steps[-1] == (16, 16)
    assert "1,000 training rows" in found.to_dict()["rows"]["points"][3]["reach"]["reasons"][0]
    nothing = calibration_of(plan, models=("another",))
    monkeypatch.setattr("foretune.forecasting.forecast.linearise_run", lambda _: pytest.fail("a pass for nothing"))
    found = run_forecast(plan, listing(60, 100), nothing)
    assert found.rows.enough is None
    assert "No level is forecast" in found.rows.sentence
    assert found.curve.verdicts == ()


def test_a_list_that_reaches_where_the_run_does_not(plan):
    """The run itself is withheld, a smaller one is not."""
    found = run_forecast(plan, listing(20, 40), calibration_of(plan, rows_ratio=(1.0, 1.2)))
    assert found.curve.forecast.levels is None
    own, twice = found.rows.points
    assert own.forecast.levels is not None
    assert "train_loss" not in twice.forecast.levels  # widened


def test_all_withheld_is_no_fault(place, tmp_path, capsys):
    """The calibration that comes with foretune has not seen this model."""
    model, dataset, _ = place
    out = tmp_path / "out"
    tokens = ["--model", model, "--dataset", dataset, *FEW, *RUN, "--rows", "30", "120", "--output", str(out)]
    assert run(["forecast", *tokens]) == 0
    said = capsys.readouterr().out
    assert "withheld" in said
    assert "no run of this model" in said
    assert not (out / "rows.png").exists()
    with (out / "rows.csv").open(encoding="utf-8") as file:
        assert all("no run of this model" in line["withheld"] for line in csv.DictReader(file))


def test_the_terminal_says_it(place, capsys):
    model, dataset, folder = place
    tokens = ["--model", model, "--dataset", dataset, *FEW, *RUN, "--rows", "30", "240"]
    assert run(["forecast", *tokens, "--calibration", str(folder / "calibration.json")]) == 0
    said = capsys.readouterr().out
    for words in ("Forecast over training rows", "240", "of 100 runs like this beat the linear probe"):
        assert words in said


def test_go_or_not_is_in_the_result(forecast, plan):
    result = json.loads((forecast / "result.json").read_text(encoding="utf-8"))
    against = [verdict["against"] for verdict in result["verdicts"]]
    assert against == ["the majority class", "the head alone", "the linear probe"]
    curve = run_forecast(plan, SETTINGS, calibration_of(plan)).curve
    labels = plan.evaluation_split.labels[plan.sample.eval_indices]
    majority = np.bincount(labels).max() / len(labels)
    assert curve.verdicts[0].threshold == pytest.approx(majority + 0.02)
    assert all(0.0 <= verdict.probability <= 1.0 for verdict in curve.verdicts)


@pytest.mark.parametrize(
    ("rows", "words"),
    [(["1"], "at least 2"), (["30", "20"], "rise"), (["20", "20"], "rise"), (["x"], "rows"),
     ([str(n) for n in range(2, 20)], "1 to 12")],
)  # fmt: skip
def test_wrong_lists(rows, words, place, capsys):
    model, dataset, _ = place
    assert run(["forecast", "--model", model, "--dataset", dataset, *FEW, "--rows", *rows]) == 2
    assert words in capsys.readouterr().err
