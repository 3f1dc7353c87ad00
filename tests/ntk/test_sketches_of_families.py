"""Every family of causal language models: the sketch of the loss is its slope, whatever the modules look like."""

import pytest
import torch

import language
from foretune.models.language_model import own_language_model, place_language
from foretune.models.placement import read_adapters
from foretune.models.plugged import plugged_in
from foretune.ntk.sketches import find_bases, sketch_sequences
from foretune.settings.groups import AdapterConfig

import cases
import sequences as made

DOUBLE = {"gpt2", "gpt_neox", "opt"}  # the norms of the others compute in float32, and small steps drown in rounding


def total_loss(model, batch):
    with torch.no_grad():
        logits = model(**batch.inputs).logits[:, :-1].flatten(0, 1)
    labels = batch.labels[:, 1:].flatten()
    return float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))


@pytest.mark.parametrize("name", sorted(language.FAMILIES))
def test_the_slope_of_the_loss_along_random_adapters(name):
    dtype = torch.float32 if name == "mixtral" else torch.float64  # its kernel of experts knows no other
    model = language.build(name, spread=3.0).to(dtype)
    placed = place_language(
        own_language_model(model, language.tokenizer(pad=True), bare=True), AdapterConfig(("all-linear",), r=2), seed=0
    )
    adapted = read_adapters(placed, seed=0)
    rows = made.sequences(5, vocabulary=cases.VOCABULARY)
    batch = made.batch_of(rows)
    bases = find_bases(adapted, [batch], 128)
    sketches = sketch_sequences(adapted, [batch], bases, n=5, draws=1, storage=torch.float64)
    assert sketches.kept == pytest.approx([1.0] * len(adapted.sites), abs=1e-4)
    step, weights, slope = 1e-5 if name in DOUBLE else 1e-3, {}, 0.0
    for site, adapter, basis, c in zip(adapted.sites, adapted.adapters, bases, sketches.sketches, strict=True):
        gradient = basis.g @ c[:, 0].sum(0).to(dtype) @ basis.h.T
        b = gradient @ adapter.rows.T  # uphill
        b /= b.norm()
        weights[site.name] = (adapter.rows, step * b)
        slope += float((gradient * (b @ adapter.rows)).sum())
    with plugged_in(placed, weights):
        above = total_loss(placed, batch)
    with plugged_in(placed, {name: (a, -b) for name, (a, b) in weights.items()}):
        below = total_loss(placed, batch)
    assert (above - below) / (2 * step) == pytest.approx(slope, rel=1e-4 if name in DOUBLE else 2e-3)
