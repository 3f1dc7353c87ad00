"""The forecast of an encoder-decoder's run is the run, where the network does not bend and batches have one order."""

import dataclasses

import pytest

import pairs
from foretune.forecasting.sequence_forecast import forecast_sequences
from foretune.models.placement import lora_config
from foretune.sequence_plan import prepare_sequences, sequence_batches
from foretune.settings.commands import ForecastSettings, TuneSettings
from foretune.settings.groups import AdapterConfig
from foretune.training.fit import fit
from foretune.training.language import prepare_language

SETTINGS = ForecastSettings(
    samples=14, eval_samples=7, epochs=6, learning_rate=1e-4, train_batch_size=14, batch_size=3, max_length=24
)


@pytest.mark.parametrize("name", sorted(pairs.FAMILIES))
def test_a_run_of_whole_batches_at_a_small_rate_is_forecast_to_rounding(name, tmp_path):
    model, task = pairs.own(name), pairs.task_of()
    config = lora_config(model.model, AdapterConfig(r=4))
    said = forecast_sequences(prepare_sequences(model, task, config, SETTINGS), SETTINGS)
    run = TuneSettings(epochs=6, learning_rate=1e-4, train_batch_size=14, max_length=24, eval_samples=7)
    real = fit(prepare_language(model, task, config, run), tmp_path).history.epochs
    assert said.base.loss == pytest.approx(real[0].eval_loss, abs=1e-5)
    change = real[-1].eval_loss - real[0].eval_loss
    assert change < -1e-4
    assert said.run.run.end.eval_loss == pytest.approx(real[-1].eval_loss, abs=0.02 * abs(change))
    assert said.run.linear_loss == pytest.approx(real[-1].eval_loss, abs=0.05 * abs(change))
    content = said.to_dict()
    assert content["details"]["data"]["task"] == content["details"]["objective"]["kind"] == "seq2seq"


def test_batches_hold_as_many_logits_as_fit(monkeypatch):
    model, task = pairs.own(), pairs.task_of()
    plan = prepare_sequences(model, task, lora_config(model.model, AdapterConfig()), SETTINGS)
    tokens = plan.rows.train
    whole = list(
        sequence_batches(dataclasses.replace(plan, settings=dataclasses.replace(SETTINGS, batch_size=99)), tokens)
    )
    assert [len(batch.rows) for batch in whole] == [14]
    assert set(whole[0].inputs) == {"input_ids", "attention_mask", "decoder_input_ids"}
    longest = max(len(feature["labels"]) for feature in tokens.features)
    monkeypatch.setattr("foretune.sequence_plan.LOGITS", 2 * longest * plan.n_vocabulary)
    few = list(sequence_batches(plan, tokens))
    assert all(batch.labels.numel() * plan.n_vocabulary <= 2 * longest * plan.n_vocabulary for batch in few)
    assert sorted(row for batch in few for row in batch.rows.tolist()) == list(range(14))
    assert {batch.shift for batch in few} == {0}
