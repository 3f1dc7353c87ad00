"""Go or not: probabilities read off a forecast, and the sentences that say them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import gammaln

from foretune.forecasting.calibration import Interval
from foretune.forecasting.verdicts import go_sentences, probability_above
from foretune.tasks.metrics import ACCURACY, MICRO_F1, R2, SPEARMAN

METRICS = (ACCURACY, SPEARMAN, R2)
MIDDLES, WIDTHS = st.floats(-2.0, 2.0), st.floats(0.05, 2.0)


def interval(metric, middle, half):
    return Interval(*(metric.from_scale(middle + side * half) for side in (0.0, -1.0, 1.0)))


def by_integral(metric, middle, half, threshold, degrees):
    """Student's density from its formula, and its 90% interval by bisection."""

    def density(x):
        constant = gammaln((degrees + 1) / 2) - gammaln(degrees / 2) - np.log(degrees * np.pi) / 2
        return np.exp(constant - (degrees + 1) / 2 * np.log1p(x * x / degrees))

    def above(x):
        return 0.5 - quad(density, 0.0, x)[0]

    low, high = 0.0, 100.0
    while high - low > 1e-10:
        half_way = (low + high) / 2
        low, high = (half_way, high) if above(half_way) > 0.05 else (low, half_way)
    on_scale = {
        "logit": lambda p: np.log(p / (1 - p)), "fisher": np.arctanh, "identity": lambda x: x,
    }[metric.scale](threshold)  # fmt: skip
    return above((on_scale - middle) * low / half)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("degrees", [2, 5, 40])
def test_the_probability_is_the_integral_of_the_density(metric, degrees):
    for middle, half, threshold in ((0.4, 0.7, 0.7), (1.2, 0.3, 0.6), (-0.5, 1.1, 0.2)):
        found = probability_above(interval(metric, middle, half), metric, threshold, degrees)
        assert found == pytest.approx(by_integral(metric, middle, half, threshold, degrees), abs=1e-6)


@pytest.mark.parametrize("metric", METRICS)
@given(middle=MIDDLES, half=WIDTHS, degrees=st.integers(1, 50))
def test_the_interval_holds_ninety_of_hundred(metric, middle, half, degrees):
    said = interval(metric, middle, half)
    for threshold, probability in ((said.low, 0.95), (said.value, 0.5), (said.high, 0.05)):
        assert probability_above(said, metric, threshold, degrees) == pytest.approx(probability, abs=1e-6)


@pytest.mark.parametrize("metric", METRICS)
@given(MIDDLES, WIDTHS, st.lists(st.floats(-0.5, 1.5), min_size=2, max_size=6))
def test_more_is_less_likely(metric, middle, half, thresholds):
    chances = [probability_above(interval(metric, middle, half), metric, x, 5) for x in sorted(thresholds)]
    assert all(0.0 <= chance <= 1.0 for chance in chances)
    assert chances == sorted(chances, reverse=True)


def test_the_ends_of_a_metric():
    wide = Interval(0.9, 0.5, 0.99)
    assert probability_above(wide, ACCURACY, 1.01, 5) == 0.0
    assert probability_above(wide, ACCURACY, -0.01, 5) == 1.0
    certain = Interval(0.9, 0.9, 0.9)
    assert [probability_above(certain, ACCURACY, x, 5) for x in (0.9, 0.91, 1.5)] == [1.0, 0.0, 0.0]
    # beyond the limits within which counts of rows are kept: 99.5% beats 99.2% more often than not
    assert probability_above(interval(ACCURACY, 5.3, 0.5), ACCURACY, 0.992, 5) > 0.9
    rounded = Interval(1.0 - 1e-12, 0.999, 1.0)
    assert 0.95 < probability_above(rounded, ACCURACY, 0.9, 5) < 1.0
    assert probability_above(Interval(1.0, 1.0, 1.0), ACCURACY, 0.99, 5) == 1.0


def test_sentences():
    levels = {"accuracy": interval(ACCURACY, 1.4, 0.5), "eval_loss": Interval(0.5, 0.4, 0.6)}
    majority, head, probe = go_sentences(levels, ACCURACY, 5, majority=0.25, head_alone=0.77, probe=0.743)
    assert majority.sentence == (
        "More than 99 of 100 runs like this beat the majority class (25.0%) by 2 points or more."
    )
    assert (head.against, head.threshold) == ("the head alone", pytest.approx(0.79))
    assert head.probability == probability_above(levels["accuracy"], ACCURACY, 0.79, 5)
    assert probe.sentence == (
        f"{100 * probe.probability:.0f} of 100 runs like this beat the linear probe (74.3%) by 2 points or more."
    )
    assert 0.5 < head.probability < probe.probability < majority.probability
    assert probe.to_dict() == {
        "against": "the linear probe", "threshold": probe.threshold, "probability": probe.probability,
        "sentence": probe.sentence,
    }  # fmt: skip


def test_other_metrics():
    levels = {"spearman": interval(SPEARMAN, 0.6, 0.3)}
    (probe,) = go_sentences(levels, SPEARMAN, 5, majority=None, head_alone=float("nan"), probe=0.4, margin=0.05)
    assert probe.sentence.endswith("beat the linear probe (0.400) by 0.05 or more.")
    constant, *_ = go_sentences({"micro_f1": interval(MICRO_F1, 0.6, 0.3)}, MICRO_F1, 5,
                                majority=0.99, head_alone=None, probe=None)  # fmt: skip
    assert constant.sentence == (
        "Fewer than 1 of 100 runs like this beat one prediction for all (99.0%) by 2 points or more."
    )
    assert constant.probability == 0.0


def test_what_is_withheld_has_no_verdict():
    assert go_sentences(None, ACCURACY, 5, majority=0.5, head_alone=0.5, probe=0.5) == ()
    nowhere = {"spearman": Interval(float("nan"), float("nan"), float("nan"))}
    assert go_sentences(nowhere, SPEARMAN, 5, majority=None, head_alone=0.5, probe=0.5) == ()
