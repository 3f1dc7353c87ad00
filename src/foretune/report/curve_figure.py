"""Figure of a fine-tune: losses over steps, the main metric over epochs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretune.report.curves import CurvePoint, Epoch, History, running_mean
from foretune.report.drawing import save_drawing
from foretune.report.texts import for_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Caption:
    """What a figure says in words.

    Attributes:
        title: Title.
        unit: What the losses are counted in.
        metric: The main metric.
    """

    title: str
    unit: str
    metric: str


def loss_figure(history: History, caption: Caption, path: Path, *, forecast: Sequence[CurvePoint] = ()) -> None:
    """Draw the training loss over steps, its running mean, both losses after each epoch, and the main metric.

    Args:
        history: Course of the run.
        caption: Title and names of the axes.
        path: File to write; its suffix gives the format.
        forecast: What was forecast, drawn behind it in dashes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    losses, metric = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    steps, epochs = history.steps, history.epochs
    if steps:
        numbers = [record.step for record in steps]
        losses.plot(numbers, [record.loss for record in steps], color="0.75", linewidth=0.8, label="train, by step")
        window = max(1, numbers[-1] // 20)
        means = running_mean(steps, window=window)
        label = f"train, mean of {window} steps"
        losses.plot(numbers, [float("nan") if m is None else m for m in means], color="#0072b2", label=label)
    draw_forecast(losses, metric, forecast)
    train, evaluation = ("s--", "#009e73", "train, eval mode"), ("o-", "#d55e00", "evaluation")
    _line(losses, epochs, lambda epoch: epoch.train_loss_eval_mode, train)
    _line(losses, epochs, lambda epoch: epoch.eval_loss, evaluation)
    losses.set(ylabel=f"loss ({caption.unit})")
    losses.legend(frameon=False, fontsize=8)
    losses.set_title(for_figure(caption.title), fontsize=10)
    _line(metric, epochs, lambda epoch: epoch.train_metric, train)
    _line(metric, epochs, lambda epoch: epoch.main, evaluation)
    metric.set(xlabel="step", ylabel=caption.metric)
    save_drawing(figure, path)


def draw_forecast(losses: "Axes", metric: "Axes", forecast: Sequence[CurvePoint]) -> None:
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


def curve_figure(forecast: Sequence[CurvePoint], caption: Caption, path: Path) -> None:
    """Draw a forecast curve alone.

    Args:
        forecast: Points.
        caption: Title and names of the axes.
        path: File to write; its suffix gives the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    losses, metrics = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    draw_forecast(losses, metrics, forecast)
    losses.set(ylabel=f"loss ({caption.unit})")
    losses.legend(frameon=False, fontsize=8)
    losses.set_title(for_figure(caption.title), fontsize=10)
    metrics.set(xlabel="step", ylabel=caption.metric)
    save_drawing(figure, path)


def _line(
    axes: "Axes", epochs: Sequence[Epoch], value_of: Callable[[Epoch], float | None], looks: tuple[str, str, str]
) -> None:
    style, colour, label = looks
    points = [(epoch.step, value) for epoch in epochs if (value := value_of(epoch)) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), style, color=colour, markersize=3.5, label=label)
