"""Figure of a fine-tune: losses over steps, accuracy over epochs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from foretune.report.curves import CurvePoint, Epoch, History, running_mean
from foretune.report.drawing import save_drawing
from foretune.report.texts import for_figure


def loss_figure(history: History, title: str, path: Path, *, forecast: Sequence[CurvePoint] = ()) -> None:
    """Draw the training loss over steps, its running mean, both losses after each epoch, and the accuracy.

    Args:
        history: Course of the run.
        title: Title.
        path: File to write; its suffix gives the format.
        forecast: What was forecast, drawn behind it in dashes.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    losses, accuracy = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    steps, epochs = history.steps, history.epochs
    if steps:
        numbers = [record.step for record in steps]
        losses.plot(numbers, [record.loss for record in steps], color="0.75", linewidth=0.8, label="train, by step")
        window = max(1, numbers[-1] // 20)
        means = running_mean(steps, window=window)
        label = f"train, mean of {window} steps"
        losses.plot(numbers, [float("nan") if m is None else m for m in means], color="#0072b2", label=label)
    draw_forecast(losses, accuracy, forecast)
    _line(losses, epochs, "train_loss_eval_mode", "s--", "#009e73", "train, eval mode")
    _line(losses, epochs, "eval_loss", "o-", "#d55e00", "evaluation")
    losses.set(ylabel="cross-entropy (nats)")
    losses.legend(frameon=False, fontsize=8)
    losses.set_title(for_figure(title), fontsize=10)
    _line(accuracy, epochs, "train_accuracy", "s--", "#009e73", "train, eval mode")
    _line(accuracy, epochs, "eval_accuracy", "o-", "#d55e00", "evaluation")
    accuracy.set(xlabel="step", ylabel="accuracy")
    save_drawing(figure, path)


def draw_forecast(losses: Axes, metric: Axes, forecast: Sequence[CurvePoint]) -> None:
    """Draw a forecast curve in dashes.

    Args:
        losses: Where the losses go.
        metric: Where the main metric goes.
        forecast: Points; none draws nothing.
    """
    if not forecast:
        return
    dashed: dict[str, Any] = {"linestyle": (0, (4, 2)), "linewidth": 1.2, "zorder": 1.5}
    trained = [(point.step, point.train_loss) for point in forecast if point.train_loss is not None]
    losses.plot(*zip(*trained, strict=True), color="#56b4e9", label="train, forecast", **dashed)
    steps = [point.step for point in forecast]
    losses.plot(steps, [p.eval_loss for p in forecast], color="#e69f00", label="evaluation, forecast", **dashed)
    metric.plot(steps, [p.eval_metric for p in forecast], color="#e69f00", **dashed)


def curve_figure(forecast: Sequence[CurvePoint], title: str, path: Path, *, unit: str, metric: str) -> None:
    """Draw a forecast curve alone.

    Args:
        forecast: Points.
        title: Title.
        unit: What the losses are counted in.
        metric: The main metric in words.
        path: File to write; its suffix gives the format.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    losses, metrics = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    draw_forecast(losses, metrics, forecast)
    losses.set(ylabel=f"loss ({unit})")
    losses.legend(frameon=False, fontsize=8)
    losses.set_title(for_figure(title), fontsize=10)
    metrics.set(xlabel="step", ylabel=metric)
    save_drawing(figure, path)


def _line(axes: object, epochs: Sequence[Epoch], name: str, style: str, colour: str, label: str) -> None:
    points = [(epoch.step, getattr(epoch, name)) for epoch in epochs if getattr(epoch, name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), style, color=colour, markersize=3.5, label=label)  # type: ignore[attr-defined]
