"""What a person reads of the ledger."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from foretune.ledger.entries import State
from foretune.ledger.summary import Accuracy, Group, LedgerSummary
from foretune.report.tables import Table
from foretune.tasks.metrics import metric_named

_TITLES: dict[State, str] = {
    "ok": "Forecasts made before their runs.",
    "held out": "Held-out forecasts of studies: each data set forecast by a calibration that had not seen it.",
}
_REASONS = {
    "altered": "altered since (the hash is not that of the forecast)",
    "late": "made after the run had begun",
    "other run": "of another run (the ledger says what differs)",
    "withheld": "withheld: there was no level to compare",
    "made again": "of a run that counts already",
}
_HEAD = ("model", "data", "metric", "runs", "error", "bias", "in 90% interval", "width")
_LOSS_HEAD = ("eval loss: error", "bias", "in 90% interval")


def print_ledger(console: Console, summary: LedgerSummary) -> None:
    """Print how past forecasts did, and which lines were left out.

    Args:
        console: Where to.
        summary: Summary.
    """
    for state, title in _TITLES.items():
        groups = [group for group in summary.groups if group.state == state]
        totals = [group for group in summary.totals if group.state == state]
        if groups:
            ledger_table(title, groups, totals).show(console)
            console.print()
    for why, number in summary.left_out.items():
        words = f"• left out: {number} {'forecast' if number == 1 else 'forecasts'} {_REASONS[why]}"
        console.print(Text(words), style="yellow")


def ledger_table(title: str, groups: Sequence[Group], totals: Sequence[Group]) -> Table:
    """Lay out the forecasts of one kind.

    Args:
        title: What they are.
        groups: By model and data set.
        totals: All together, by metric.

    Returns:
        The table.
    """
    rows = [_row(group, group.model or "", group.dataset or "") for group in groups]
    if len(groups) > 1:
        rows += [_row(group, "all", "") for group in totals]
    caption = (
        f"{title} Error: mean of |forecast − real|; bias: mean of forecast − real; both in points (pts) where the "
        "metric is a share, of the loss relative to the real one. Shares with their 95% intervals, which take runs for "
        "independent: runs on one data set are less than that."
    )
    lost = sum(2 * group.runs - group.main.known - group.eval_loss.known for group in groups)
    if lost:
        caption += f" Outcomes that are not finite: {lost}; they count as outside the interval, and in no mean."
    return Table(caption, (*_HEAD, *_LOSS_HEAD), tuple(rows), right_from=3)


def _row(group: Group, model: str, dataset: str) -> tuple[str, ...]:
    metric, main, loss = metric_named(group.metric), group.main, group.eval_loss

    def write(value: float | None, *, sign: str = "") -> str:
        if value is None:
            return "–"
        return f"{100 * value:{sign}.1f} pts" if metric.percent else f"{value:{sign}.3f}"

    return (
        model,
        dataset,
        metric.label,
        str(group.runs),
        write(main.error),
        write(main.bias, sign="+"),
        _share(main),
        write(main.width),
        "–" if loss.error is None else f"{loss.error:.1%}",
        "–" if loss.bias is None else f"{loss.bias:+.1%}",
        _share(loss),
    )


def _share(accuracy: Accuracy) -> str:
    return f"{accuracy.covered:.0%} [{accuracy.low:.0%}, {accuracy.high:.0%}]"
