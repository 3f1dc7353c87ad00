import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foretune.report.curves import Step, read_log, running_mean, steps_to_reach

METRICS = ("accuracy", "matthews", "macro_f1")


def window(step, loss, seconds):
    return {"loss": loss, "learning_rate": 0.1, "grad_norm": 2.0, "step": step, "seconds": seconds, "epoch": 0.0}


def evaluated(kind, step, seconds, runtime=1.0, accuracy=0.5):
    names = {"loss": 0.7, "accuracy": accuracy, "matthews": 0.1, "macro_f1": 0.4, "runtime": runtime}
    return {f"eval_{kind}_{name}": value for name, value in names.items()} | {"step": step, "seconds": seconds}


LOG = [
    evaluated("train", 0, 1.0),
    evaluated("eval", 0, 2.0),
    window(3, 0.6, 5.0),
    window(4, 0.2, 6.0),  # the rest of the epoch: one step
    evaluated("train", 4, 7.0),
    evaluated("eval", 4, 8.0, accuracy=0.75),
    window(7, 0.3, 12.0),
    window(8, 0.1, 13.0),
    evaluated("train", 8, 14.0),
]


def test_an_epoch_is_the_mean_over_its_steps_whatever_the_windows():
    history = read_log(LOG, METRICS)
    assert [epoch.epoch for epoch in history.epochs] == [0, 1]
    assert history.epochs[0].train_loss is None
    assert history.epochs[1].train_loss == pytest.approx((3 * 0.6 + 0.2) / 4)
    assert history.epochs[1].train_loss_eval_mode == 0.7
    assert history.epochs[1].metrics == {"accuracy": 0.75, "matthews": 0.1, "macro_f1": 0.4}
    assert history.epochs[1].main == 0.75


def test_seconds_leave_evaluation_out():
    history = read_log(LOG, METRICS)
    assert [step.seconds for step in history.steps] == [3.0, 4.0, 8.0, 9.0]
    assert history.epochs[1].seconds == 4.0
    assert (history.seconds_train, history.seconds_evaluate) == (9.0, 5.0)


def test_an_evaluation_that_was_cut_off_makes_no_epoch():
    assert len(read_log(LOG, METRICS).epochs) == 2
    assert len(read_log([*LOG, evaluated("eval", 8, 15.0)], METRICS).epochs) == 3


def test_without_training_rows_evaluated():
    history = read_log([evaluated("eval", 0, 1.0), window(2, 0.5, 2.0), evaluated("eval", 2, 3.0)], METRICS)
    assert history.epochs[1].train_loss_eval_mode is None
    assert history.epochs[1].train_metric is None
    assert history.epochs[1].train_loss == 0.5


def step(number, loss):
    return Step(number, loss, 0.1, None, 0.0)


def test_a_loss_is_reached_when_its_mean_is():
    steps = [step(i + 1, loss) for i, loss in enumerate([0.9, 0.1, 0.9, 0.4, 0.4, 0.4])]
    assert steps_to_reach(steps, 0.4, window=1) == 2
    assert steps_to_reach(steps, 0.5, window=2) == 2
    assert steps_to_reach(steps, 0.4, window=3) == 6
    assert steps_to_reach(steps, 0.05, window=1) is None
    assert steps_to_reach([], 0.5, window=3) is None


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    losses=st.lists(st.floats(0, 5), min_size=12, max_size=12),
    window=st.integers(1, 10),
)
def test_the_running_mean_is_over_whole_records(lengths, losses, window):
    ends = np.cumsum(lengths)
    steps = [step(int(end), loss) for end, loss in zip(ends, losses, strict=False)]
    means = running_mean(steps, window=window)
    for last, mean in enumerate(means):
        first, count = last, lengths[last]
        while count < window and first > 0:
            first -= 1
            count += lengths[first]
        if count < window:
            assert mean is None
        else:
            window_records = range(first, last + 1)
            slow = sum(losses[i] * lengths[i] for i in window_records) / sum(lengths[i] for i in window_records)
            assert math.isclose(mean, slow, rel_tol=1e-9, abs_tol=1e-9)


def of_numbers(step, seconds, spearman):
    names = {"loss": 0.7, "spearman": spearman, "pearson": 0.2, "r2": -0.1, "runtime": 1.0}
    entries = {f"eval_eval_{name}": value for name, value in names.items()}
    return entries | {"step": step, "seconds": seconds, "eval_eval_samples_per_second": 9.0}


def history_of_numbers(*spearman):
    log = [of_numbers(0, 1.0, 0.9)]
    for epoch, value in enumerate(spearman, start=1):
        log += [window(epoch, 0.5, 3.0 * epoch), of_numbers(epoch, 3.0 * epoch + 1.0, value)]
    return read_log(log, ("spearman", "pearson", "r2"))


def test_metrics_of_any_kind_of_task_go_by_their_names():
    history = history_of_numbers(0.25)
    assert history.epochs[1].metrics == {"spearman": 0.25, "pearson": 0.2, "r2": -0.1}
    names = "epoch step train_loss train_loss_eval_mode train_spearman eval_loss eval_spearman eval_pearson eval_r2"
    assert " ".join(history.epochs[1].to_dict()) == f"{names} seconds"
    assert list(history.epochs[1].to_dict().values())[:7] == [1, 1, 0.5, None, None, 0.7, 0.25]


@pytest.mark.parametrize(
    ("values", "best"),
    [((0.1, 0.3, 0.3), 2), ((math.nan, -0.3, -0.2), 3), ((0.1, math.nan), 1), ((math.nan, math.nan), None)],
)
def test_the_best_epoch_is_that_of_the_largest_main_metric_where_it_is_defined(values, best):
    found = history_of_numbers(*values).best  # epoch 0, before training, does not count
    assert (found and found.epoch) == best


def test_a_figure_of_a_run_names_its_loss_and_its_metric(monkeypatch, tmp_path):
    from foretune.report import curve_figure

    drawn = []
    monkeypatch.setattr(curve_figure, "save_drawing", lambda figure, path: drawn.append(figure))
    caption = curve_figure.Caption("scores", "squared error", "Spearman correlation")
    curve_figure.loss_figure(history_of_numbers(0.25, 0.75), caption, tmp_path / "loss.png")
    losses, metric = drawn[0].axes
    assert (losses.get_ylabel(), metric.get_ylabel()) == ("loss (squared error)", "Spearman correlation")
    (line,) = metric.lines
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([0, 1, 2], [0.9, 0.25, 0.75])
