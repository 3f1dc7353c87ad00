"""Metrics of others from one pass over the samples."""

import numpy as np
import pytest

import foretune as ft
from foretune.evaluation.metric_inputs import MetricInputs, plop
from foretune.forecasting.linearise import linearise
from foretune.forecasting.simulated_runs import Ending
from foretune.models.placement import lora_config
from foretune.problem import prepare

import cases


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return ft.load_task(ft.DataConfig(cases.write_reviews(tmp_path_factory.mktemp("metrics") / "reviews")))


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2", "llama"])
def test_plop_does_not_depend_on_the_padding(name, task, tmp_path):
    """Whether a text is alone in its batch or padded to a longer one beside it."""
    given = ft.load_classifier(cases.save(tmp_path / "model", name), label_names=task.label_names, seed=0)
    config = lora_config(given.model, ft.AdapterConfig(("all-linear",), None, 2))
    scores = []
    for batch_size in (1, 20):
        settings = ft.ScoreSettings(samples=20, eval_samples=6, draws=1, reduction="margin", batch_size=batch_size)
        plan = prepare(given, task, config, settings)
        linearised = linearise(plan)
        starts = [linearised.start([site]) for site in range(len(linearised.sites))]
        scores.append(plop(MetricInputs(plan, linearised, starts, Ending(0.0, 0.0, 0.0), seed=0)))
    assert len(np.unique(plan.train.lengths)) > 3  # so there is padding
    assert np.isfinite(scores).all()
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
