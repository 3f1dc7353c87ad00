"""The figures of a run show the numbers of its history and of its forecast."""

import numpy as np
import pytest

import drawn
import foretune.report.curve_figure as curve_figure_module
from foretune.report.curve_figure import Caption, curve_figure, loss_figure
from foretune.report.curves import CurvePoint, Epoch, History, Step, running_mean

STEPS = tuple(Step(number, 1.0 / number, 0.1, None, 0.0) for number in range(1, 41))
EPOCHS = (
    Epoch(0, 0, None, None, None, 0.9, {"accuracy": 0.5}, 0.0),
    Epoch(1, 20, 0.5, 0.45, 0.7, 0.6, {"accuracy": 0.65}, 1.0),
    Epoch(2, 40, 0.3, 0.25, 0.8, 0.55, {"accuracy": 0.75}, 2.0),
)
FORECAST = (CurvePoint(0, None, 0.88, 0.52), CurvePoint(20, 0.5, 0.62, 0.6), CurvePoint(40, 0.35, 0.5, 0.7))


@pytest.fixture
def figures(monkeypatch):
    saved = []
    monkeypatch.setattr(curve_figure_module, "save_drawing", lambda figure, path: saved.append(figure))
    return saved


def check_forecast(losses, accuracy):
    assert drawn.lines(losses)["train, forecast"][0] == pytest.approx(np.array([(20, 0.5), (40, 0.35)]))
    assert drawn.lines(losses)["evaluation, forecast"][0] == pytest.approx(np.array([(0, 0.88), (20, 0.62), (40, 0.5)]))
    (points,) = (line for same in drawn.lines(accuracy).values() for line in same if line[0, 1] == 0.52)
    assert points == pytest.approx(np.array([(0, 0.52), (20, 0.6), (40, 0.7)]))


def test_the_figure_of_a_run_shows_its_history(figures, tmp_path):
    loss_figure(
        History(STEPS, EPOCHS, 2.0, 1.0, ("accuracy",)),
        Caption("a run", "nats", "accuracy"),
        tmp_path / "loss.png",
        forecast=FORECAST,
    )
    losses, accuracy = figures[0].axes
    lines = drawn.lines(losses)
    assert lines["train, by step"][0] == pytest.approx(np.array([(s.step, s.loss) for s in STEPS]))
    means = [(s.step, np.nan if m is None else m) for s, m in zip(STEPS, running_mean(STEPS, window=2), strict=True)]
    assert lines["train, mean of 2 steps"][0] == pytest.approx(np.array(means), nan_ok=True)
    assert lines["train, eval mode"][0] == pytest.approx(np.array([(20, 0.45), (40, 0.25)]))
    assert lines["evaluation"][0] == pytest.approx(np.array([(0, 0.9), (20, 0.6), (40, 0.55)]))
    assert drawn.lines(accuracy)["evaluation"][0] == pytest.approx(np.array([(0, 0.5), (20, 0.65), (40, 0.75)]))
    assert drawn.lines(accuracy)["train, eval mode"][0] == pytest.approx(np.array([(20, 0.7), (40, 0.8)]))
    check_forecast(losses, accuracy)
    assert losses.get_title() == "a run"


def test_the_figure_of_a_forecast_shows_it_alone(figures, tmp_path):
    curve_figure(FORECAST, Caption("a forecast", "nats", "accuracy"), tmp_path / "curve.png")
    losses, accuracy = figures[0].axes
    assert len(losses.lines) == 2
    check_forecast(losses, accuracy)


def test_a_run_without_steps_is_drawn(figures, tmp_path):
    loss_figure(
        History((), EPOCHS[:1], 0.0, 1.0, ("accuracy",)),
        Caption("nothing yet", "nats", "accuracy"),
        tmp_path / "loss.png",
    )
    losses, _ = figures[0].axes
    assert list(drawn.lines(losses)) == ["evaluation"]
