import pytest
import torch

from foretune.forecasting.linear_model import Start
from foretune.forecasting.schedule import Schedule
from foretune.forecasting.sequence_runs import SequenceRuns, SequenceSample
from foretune.forecasting.simulate import train_runs
from foretune.language.encode import NO_LOSS
from foretune.models.placement import read_adapters
from foretune.ntk.sketches import find_bases, sketch_sequences

import sequences as made

SCHEDULE = Schedule(train_rows=6, epochs=2, batch_size=2, learning_rate=3e-2, weight_decay=0.1)


@pytest.fixture(scope="module")
def known():
    model = made.adapted(made.tiny_language_model())
    adapted = read_adapters(model, draws=1, seed=0)
    rows, others = made.sequences(6, seed=1), made.sequences(4, seed=2)
    bases = find_bases(adapted, [made.batch_of(rows)], 64)
    train, evaluation = (
        sketch_sequences(adapted, [made.batch_of(part)], bases, n=len(part), draws=2, storage=torch.float64)
        for part in (rows, others)
    )
    return model, adapted, rows, others, train, evaluation


def start_of(adapted, sites, r=3):
    return Start(
        tuple(sites),
        tuple(adapted.adapters[site].rows[:r].detach() for site in sites),
        tuple(adapted.sites[site].scaling for site in sites),
    )


def whole(sketches, site):
    basis = sketches.bases[site]
    return torch.einsum("oa,nkab,ib->nkoi", basis.g, sketches.sketches[site], basis.h)


def reference(start, train, link, schedule):
    """One run, sequence by sequence with whole gradients, torch's own AdamW and clipping; losses before each step."""
    a = [torch.nn.Parameter(part.clone()) for part in start.a]
    b = [
        torch.nn.Parameter(part.new_zeros(len(train.bases[site].g), len(part)))
        for site, part in zip(start.sites, start.a, strict=False)
    ]
    gradients = [whole(train, site) for site in start.sites]
    optimizer = torch.optim.AdamW([*a, *b], lr=1.0, weight_decay=schedule.weight_decay)
    losses = []

    def of_sequence(row):
        z = [
            sum(
                (
                    s * (g[row, k] * (own_b @ own_a)).sum()
                    for s, g, own_a, own_b in zip(start.scaling, gradients, a, b, strict=False)
                )
            )
            for k in range(1 + train.draws)
        ]
        curvature = sum(own**2 for own in z[1:]) / (2 * train.draws)
        of_targets = train.target_losses[train.place == row]
        if link == "quadratic":
            return of_targets.sum() + z[0] + curvature
        p = torch.exp(-of_targets)
        m = -z[0] / (1 - p).sum()
        return torch.log(1 + (1 - p) / p * torch.exp(-m)).sum() + curvature

    for rate, batch in zip(schedule.rates(), schedule.batches(train.n), strict=False):
        loss = sum(of_sequence(row) for row in batch) / sum((train.place == row).sum() for row in batch)
        losses.append(float(loss.detach()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*a, *b], schedule.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        optimizer.step()
        optimizer.zero_grad()
    return losses, a, b


@pytest.mark.parametrize("link", ["quadratic", "bounded"])
def test_runs_side_by_side_are_those_of_a_loop(known, link):
    _, adapted, _, _, train, evaluation = known
    starts = [start_of(adapted, range(len(adapted.sites))), start_of(adapted, [1, 4], r=2)]
    runs = SequenceRuns(starts, train, torch.float64, train_a=True)
    trajectories = train_runs(
        runs, SequenceSample(train, link), SequenceSample(evaluation, "quadratic"), SCHEDULE, n=train.n, points=2
    )
    for start, trajectory in zip(starts, trajectories, strict=True):
        losses, a, b = reference(start, train, link, SCHEDULE)
        assert trajectory.batch_loss == pytest.approx(losses, rel=1e-9)
        z = torch.zeros(evaluation.n, 1 + evaluation.draws, dtype=torch.float64)
        for site, s, own_a, own_b in zip(start.sites, start.scaling, a, b, strict=True):
            z += s * torch.einsum("nkoi,oi->nk", whole(evaluation, site), (own_b @ own_a).detach())
        total = (evaluation.losses + z[:, 0] + z[:, 1:].square().sum(1) / (2 * evaluation.draws)).sum()
        expected = float(total / evaluation.targets.sum())
        assert trajectory.eval_loss[-1] == pytest.approx(expected, rel=1e-9)
        assert trajectory.eval_metric[-1] == pytest.approx(torch.tensor(expected).exp().item(), rel=1e-6)


@pytest.mark.parametrize("link", ["quadratic", "bounded"])
def test_value_and_slope_at_the_start_are_the_loss_and_its_gradient(known, link):
    _, _, _, _, train, _ = known
    sample, everything = SequenceSample(train, link), torch.arange(train.n)
    z = torch.zeros(train.n, 1 + train.draws, 1, dtype=torch.float64, requires_grad=True)
    loss = sample.loss(z, everything)
    torch.testing.assert_close(loss[:, 0], train.losses, rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad(loss.sum(), z)
    torch.testing.assert_close(slope[:, 0, 0], torch.ones(train.n, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert not slope[:, 1:].any()


def test_the_bounded_link_never_falls_below_zero_and_is_that_of_two_tokens(known):
    _, _, _, _, train, _ = known
    z = torch.zeros(train.n, 1 + train.draws, 1, dtype=torch.float64)
    z[:, 0] = -1e4
    assert (SequenceSample(train, "bounded").loss(z, torch.arange(train.n)) >= 0).all()
    assert (SequenceSample(train, "quadratic").loss(z, torch.arange(train.n)) < 0).all()


def test_a_small_real_change_of_the_loss_is_told_to_second_order(known):
    """The model itself with B set to a small random matrix, against the linearised one with many draws."""
    model, adapted, _, others, _, evaluation = known
    many = sketch_sequences(
        adapted, [made.batch_of(others)], evaluation.bases, n=len(others), draws=400, storage=torch.float64
    )
    runs = SequenceRuns([start_of(adapted, range(len(adapted.sites)))], many, torch.float64, train_a=True)
    generator = torch.Generator().manual_seed(0)
    parts = {name: parameter for name, parameter in model.named_parameters() if "lora_B" in name}
    with torch.no_grad():
        for adapter, parameter in zip(runs.adapters, parts.values(), strict=True):
            change = 3e-3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(change)
            adapter.b.copy_(change.T[None])
        told = float(runs.measure(SequenceSample(many, "quadratic"))[0][0])
        batch = made.batch_of(others)
        logits = model(**batch.inputs).logits[:, :-1].flatten(0, 1)
        real = torch.nn.functional.cross_entropy(logits, batch.labels[:, 1:].flatten(), ignore_index=NO_LOSS)
        for parameter in parts.values():
            parameter.zero_()
    before = float(many.losses.sum() / many.targets.sum())
    assert abs(told - float(real)) < 0.1 * abs(float(real) - before)


@pytest.mark.parametrize("link", ["quadratic", "bounded"])
def test_a_row_that_is_in_a_batch_twice_counts_twice(known, link):
    _, adapted, _, _, train, _ = known
    runs = SequenceRuns([start_of(adapted, [0, 3])], train, torch.float64, train_a=True)
    with torch.no_grad():
        for parameter, _ in runs.stacked:
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).to(parameter)
    sample, rows = SequenceSample(train, link), torch.tensor([4, 1, 4, 0, 4])
    each = [runs.batch_loss(sample, row[None]) * train.targets[row] for row in rows]
    together = runs.batch_loss(sample, rows)
    assert together.item() == pytest.approx((sum(each) / train.targets[rows].sum()).item(), rel=1e-12)
    parameters = [parameter for parameter, _ in runs.stacked]
    slopes = torch.autograd.grad(together.sum(), parameters)
    expected = torch.autograd.grad((sum(each) / train.targets[rows].sum()).sum(), parameters)
    for slope, wanted in zip(slopes, expected, strict=True):
        torch.testing.assert_close(slope, wanted, rtol=1e-10, atol=1e-12)
