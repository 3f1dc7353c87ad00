"""Figure of a fine-tune: losses over steps, accuracy over epochs."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from foretune.tuning.curves import Epoch, History, running_mean


def loss_figure(history: History, title: str, path: Path) -> None:
    """Draw the training loss over steps, its running mean, both losses after each epoch, and the accuracy.

    Args:
        history: Course of the run.
        title: Title.
        path: File to write; its suffix gives the format.
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
    _line(losses, epochs, "train_loss_eval_mode", "s--", "#009e73", "train, eval mode")
    _line(losses, epochs, "eval_loss", "o-", "#d55e00", "evaluation")
    losses.set(ylabel="cross-entropy (nats)")
    losses.legend(frameon=False, fontsize=8)
    losses.set_title(title, fontsize=10)
    _line(accuracy, epochs, "train_accuracy", "s--", "#009e73", "train, eval mode")
    _line(accuracy, epochs, "eval_accuracy", "o-", "#d55e00", "evaluation")
    accuracy.set(xlabel="step", ylabel="accuracy")
    figure.savefig(path, dpi=150)


def _line(axes: object, epochs: Sequence[Epoch], name: str, style: str, colour: str, label: str) -> None:
    points = [(epoch.step, getattr(epoch, name)) for epoch in epochs if getattr(epoch, name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), style, color=colour, markersize=3.5, label=label)  # type: ignore[attr-defined]
