import pytest
import torch

from foretune.errors import PlacementError
from foretune.models.plugged import plugged_in

import sequences as made

NAME = "model.layers.0.self_attn.q_proj"


def weights(r, d_in=8, d_out=8):
    return {NAME: (torch.ones(r, d_in, dtype=torch.float64), torch.ones(d_out, r, dtype=torch.float64))}


@pytest.fixture
def model():
    return made.adapted(made.tiny_language_model())


def logits(model):
    with torch.no_grad():
        return model(**made.batch_of(made.sequences(3)).inputs).logits


@pytest.mark.parametrize("r", [1, 3])
def test_what_is_plugged_in_changes_the_weight_by_scaled_b_times_a(model, r):
    other = made.tiny_language_model()
    with torch.no_grad():
        other.get_submodule(NAME).weight += r  # each entry of B A
    with plugged_in(model, weights(r)):
        torch.testing.assert_close(logits(model), logits(other), rtol=1e-10, atol=1e-10)


def test_a_trained_adapter_is_out_of_the_way_and_comes_back(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    before = logits(model)
    with plugged_in(model, {}):
        torch.testing.assert_close(logits(model), logits(made.tiny_language_model()), rtol=1e-10, atol=1e-10)
    assert torch.equal(logits(model), before)


def test_it_is_as_it_was_after_an_error(model):
    before = logits(model)
    with pytest.raises(RuntimeError, match="stopped"), plugged_in(model, weights(2)):
        raise RuntimeError("stopped")
    assert torch.equal(logits(model), before)


def test_what_does_not_fit_is_refused_and_leaves_no_trace(model):
    before = logits(model)
    with pytest.raises(PlacementError, match="rank 3, not 4"), plugged_in(model, weights(4)):
        pass
    with pytest.raises(PlacementError, match="'lm_head' carries no adapter"), plugged_in(model, {"lm_head": None}):
        pass
    assert torch.equal(logits(model), before)
