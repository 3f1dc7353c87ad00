import dataclasses
import math
import weakref

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from foretune.errors import KernelError
from foretune.forecasting.head_layer import ACTIVATIONS, HeadLayer, find_activation
from foretune.forecasting.linear_model import FirstOrder, Head, Sample, Start, lift
from foretune.forecasting.linearise import Linearised, first_examples
from foretune.forecasting.optimizer import clip_each, optimizer_of, set_rate
from foretune.forecasting.schedule import Schedule
from foretune.forecasting.simulate import Trajectory, simulate
from foretune.forecasting.simulated_runs import best_of, head_alone_on, n_steps, simulate_runs
from foretune.models.placement import place, read_adapters
from foretune.models.sites import Site
from foretune.ntk.factors import ModuleTokens, TokenFactors, token_factors
from foretune.tasks.classification import Classification
from foretune.tasks.metrics import ACCURACY
from foretune.tasks.multi_label import MultiLabel
from foretune.tasks.regression import Regression

from cases import batch_of, lora, ragged, tiny

EXACT = torch.float64
SHAPES = ((6, 5), (6, 4), (3, 7))  # inputs and outputs of the modules
WIDTH = 5  # of the head
RECIPE = Schedule(11, 4, 4, 0.05, warmup_ratio=0.1, seed=3)


def normal(*shape):
    return torch.randn(*shape, dtype=EXACT)


def tokens(counts, k, d_in, d_out, size):
    starts = torch.cat([torch.zeros(1, dtype=torch.long), torch.cumsum(torch.tensor(counts), 0)])
    n = int(starts[-1])
    return ModuleTokens(starts, normal(n, d_in), size * normal(k, n, d_out))


def of(objective, n_outputs):
    """The objective of a kind with so many outputs."""
    return objective(tuple(map(str, range(n_outputs))))


def slow_loss(objective, f, targets):
    """Mean loss of n × C outputs, written out."""
    if isinstance(objective, Regression):
        return sum((f[i] - targets[i]) @ (f[i] - targets[i]) / len(f[i]) for i in range(len(f))) / len(f)
    if isinstance(objective, MultiLabel):
        signs = 2 * targets.to(f.dtype) - 1
        return (1 + (-signs * f).exp()).log().mean()
    return cross_entropy(f, targets)


def ranks(values):
    return np.argsort(np.argsort(values))


def slow_metric(objective, f, targets):
    """Main metric of n × C outputs, written out."""
    f, y = f.numpy(), targets.numpy()
    if isinstance(objective, Regression):
        return np.mean([np.corrcoef(ranks(a), ranks(b))[0, 1] for a, b in zip(f.T, y.T, strict=True)])
    if isinstance(objective, MultiLabel):
        said, there = [value > 0 for value in f.flat], [value > 0 for value in y.flat]
        return 2 * sum(a and b for a, b in zip(said, there, strict=True)) / (sum(said) + sum(there))
    return np.mean([int(row.argmax()) == int(target) for row, target in zip(f, y, strict=True)])


def targets_of(objective, n, n_outputs):
    if objective is Classification:
        return torch.arange(n) % n_outputs
    return normal(n, n_outputs) if objective is Regression else torch.randint(0, 2, (n, n_outputs))


def sample(n, n_classes, *, hidden=False, size=0.3, seed=0, objective=Classification):
    """Factors of no model: ragged texts, random inputs and gradients."""
    torch.manual_seed(seed)
    reduction = of(objective, n_classes).simulated()
    k = reduction.n_outputs
    counts = [1 + (3 * i) % 4 for i in range(n)]
    sites = tuple(Site(str(i), i, "m", d_in, d_out, 3, 1.0) for i, (d_in, d_out) in enumerate(SHAPES))
    factors = TokenFactors(
        sites,
        reduction,
        tuple(tokens(counts, k, d_in, d_out, size) for d_in, d_out in SHAPES),
        (tokens([1] * n, k, 4, WIDTH, size),) if hidden else (),
        normal(n, WIDTH),
        normal(n, n_classes),
    )
    lifts = torch.stack([lift(normal(n_classes, WIDTH), reduction.directions) for _ in range(2)])
    return Sample(
        factors, targets_of(objective, n, n_classes), lifts, torch.arange(n) % 3 // 2, of(objective, n_classes)
    )


def head(n_classes, *, bias=True, hidden=False, seed=5):
    torch.manual_seed(seed)
    weight, own = 0.3 * normal(n_classes, WIDTH), 0.1 * normal(n_classes) if bias else None
    if hidden in SLOW_ACTIVATIONS:
        return Head(weight, own, layer=HeadLayer(normal(WIDTH, 4), normal(WIDTH), hidden))
    return Head(weight, own, (normal(WIDTH, 4),) if hidden else ())


SLOW_ACTIVATIONS = {
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "identity": lambda x: x,
}


def start(sites, ranks, seed=7):
    torch.manual_seed(seed)
    return Start(
        tuple(sites),
        tuple(normal(rank, SHAPES[site][0]) for site, rank in zip(sites, ranks, strict=True)),
        tuple(0.5 + 0.25 * site for site in sites),
    )


class Bilinear(torch.nn.Module):
    """The linearised model as plain autograd sees it, one example and one token at a time."""

    def __init__(self, begin, own, *, train_a):
        super().__init__()
        self.begin = begin
        self.a = torch.nn.ParameterList([torch.nn.Parameter(a.clone(), requires_grad=train_a) for a in begin.a])
        self.b = torch.nn.ParameterList(
            [
                torch.nn.Parameter(torch.zeros(SHAPES[site][1], len(a), dtype=EXACT))
                for site, a in zip(begin.sites, begin.a, strict=True)
            ]
        )
        self.v = torch.nn.Parameter(own.weight.clone())
        self.bias = None if own.bias is None else torch.nn.Parameter(own.bias.clone())
        self.before = own.hidden
        self.hidden = torch.nn.ParameterList([torch.nn.Parameter(w.clone()) for w in own.hidden])
        self.hidden_bias = torch.nn.ParameterList(
            [torch.nn.Parameter(torch.zeros(len(w), dtype=EXACT)) for w in own.hidden]
        )

        self.theta = torch.nn.ParameterList([torch.nn.Parameter(part.origin.clone()) for part in begin.first_order])
        self.activation = None if own.layer is None else SLOW_ACTIVATIONS[own.layer.activation]
        if own.layer is not None:
            self.dense = torch.nn.Parameter(own.layer.weight.clone())
            self.dense_bias = torch.nn.Parameter(own.layer.bias.clone())

    def groups(self, weight_decay):
        biases = {id(p) for name, p in self.named_parameters() if "bias" in name}
        trained = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if id(p) not in biases], "weight_decay": weight_decay},
            {"params": [p for p in trained if id(p) in biases], "weight_decay": 0.0},
        ]

    def forward(self, held, rows):
        return torch.stack([self.one(held, int(row)) for row in rows])

    def one(self, held, row):
        factors = held.factors
        z = torch.zeros(factors.reduction.n_outputs, dtype=EXACT)
        for site, s, a, b in zip(self.begin.sites, self.begin.scaling, self.a, self.b, strict=True):
            z = z + self.change(factors.modules[site], row, lambda h, s=s, a=a, b=b: s * (b @ (a @ h)))
        for part, theta in zip(self.begin.first_order, self.theta, strict=True):
            z = z + held.first_order[part.position][:, row] @ (theta - part.origin)
        phi = factors.inputs[row]
        if self.activation is not None:
            phi = self.activation(self.dense @ factors.hidden[0].h[row] + self.dense_bias)
        parts = factors.hidden if self.activation is None else ()
        for part, w, w_0, bias in zip(parts, self.hidden, self.before, self.hidden_bias, strict=True):
            z = z + self.change(part, row, lambda h, w=w, w_0=w_0, bias=bias: (w - w_0) @ h + bias)
        f = self.v @ (phi + held.lifts[held.fold[row]] @ z)
        return f if self.bias is None else f + self.bias

    def change(self, part, row, moved):
        total = 0.0
        for t in range(int(part.starts[row]), int(part.starts[row + 1])):
            total = total + part.g[:, t] @ moved(part.h[t])
        return total


def slow(begin, own, train, evaluation, schedule, *, train_a=True):
    """Trajectory of one run by torch's own optimiser and clipping."""
    model = Bilinear(begin, own, train_a=train_a)
    optimizer = torch.optim.AdamW(model.groups(schedule.weight_decay), lr=schedule.learning_rate)
    shares = schedule.rates() / schedule.learning_rate
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: shares[min(k, len(shares) - 1)])
    norms, losses = [], []
    for batch in schedule.batches(train.factors.n):
        optimizer.zero_grad()
        loss = slow_loss(train.objective, model(train, batch), train.targets[batch])
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, schedule.max_grad_norm)))
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    with torch.no_grad():
        f = model(evaluation, range(evaluation.factors.n))
        shares = [
            float((s * b @ a).norm() / a_0.norm()) ** 2
            for s, a_0, a, b in zip(begin.scaling, begin.a, model.a, model.b, strict=True)
        ]
        return {
            "batch_loss": losses,
            "train_loss": float(slow_loss(train.objective, model(train, range(train.factors.n)), train.targets)),
            "eval_loss": float(slow_loss(evaluation.objective, f, evaluation.targets)),
            "eval_metric": slow_metric(evaluation.objective, f, evaluation.targets),
            "eval_logits": f.numpy(),
            "movement": float(np.sqrt(np.mean(shares))) if shares else 0.0,
        }, norms


def assert_same(trajectory, expected, tolerance=1e-10):
    assert trajectory.batch_loss == pytest.approx(expected["batch_loss"], rel=tolerance)
    assert trajectory.train_loss[-1] == pytest.approx(expected["train_loss"], rel=tolerance)
    assert trajectory.eval_loss[-1] == pytest.approx(expected["eval_loss"], rel=tolerance)
    assert trajectory.eval_metric[-1] == pytest.approx(expected["eval_metric"], rel=tolerance)
    assert trajectory.movement == pytest.approx(expected["movement"], rel=tolerance)
    assert np.allclose(trajectory.eval_logits, expected["eval_logits"], rtol=1e-5, atol=1e-5)  # kept in float32


@pytest.mark.parametrize("hidden", [False, True, *SLOW_ACTIVATIONS])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("n_classes", "weight_decay"), [(2, 0.0), (2, 2.0), (3, 2.0)])
def test_a_run_is_that_of_torch(n_classes, bias, hidden, weight_decay):
    train = sample(11, n_classes, hidden=bool(hidden))
    evaluation = sample(6, n_classes, hidden=bool(hidden), seed=1)
    own = head(n_classes, bias=bias, hidden=hidden)
    schedule = dataclasses.replace(RECIPE, weight_decay=weight_decay, max_grad_norm=0.85)
    begin = start((0, 2), (3, 2))
    if hidden in SLOW_ACTIVATIONS:  # whose gradients have other sizes
        _, free = slow(begin, own, train, evaluation, dataclasses.replace(schedule, max_grad_norm=1e9))
        schedule = dataclasses.replace(schedule, max_grad_norm=float(np.median(free)))
    (trajectory,) = simulate([begin], own, train, evaluation, schedule, dtype=EXACT)
    expected, norms = slow(begin, own, train, evaluation, schedule)
    assert min(norms) < schedule.max_grad_norm < max(norms)  # some steps are clipped, others not
    assert_same(trajectory, expected)
    assert trajectory.steps == (0, schedule.steps)
    assert trajectory.train_loss[-1] < trajectory.train_loss[0]


@pytest.mark.parametrize("objective", [Regression, MultiLabel])
@pytest.mark.parametrize("n_outputs", [1, 3])
@pytest.mark.parametrize("hidden", [False, "gelu"])
def test_a_run_minimises_the_loss_of_its_samples(objective, n_outputs, hidden):
    train = sample(11, n_outputs, hidden=bool(hidden), objective=objective)
    evaluation = sample(6, n_outputs, hidden=bool(hidden), seed=1, objective=objective)
    own, schedule = head(n_outputs, hidden=hidden), dataclasses.replace(RECIPE, weight_decay=1.0)
    begins = [start((0, 2), (3, 2)), start((), ()), start((1, 2), (1, 3), seed=8)]
    for begin, trajectory in zip(begins, simulate(begins, own, train, evaluation, schedule, dtype=EXACT), strict=True):
        assert_same(trajectory, slow(begin, own, train, evaluation, schedule)[0])
        assert trajectory.train_loss[-1] < trajectory.train_loss[0]
    with pytest.raises(KernelError, match="are no classes"):
        _ = train.labels


@pytest.mark.parametrize("weight_decay", [0.0, 1.0])
def test_a_fixed_a_neither_trains_nor_decays(weight_decay):
    train, evaluation, own = sample(11, 2), sample(6, 2, seed=1), head(2)
    schedule = dataclasses.replace(RECIPE, weight_decay=weight_decay)
    begin = start((0, 1, 2), (3, 3, 3))
    (trajectory,) = simulate([begin], own, train, evaluation, schedule, train_a=False, dtype=EXACT)
    expected, _ = slow(begin, own, train, evaluation, schedule, train_a=False)
    assert_same(trajectory, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_of_a_head_is_found_and_its_weights_left(activation):
    torch.manual_seed(3)
    hidden, output = torch.nn.Linear(6, 5), torch.nn.Linear(5, 2)
    with torch.no_grad():
        hidden.weight.mul_(0.01)  # so small that every activation looks linear
    before = hidden.weight.clone(), hidden.bias.clone()
    inputs = torch.randn(8, 6)
    found = find_activation(lambda: output(SLOW_ACTIVATIONS[activation](hidden(inputs))), hidden, output)
    assert found == activation
    assert torch.equal(hidden.weight, before[0])
    assert torch.equal(hidden.bias, before[1])
    assert find_activation(lambda: output(hidden(inputs).sigmoid()), hidden, output) is None
    assert find_activation(lambda: output(hidden(inputs[None])[:, 0]), hidden, output) is None  # at every position
    assert torch.equal(hidden.weight, before[0])


def test_runs_side_by_side_are_those_alone():
    """Other modules, smaller ranks beside larger ones, and a head that trains without adapter."""
    train, evaluation, own = sample(11, 3, hidden=True), sample(6, 3, hidden=True, seed=1), head(3, hidden=True)
    schedule = dataclasses.replace(RECIPE, weight_decay=1.0)
    begins = [
        start((0, 2), (3, 3)),
        start((), ()),
        start((0, 1), (1, 2), seed=8),
        start((2,), (2,), seed=9),
        start((0, 1, 2), (2, 3, 1), seed=10),
    ]
    together = simulate(begins, own, train, evaluation, schedule, points=3, dtype=EXACT)
    for begin, trajectory in zip(begins, together, strict=True):
        (alone,) = simulate([begin], own, train, evaluation, schedule, points=3, dtype=EXACT)
        for name in ("train_loss", "train_metric", "eval_loss", "eval_metric", "batch_loss", "movement"):
            assert getattr(trajectory, name) == pytest.approx(getattr(alone, name), rel=1e-10), name
        assert trajectory.steps == alone.steps
        assert_same(trajectory, slow(begin, own, train, evaluation, schedule)[0])
    assert together[1].movement == 0.0


@pytest.mark.parametrize("weight_decay", [0.0, 1.0])
def test_what_other_methods_train_counts_to_first_order(weight_decay):
    """Scales alone, magnitudes beside A and B, and plain LoRA, side by side."""
    train, evaluation, own = sample(11, 3), sample(6, 3, seed=1), head(3)
    schedule = dataclasses.replace(RECIPE, weight_decay=weight_decay)
    k = train.factors.reduction.n_outputs
    torch.manual_seed(11)
    train, evaluation = (
        dataclasses.replace(part, first_order=(normal(k, part.factors.n, 4), normal(k, part.factors.n, 2)))
        for part in (train, evaluation)
    )
    ones, drawn, plain = FirstOrder(0, torch.ones(4, dtype=EXACT)), FirstOrder(1, normal(2)), start((0, 2), (3, 2))
    begins = [
        plain,
        dataclasses.replace(start((), ()), first_order=(ones,)),
        dataclasses.replace(start((1,), (2,), seed=8), first_order=(ones, drawn)),
    ]
    together = simulate(begins, own, train, evaluation, schedule, dtype=EXACT)
    for begin, trajectory in zip(begins, together, strict=True):
        assert_same(trajectory, slow(begin, own, train, evaluation, schedule)[0])
    (alone,) = simulate([plain], own, train, evaluation, schedule, dtype=EXACT)
    assert together[0].eval_loss == pytest.approx(alone.eval_loss, rel=1e-12)
    assert together[1].eval_loss[-1] != pytest.approx(
        simulate([start((), ())], own, train, evaluation, schedule)[0].eval_loss[-1]
    )
    with pytest.raises(KernelError, match="nothing to simulate"):
        simulate(begins, own, train, sample(6, 3, seed=1), schedule)


def test_nothing_but_heads():
    train, evaluation, own = sample(11, 2), sample(6, 2, seed=1), head(2)
    (trajectory,) = simulate([start((), ())], own, train, evaluation, RECIPE, dtype=EXACT)
    assert_same(trajectory, slow(start((), ()), own, train, evaluation, RECIPE)[0])


def test_before_training_and_in_between():
    train, evaluation, own = sample(11, 2), sample(6, 2, seed=1), head(2)
    steps = []
    (trajectory,) = simulate(
        [start((0,), (2,))], own, train, evaluation, RECIPE, points=5, dtype=EXACT, on_step=lambda: steps.append(1)
    )
    assert len(steps) == len(trajectory.batch_loss) == RECIPE.steps == 12
    assert trajectory.steps == (0, 2, 5, 7, 10, 12)
    f = train.factors.inputs @ own.weight.T + own.bias
    assert trajectory.train_loss[0] == pytest.approx(float(cross_entropy(f, torch.as_tensor(train.labels))))
    assert trajectory.train_metric[0] == pytest.approx(np.mean(f.argmax(1).numpy() == train.labels))
    # stopping a constant schedule early is the same run
    constant = dataclasses.replace(RECIPE, scheduler="constant")
    (long,) = simulate([start((0,), (2,))], own, train, evaluation, constant, points=2, dtype=EXACT)
    half = dataclasses.replace(constant, epochs=2)
    (short,) = simulate([start((0,), (2,))], own, train, evaluation, half, dtype=EXACT)
    assert long.eval_loss[1] == pytest.approx(short.eval_loss[-1], rel=1e-12)


def test_float32_is_close_and_the_default():
    train, evaluation, own = sample(11, 2), sample(6, 2, seed=1), head(2)
    (trajectory,) = simulate([start((0, 1), (2, 2))], own, train, evaluation, RECIPE)
    (exact,) = simulate([start((0, 1), (2, 2))], own, train, evaluation, RECIPE, dtype=EXACT)
    assert trajectory.eval_loss == pytest.approx(exact.eval_loss, rel=1e-3)


def test_no_step_leaves_anything_for_the_next():
    """What the backward pass needs is freed with the step, and an evaluation keeps nothing."""
    train, evaluation, own = sample(11, 2), sample(6, 2, seed=1), head(2)
    alive, left, steps = weakref.WeakSet(), [], []

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            alive.add(self)
            steps.append(len(left))

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        simulate([start((0,), (2,))], own, train, evaluation, RECIPE, on_step=lambda: left.append(len(alive)))
    assert left == [0] * RECIPE.steps
    assert steps.count(0) == steps.count(RECIPE.steps - 1) > 0  # the evaluations are beside the first and the last
    assert RECIPE.steps not in steps


def test_a_caller_without_gradients_gets_the_same_run():
    train, evaluation, own, begin = sample(11, 2), sample(6, 2, seed=1), head(2), start((0,), (2,))
    (expected,) = simulate([begin], own, train, evaluation, RECIPE)
    with torch.no_grad():
        (trajectory,) = simulate([begin], own, train, evaluation, RECIPE)
    assert trajectory.batch_loss == expected.batch_loss
    assert begin.a[0].grad is None
    assert own.weight.grad is None


def test_every_run_is_clipped_as_torch_clips_it():
    torch.manual_seed(0)
    shared, some = torch.nn.Parameter(normal(3, 4, 2)), torch.nn.Parameter(normal(2, 5))
    sizes = torch.tensor([0.01, 3.0, 10.0], dtype=EXACT)
    shared.grad, some.grad = normal(3, 4, 2) * sizes[:, None, None], normal(2, 5) * sizes[[0, 2], None]
    alone = [[shared.grad[0], some.grad[0]], [shared.grad[1]], [shared.grad[2], some.grad[1]]]
    expected, norms = [], []
    for gradients in alone:
        parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        expected.append([parameter.grad for parameter in parameters])
    assert norms[0] < 1 < min(norms[1:])
    clip_each([(shared, torch.arange(3)), (some, torch.tensor([0, 2]))], 3, 1.0)
    found = [[shared.grad[0], some.grad[0]], [shared.grad[1]], [shared.grad[2], some.grad[1]]]
    for run, wanted in zip(found, expected, strict=True):
        for gradient, clipped in zip(run, wanted, strict=True):
            assert torch.allclose(gradient, clipped, rtol=1e-14)


def test_a_step_is_that_of_adamw():
    """Written out: moments, their corrections, decay by the rate of the step; biases do not decay."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, dtype=EXACT)
    schedule = dataclasses.replace(RECIPE, weight_decay=0.5)
    optimizer = optimizer_of(schedule, model)
    held = [(model.weight, 0.5), (model.bias, 0.0)]
    values, first = [p.detach().clone() for p, _ in held], [torch.zeros_like(p) for p, _ in held]
    second = [torch.zeros_like(p) for p, _ in held]
    for number, rate in enumerate((0.0, 0.1, 0.3, 0.01), start=1):
        set_rate(optimizer, rate)
        for index, (parameter, decay) in enumerate(held):
            parameter.grad = gradient = normal(*parameter.shape)
            first[index] = 0.9 * first[index] + 0.1 * gradient
            second[index] = 0.999 * second[index] + 0.001 * gradient**2
            size = (second[index] / (1 - 0.999**number)).sqrt() + 1e-8
            values[index] = values[index] * (1 - rate * decay) - rate * first[index] / (1 - 0.9**number) / size
        optimizer.step()
        for (parameter, _), value in zip(held, values, strict=True):
            assert torch.allclose(parameter, value, rtol=1e-12)


def test_a_head_whose_modules_are_not_those_of_the_factors_is_refused():
    train = sample(4, 2, hidden=True)
    with pytest.raises(KernelError, match="1 modules below the head train, and 0 are given"):
        simulate([start((0,), (2,))], head(2), train, train, RECIPE)


def test_samples_that_do_not_belong_together_are_refused():
    train = sample(4, 2)
    with pytest.raises(KernelError, match="differ in sites or objective"):
        simulate([start((0,), (2,))], head(2), train, sample(4, 2, objective=Regression), RECIPE)
    other = dataclasses.replace(train, factors=dataclasses.replace(train.factors, sites=train.factors.sites[:1]))
    with pytest.raises(KernelError, match="differ in sites"):
        simulate([start((0,), (2,))], head(2), train, other, RECIPE)
    with pytest.raises(KernelError, match="nothing to simulate"):
        simulate([], head(2), train, train, RECIPE)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_a_lift_moves_the_outputs_of_its_probe_and_nothing_else(n_classes):
    torch.manual_seed(0)
    directions = of(Classification, n_classes).simulated().directions
    weight = normal(n_classes, WIDTH)
    r = lift(weight, directions)
    u = torch.as_tensor(directions).T @ weight
    assert torch.allclose(u @ r, torch.eye(len(u), dtype=EXACT))
    across = torch.eye(WIDTH, dtype=EXACT) - torch.linalg.pinv(u) @ u
    assert torch.allclose(across @ r, torch.zeros_like(r), atol=1e-12)
    # the differences of the outputs follow the centred ones; their sum does only where all outputs are differentiated
    z = u @ normal(WIDTH)
    moved = weight @ (r @ z)
    assert torch.allclose(torch.as_tensor(directions).T @ moved, z)
    change = normal(WIDTH)
    every = lift(weight, np.eye(n_classes))
    assert torch.allclose(weight @ (every @ (weight @ change)), weight @ change)
    assert not torch.allclose(weight @ (r @ (u @ change)), weight @ change, atol=1e-2)


@pytest.mark.parametrize("case", ["more outputs than inputs", "twice the same", "none"])
def test_a_lift_of_outputs_that_depend_on_each_other(case):
    torch.manual_seed(0)
    weight = normal(WIDTH + 2, WIDTH) if case == "more outputs than inputs" else normal(3, WIDTH)
    if case == "twice the same":
        weight = torch.stack([weight[0], weight[0] * (1 + 1e-7), weight[1]])  # as single precision holds them
    weight = torch.zeros_like(weight) if case == "none" else weight
    r = lift(weight.float(), np.eye(len(weight)))
    z = weight @ normal(WIDTH)
    assert torch.allclose(weight @ (r @ z), z, atol=1e-5)
    noisy = r @ (z + 0.01 * normal(len(z)))
    assert (noisy - r @ z).norm() < 0.1


def test_softmax_sees_the_differences_of_the_outputs_alone():
    """The premise of C − 1 directions; other losses need all."""
    torch.manual_seed(0)
    f, both, centred = normal(4, 3), normal(4, 1), of(Classification, 3).simulated().directions
    assert np.allclose(centred.sum(0), 0)
    labels, numbers = torch.arange(4) % 3, normal(4, 3)
    assert torch.allclose(of(Classification, 3).loss(f + both, labels), of(Classification, 3).loss(f, labels))
    assert not torch.allclose(of(Regression, 3).loss(f + both, numbers), of(Regression, 3).loss(f, numbers), atol=1e-2)


def test_the_first_examples_alone():
    train, evaluation, own = sample(11, 2), sample(6, 2, seed=1), head(2)
    schedule, begin = dataclasses.replace(RECIPE, train_rows=5), start((0, 1), (2, 2))
    half = first_examples(train, 5)
    (trajectory,) = simulate([begin], own, half, evaluation, schedule, dtype=EXACT)
    assert half.factors.n == 5
    assert_same(trajectory, slow(begin, own, half, evaluation, schedule)[0])


def test_outlooks_are_the_runs_of_the_recipe(monkeypatch):
    """In groups that fit into memory."""
    import foretune.forecasting.simulated_runs as module

    train, evaluation, own = sample(8, 2), sample(6, 2, seed=1), head(2)
    rows = tuple(normal(3, d_in) for d_in, _ in SHAPES)
    linearised = Linearised(train, evaluation, own, rows, 1, 0.0)
    schedule = dataclasses.replace(RECIPE, train_rows=20)
    starts = [linearised.start([]), linearised.start([0, 1]), linearised.start([2], 2)]
    monkeypatch.setattr(module, "ENTRIES", 80)
    steps = []
    found = simulate_runs(linearised, starts, schedule, points=2, on_step=lambda: steps.append(1))
    assert len(steps) == n_steps(starts, schedule) == 2 * schedule.steps
    for begin, simulated in zip(starts, found, strict=True):
        (trajectory,) = simulate([begin], own, train, evaluation, schedule, points=2, looks=schedule.looks(8))
        assert simulated.trajectory.eval_loss == pytest.approx(trajectory.eval_loss, rel=1e-4)
        assert simulated.end.eval_loss == simulated.trajectory.eval_loss[-1]
        assert simulated.end.eval_metric == simulated.trajectory.eval_metric[-1]
        assert simulated.end.train_loss == pytest.approx(np.mean(simulated.trajectory.batch_loss[-5:]))
        assert (simulated.samples, simulated.train_rows) == (8, 20)
    logits = evaluation.factors.logits
    labels = torch.as_tensor(evaluation.labels)
    assert found[0].probe_loss == pytest.approx(float(cross_entropy(logits, labels)))
    assert found[0].probe_metric == pytest.approx(float((logits.argmax(1) == labels).double().mean()))


def test_the_best_of_a_run_is_that_of_its_looks():
    """Evaluations elsewhere do not count; loss and metric are the best each by itself."""
    schedule = dataclasses.replace(RECIPE, train_rows=16, batch_size=4, epochs=2)
    course = Trajectory(
        steps=(0, 1, 2, 3, 4, 5, 6, 7, 8),
        train_loss=(1.0, 0.1),
        train_metric=(0.5, 0.9),
        eval_loss=(0.0, 0.0, 0.5, 0.0, 0.4, 0.0, 0.6, 0.0, 0.7),
        eval_metric=(1.0, 1.0, 0.8, 1.0, 0.7, 1.0, 0.75, 1.0, 0.6),
        batch_loss=(9.0, 9.0, 9.0, 9.0, 0.2, 0.4, 0.2, 0.4),
        movement=1.0,
        eval_logits=np.zeros((1, 2)),
    )
    looks = schedule.looks(16)
    assert looks == (2, 4, 6, 8)
    assert vars(best_of(course, schedule, ACCURACY, looks)).values() == pytest.approx([0.3, 0.4, 0.8])
    lost = dataclasses.replace(course, eval_metric=(0.5,) + (math.nan,) * 8)
    assert math.isnan(best_of(lost, schedule, ACCURACY, looks).eval_metric)
    some = dataclasses.replace(course, eval_metric=(0.5, 1.0, math.nan, 1.0, 0.7, 1.0, 0.6, 1.0, 0.5))
    assert best_of(some, schedule, ACCURACY, looks).eval_metric == 0.7


def test_simulated_runs_carry_their_best_and_heads_run_on_fewer_rows():
    train, evaluation, own = sample(8, 3), sample(6, 3, seed=1), head(3)
    rows = tuple(normal(3, d_in) for d_in, _ in SHAPES)
    linearised = Linearised(train, evaluation, own, rows, 1, 0.0)
    schedule = dataclasses.replace(RECIPE, train_rows=20)
    (run,) = simulate_runs(linearised, [linearised.start([0, 1])], schedule)
    assert set(schedule.looks(8)) == set(run.trajectory.steps[1:])  # whatever else is to be drawn
    assert run.best.eval_loss == min(run.trajectory.eval_loss[1:])
    assert run.best.eval_metric == max(run.trajectory.eval_metric[1:])
    assert run.best.train_loss == run.end.train_loss
    for asked, taken in ((4, 4), (99, 8)):
        smaller = dataclasses.replace(schedule, train_rows=taken)
        (alone,) = simulate([linearised.start([])], own, first_examples(train, taken), evaluation, smaller)
        assert head_alone_on(linearised, schedule, asked).eval_loss == pytest.approx(alone.eval_loss[-1])


INITS = {"kaiming": {}, "rslora": {"use_rslora": True}, "gaussian": {"init_lora_weights": "gaussian"}}
INITS["both"] = INITS["rslora"] | INITS["gaussian"]


@pytest.mark.parametrize("init", INITS)
def test_a_smaller_rank_starts_as_peft_starts_it(init):
    """The same scaling; and entries of A of the same size, which the steps of AdamW have to be held against."""
    large = read_adapters(place(tiny("bert"), lora("bert", r=4, **INITS[init]), seed=0))
    small = read_adapters(place(tiny("bert"), lora("bert", r=2, **INITS[init]), seed=0))
    rows = tuple(adapter.rows for adapter in large.adapters)
    train = dataclasses.replace(sample(4, 2), factors=dataclasses.replace(sample(4, 2).factors, sites=large.sites))
    linearised = Linearised(train, sample(4, 2), head(2), rows, 1, 0.0)
    whole, begin = linearised.start([3, 0]), linearised.start([3, 0], 2)
    assert whole.sites == begin.sites == (0, 3)
    assert [torch.equal(a, rows[site]) for a, site in zip(whole.a, (0, 3), strict=True)] == [True, True]
    assert whole.scaling == tuple(large.sites[site].scaling for site in (0, 3))
    assert begin.scaling == pytest.approx([small.sites[site].scaling for site in (0, 3)])
    factor = 2.0 if "gaussian" in str(INITS[init]) else 1.0  # peft's standard deviation is 1/r
    for a, site in zip(begin.a, (0, 3), strict=True):
        assert torch.allclose(a, factor * rows[site][:2])


def real_run(schedule, sequences, objective, targets, placed):
    """The whole network, trained as the Trainer trains it; dropout off."""
    trained = {n: p for n, p in placed.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for n, p in trained.items() if "bias" not in n], "weight_decay": schedule.weight_decay},
        {"params": [p for n, p in trained.items() if "bias" in n], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate)
    losses = []
    for rate, rows in zip(schedule.rates(), schedule.batches(len(sequences)), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = float(rate)
        optimizer.zero_grad()
        loss = slow_loss(objective, placed(**batch_of(sequences, rows.tolist()).inputs).logits, targets[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), schedule.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


REAL = [("bert", 2), ("roberta", 3), ("distilbert", 2), ("llama", 2)]
REAL = [(*case, Classification) for case in REAL] + [("bert", 2, Regression), ("roberta", 3, MultiLabel)]


@pytest.mark.parametrize(("name", "n_classes", "objective"), REAL)
def test_a_real_run_to_first_order_in_the_learning_rate(name, n_classes, objective):
    sequences = ragged(12)
    torch.manual_seed(4)
    targets = targets_of(objective, 12, n_classes)

    def errors(rate):
        schedule = Schedule(12, 3, 5, rate, weight_decay=0.5)
        placed = place(tiny(name, n_classes, spread=6.0), lora(name), seed=0)
        adapted = read_adapters(placed)
        reduction = of(objective, n_classes).simulated()
        factors = token_factors(adapted, [batch_of(sequences)], reduction, n=12, storage=EXACT)
        *below, last = (module.weight.detach().clone() for module in adapted.head.values())
        bias = list(adapted.head.values())[-1].bias
        own = Head(last, None if bias is None else bias.detach().clone(), tuple(below))
        lifts = lift(own.weight, reduction.directions)[None]
        held = Sample(factors, targets, lifts, torch.zeros(12, dtype=torch.long), of(objective, n_classes))
        rows = tuple(adapter.rows for adapter in adapted.adapters)
        begin = Linearised(held, held, own, rows, 1, 0.0).start(range(len(rows)))
        (trajectory,) = simulate([begin], own, held, held, schedule, dtype=EXACT)
        (still,) = simulate([begin], own, held, held, dataclasses.replace(schedule, learning_rate=1e-12), dtype=EXACT)
        found = real_run(schedule, sequences, of(objective, n_classes), targets, placed)
        moved = np.linalg.norm(found - np.array(still.batch_loss))
        return np.linalg.norm(found - np.array(trajectory.batch_loss)), moved

    (first, moved), (second, moved_half) = errors(4e-4), errors(2e-4)
    assert second < first / 2  # of second order
    assert moved_half > moved / 3  # of first order
    assert second < 0.1 * moved_half
