"""Adapter methods beside LoRA in language models: gradients of sequences against loops over them, in float64."""

import numpy as np
import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, VeraConfig

import pairs
from foretune.errors import KernelError, PlacementError
from foretune.models.placement import place, read_adapters
from foretune.ntk.premises import check_new_adapters
from foretune.ntk.sequence_features import feature_bytes, sequence_features, sequence_kernel

import sequences as made

PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
CONFIGS = {
    "IA3": IA3Config(task_type="CAUSAL_LM", target_modules=PROJECTIONS, feedforward_modules=["down_proj"]),
    "LN tuning": LNTuningConfig(task_type="CAUSAL_LM"),  # peft's own choice for llama
    "VeRA": VeraConfig(task_type="CAUSAL_LM", target_modules=PROJECTIONS, r=5),
    "DoRA": LoraConfig(task_type="CAUSAL_LM", target_modules=PROJECTIONS, r=3, use_dora=True),
}
MOVED = ("ia3_l", "ln_tuning_layers", "vera_lambda")


def trained(placed):
    generator = torch.Generator().manual_seed(5)
    found = []
    with torch.no_grad():
        for name, parameter in placed.named_parameters():
            if any(part in name for part in MOVED):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            if parameter.requires_grad:
                found.append((name, parameter))
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_and_kernel_are_those_of_a_loop(name):
    placed = place(made.tiny_language_model(), CONFIGS[name], seed=0)
    parameters = trained(placed)
    adapted, rows = read_adapters(placed), made.sequences()
    assert not adapted.groups
    batches = [made.batch_of(rows, part) for part in ([3, 0], [4, 1, 2])]
    features = sequence_features(adapted, batches, n=len(rows), draws=2)
    weights = [parameter for _, parameter in parameters]
    for row, (ids, labels) in enumerate(rows):
        loss, gradients = made.loss_and_gradients(placed, ids, labels, weights)
        assert float(features.losses[row]) == pytest.approx(loss, abs=1e-10)
        by_name = {of: gradient for (of, _), gradient in zip(parameters, gradients, strict=True)}
        for site, of_vectors, of_b in zip(adapted.sites, features.tangent.v, features.tangent.b, strict=True):
            own = {of: g for of, g in by_name.items() if f".{site.name}." in of}
            expected = [g.flatten() for of, g in own.items() if "lora_A" not in of and "lora_B" not in of]
            expected += [g.T.flatten() for of, g in own.items() if "lora_B" in of]
            found = torch.cat([of_vectors[0, row], of_b[0, row].flatten()])
            assert len(found) == site.n_parameters - site.rank * site.d_in  # all but A, where B = 0
            # vectors first, in the order of their parameters but for VeRA's two, which peft names the other way
            assert torch.allclose(found.sort().values, torch.cat(expected).sort().values, rtol=1e-9, atol=1e-10)
    loops = np.stack(
        [
            torch.cat([g.flatten() for g in made.loss_and_gradients(placed, ids, labels, weights)[1]]).numpy()
            for ids, labels in rows
        ]
    )
    kernel = sequence_kernel(features, "loss-sum")
    np.testing.assert_allclose(kernel.matrices[0], loops @ loops.T, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(kernel.site_traces.sum(), np.trace(loops @ loops.T), rtol=1e-9)
    held = sum(t.nbytes for t in features.tangent.gradients)
    assert feature_bytes(adapted, n=5, outputs=3, draws=1, element_size=8)["features"] == held


@pytest.mark.parametrize("kind", ["IA3", "LN tuning"])
def test_encoder_decoders(kind):
    config = {
        "IA3": IA3Config(task_type="SEQ_2_SEQ_LM", target_modules=["k", "v", "wo"], feedforward_modules=["wo"]),
        "LN tuning": LNTuningConfig(task_type="SEQ_2_SEQ_LM"),
    }[kind]
    placed = place(pairs.build("t5", dtype=torch.float64), config, seed=0)
    parameters = [parameter for _, parameter in trained(placed)]
    adapted, rows = read_adapters(placed), pairs.sequences()
    features = sequence_features(adapted, [pairs.batch_of(placed, rows)], n=len(rows))
    loops = np.stack(
        [
            torch.cat([g.flatten() for g in pairs.loss_and_gradients(placed, *row, parameters)[1]]).numpy()
            for row in rows
        ]
    )
    found = sequence_kernel(features, "loss-sum").matrices[0]
    assert np.linalg.norm(found - loops @ loops.T) < 1e-9 * np.linalg.norm(found)


@pytest.mark.parametrize("name", CONFIGS)
def test_forecasts_of_them_are_refused_by_name(name):
    adapted = read_adapters(place(made.tiny_language_model(), CONFIGS[name], seed=0))
    with pytest.raises(KernelError, match=r"forecasts simulate plain LoRA: module '.*' trains .*use foretune score"):
        check_new_adapters(adapted)


def test_the_output_layer_and_other_tasks_are_refused():
    for config, message in (
        (IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "gives the logits of the next token"),
        (IA3Config(task_type="SEQ_CLS", target_modules=["q_proj"], feedforward_modules=[]), "is for classifiers"),
        (LNTuningConfig(modules_to_save=["norm"]), "the adapter alone trains"),
    ):
        with pytest.raises(PlacementError, match=message):
            place(made.tiny_language_model(), config, seed=0)
