"""The run itself on the linearised model: AdamW on both A and B, and on the head, over the given steps.

A network that is linear in the change of each weight, with the change in LoRA's own form:

    f(x) = V (φ(x) + R z(x)) + b        z_a(x) = Σ_m Σ_t g_at(x) · s_m B_m A_m h_t(x)

where φ, h and g_a = ∂(u_a · φ)/∂y are those of the pretrained model (`foretune.ntk.factors`), u_a the k directions of
the head's inputs φ that a probe reads, and R = U⁺, p × k. It keeps two things that the tangent kernel drops. A trains:
at learning rates at which LoRA works, it moves by more than its own size. The head turns: an adapter learns slowly
until V reads what it changes. Dropped are the curvature of the network, dropout, and what changes φ across all u_a.
Many adapters are trained at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from foretune.errors import KernelError
from foretune.forecasting.head_layer import HeadLayer
from foretune.forecasting.recipe import Recipe
from foretune.forecasting.trained import Trained, TrainedLayer
from foretune.ntk.factors import ModuleTokens, TokenFactors

Labels = NDArray[np.integer]
BETAS, EPSILON = (0.9, 0.999), 1e-8  # AdamW's in the Trainer


@dataclass(frozen=True)
class Start:
    """An adapter and a head before training.

    Attributes:
        sites: Positions of the adapted modules in the factors.
        a: r × d_in matrix A of each.
        scaling: s of each.
    """

    sites: tuple[int, ...]
    a: tuple[Tensor, ...]
    scaling: tuple[float, ...]


@dataclass(frozen=True)
class Head:
    """The head's output layer before training.

    Attributes:
        weight: C × p.
        bias: C, or None where the layer has none.
        hidden: Weights of the trained modules below it, which weight decay shrinks; without them it leaves these alone.
        layer: The trained layer below it, if there is one and its activation is known: it is then simulated as it is.
            Otherwise trained modules below are simulated to first order.
    """

    weight: Tensor
    bias: Tensor | None
    hidden: tuple[Tensor, ...] = ()
    layer: HeadLayer | None = None


@dataclass(frozen=True)
class Sample:
    """Examples with their factors and labels.

    Attributes:
        factors: Token factors, of the outputs that probes give.
        labels: Classes from 0.
        lifts: R of each of F probes, F × p × k; from `lift`.
        fold: Which probe each example's factors were taken under, n integers.
    """

    factors: TokenFactors
    labels: Labels
    lifts: Tensor
    fold: Tensor


def lift(weight: Tensor, directions: NDArray[np.float64]) -> Tensor:
    """Find how the head's inputs change, at the least, when the differentiated outputs of a probe change.

    Args:
        weight: C × p weight of the probe.
        directions: C × k outputs that were differentiated.

    Returns:
        R = U⁺ with U = directionsᵀ · weight, p × k.
    """
    u = torch.as_tensor(directions, dtype=torch.float64, device=weight.device).T @ weight.double()
    lifted: Tensor = torch.linalg.pinv(u)
    return lifted


@dataclass(frozen=True)
class Course:
    """Course of a simulated run. Losses in nats, accuracies as fractions; the first entry is before training.

    Attributes:
        steps: Steps done at each evaluation.
        train_loss: On the training examples, before training and at the end.
        train_accuracy: On them, likewise.
        eval_loss: On the evaluation examples.
        eval_accuracy: On them.
        batch_loss: Loss of every step's batch before the step.
        movement: ‖s B A‖ / ‖A_0‖ at the end, root mean square over the modules; 0 without adapter.
        eval_logits: m × C at the end.
    """

    steps: tuple[int, ...]
    train_loss: tuple[float, ...]
    train_accuracy: tuple[float, ...]
    eval_loss: tuple[float, ...]
    eval_accuracy: tuple[float, ...]
    batch_loss: tuple[float, ...]
    movement: float
    eval_logits: NDArray[np.float32] = field(repr=False)


@dataclass
class _Module:
    """An adapted module in the runs that adapt it: A is runs × r × d_in, B is runs × r × d_out."""

    site: int
    runs: Tensor
    scaling: Tensor
    a: Trained
    b: Trained


class _Runs:
    """Several simulated runs, side by side."""

    def __init__(
        self, starts: Sequence[Start], head: Head, factors: TokenFactors, dtype: torch.dtype, *, train_a: bool
    ) -> None:
        self.count, self.dtype, self.train_a = len(starts), dtype, train_a
        device = factors.logits.device
        everyone = torch.arange(self.count, device=device)
        self.head = Trained.of(head.weight.to(device, dtype).repeat(self.count, 1, 1), everyone)
        self.bias = None
        if head.bias is not None:
            self.bias = Trained.of(head.bias.to(device, dtype).repeat(self.count, 1), everyone, decayed=False)
        self.layer = None if head.layer is None else TrainedLayer.of(head.layer, self.head.value, everyone)
        self.hidden: list[tuple[Trained, Trained]] = []
        parts = self.linear(factors)
        for part, origin in zip(parts, head.hidden or (None,) * len(parts), strict=True):
            shape = (self.count, part.g.shape[2], part.h.shape[1])
            zeros = torch.zeros(shape, dtype=dtype, device=device)
            whole = None if origin is None else origin.to(device, dtype)
            weight = Trained.of(zeros, everyone, decayed=whole is not None, origin=whole)
            self.hidden.append((weight, Trained.of(zeros[..., 0].clone(), everyone, decayed=False)))
        self.modules = [
            _module(site, starts, int(factors.modules[site].g.shape[2]), self.head.value, train_a=train_a)
            for site in sorted({site for start in starts for site in start.sites})
        ]

    def linear(self, factors: TokenFactors) -> tuple[ModuleTokens, ...]:
        """The head's modules that are simulated to first order."""
        return factors.hidden if self.layer is None else ()

    def trained(self) -> list[Trained]:
        held = [self.head, *([] if self.bias is None else [self.bias])]
        held += [] if self.layer is None else [self.layer.weight, self.layer.bias]
        held += [tensor for pair in self.hidden for tensor in pair]
        return held + [tensor for module in self.modules for tensor in (module.a, module.b)]

    def logits(self, sample: Sample, rows: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Logits, examples × runs × C, and what the backward pass needs again."""
        factors, lifts, fold = sample.factors, sample.lifts.to(self.dtype), sample.fold[rows]
        below: tuple[Tensor, ...] = ()
        if self.layer is None:
            phi = factors.inputs[rows].to(self.dtype)
            f = torch.einsum("np,acp->nac", phi, self.head.value)
        else:
            _, below_h, _ = factors.hidden[0].of(rows, self.dtype)
            pre, phi = self.layer.forward(below_h)
            f, below = torch.einsum("nap,acp->nac", phi, self.head.value), (below_h, pre)
        if self.bias is not None:
            f = f + self.bias.value
        z = torch.zeros(len(rows), factors.reduction.n_outputs, self.count, dtype=self.dtype, device=f.device)
        kept: list[tuple[Tensor, ...]] = []
        for part, (weight, bias) in zip(self.linear(factors), self.hidden, strict=True):
            place, h, g = part.of(rows, self.dtype)
            moved = torch.einsum("tp,aqp->taq", h, weight.value) + bias.value
            z.index_add_(0, place, torch.einsum("ktq,taq->tka", g, moved))
            kept.append((place, h, g))
        for module in self.modules:
            place, h, g = factors.modules[module.site].of(rows, self.dtype)
            runs, rank = module.a.value.shape[:2]
            u = (h @ module.a.value.flatten(0, 1).T).unflatten(1, (runs, rank))
            w = (g @ module.b.value.flatten(0, 1).T).unflatten(2, (runs, rank))
            per_token = (u * w).sum(3).transpose(0, 1) * module.scaling  # tokens × k × runs
            part_z = z.new_zeros(len(rows), z.shape[1], runs).index_add_(0, place, per_token)
            z.index_add_(2, module.runs, part_z)
            kept.append((place, h, g, u, w))
        reads = torch.einsum("acp,fpk->fack", self.head.value, lifts)[fold]  # ∂f/∂z of each example
        return f + torch.einsum("nka,nack->nac", z, reads), [(phi, lifts, fold, reads, z, *below), *kept]

    def gradients(self, kept: list[tuple[Tensor, ...]], slope: Tensor) -> list[Tensor]:
        """Gradients of each run's loss, in the order of `trained`; slope is ∂loss/∂logits, examples × runs × C."""
        (phi, lifts, fold, reads, z, *below), *rest = kept
        by_fold = reads.new_zeros(len(lifts), *reads.shape[1:])
        by_fold.index_add_(0, fold, torch.einsum("nac,nka->nack", slope, z))
        over_phi = "nac,np->acp" if self.layer is None else "nac,nap->acp"
        found = [torch.einsum(over_phi, slope, phi) + torch.einsum("fack,fpk->acp", by_fold, lifts)]
        if self.bias is not None:
            found.append(slope.sum(0))
        if self.layer is not None:
            found += self.layer.gradients(torch.einsum("nac,acp->nap", slope, self.head.value), *below)
        chi = torch.einsum("nac,nack->nka", slope, reads)
        for place, h, g in rest[: len(self.hidden)]:
            y = torch.einsum("tka,ktq->taq", chi[place], g)
            found += [torch.einsum("taq,tp->aqp", y, h), y.sum(0)]
        for module, (place, h, g, u, w) in zip(self.modules, rest[len(self.hidden) :], strict=True):
            scaled = (chi[:, :, module.runs] * module.scaling)[place].transpose(0, 1)[
                ..., None
            ]  # k × tokens × runs × 1
            to_a = (scaled * w).sum(0).flatten(1)
            to_b = (scaled * u).flatten(2)
            moved = (to_a.T @ h).unflatten(0, u.shape[1:])
            found.append(moved if self.train_a else torch.zeros_like(moved))
            found.append((to_b.flatten(0, 1).T @ g.flatten(0, 1)).unflatten(0, u.shape[1:]))
        return found

    def step(self, gradients: list[Tensor], rate: float, number: int, recipe: Recipe) -> None:
        """One step of AdamW on every run, its gradient clipped to the norm as a whole."""
        squares = self.head.value.new_zeros(self.count)
        held = self.trained()
        for tensor, gradient in zip(held, gradients, strict=True):
            squares.index_add_(0, tensor.runs, gradient.flatten(1).square().sum(1))
        clip = (recipe.max_grad_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        first, second = BETAS
        for tensor, gradient in zip(held, gradients, strict=True):
            clipped = gradient * clip[tensor.runs].reshape(-1, *[1] * (gradient.ndim - 1))
            tensor.first.lerp_(clipped, 1.0 - first)
            tensor.second.mul_(second).addcmul_(clipped, clipped, value=1.0 - second)
            if tensor.decayed and recipe.weight_decay:
                whole = tensor.value if tensor.origin is None else tensor.value + tensor.origin
                tensor.value.sub_(whole, alpha=rate * recipe.weight_decay)
            size = (tensor.second / (1.0 - second**number)).sqrt_().add_(EPSILON)
            tensor.value.addcdiv_(tensor.first, size, value=-rate / (1.0 - first**number))

    def movement(self, initial: Sequence[Tensor]) -> NDArray[np.float64]:
        """How far each run's adapters went from zero, in units of its own A."""
        total, modules = np.zeros(self.count), np.zeros(self.count)
        for module, before in zip(self.modules, initial, strict=True):
            # ‖BA‖² = tr (BᵀB)(AAᵀ), r × r
            a, b = module.a.value.double(), module.b.value.double()
            square = ((b @ b.mT) * (a @ a.mT)).sum((1, 2)) * module.scaling.double() ** 2
            share = square / before.double().square().sum((1, 2))
            np.add.at(total, module.runs.cpu().numpy(), share.cpu().numpy())
            np.add.at(modules, module.runs.cpu().numpy(), 1.0)
        return np.asarray(np.sqrt(total / np.maximum(modules, 1.0)))


def _module(site: int, starts: Sequence[Start], d_out: int, like: Tensor, *, train_a: bool) -> _Module:
    """Stack the runs that adapt a module; smaller ranks are filled up with zeros, which stay zero."""
    runs = [run for run, start in enumerate(starts) if site in start.sites]
    own = [starts[run].a[starts[run].sites.index(site)] for run in runs]
    scaling = [starts[run].scaling[starts[run].sites.index(site)] for run in runs]
    rank = max(len(a) for a in own)
    a = like.new_zeros(len(runs), rank, own[0].shape[1])
    for index, rows in enumerate(own):
        a[index, : len(rows)] = rows
    where = torch.tensor(runs, device=like.device)
    b = like.new_zeros(len(runs), rank, d_out)
    return _Module(site, where, like.new_tensor(scaling), Trained.of(a, where, decayed=train_a), Trained.of(b, where))


def simulate(
    starts: Sequence[Start],
    head: Head,
    train: Sample,
    evaluation: Sample,
    recipe: Recipe,
    *,
    points: int = 1,
    train_a: bool = True,
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[], None] | None = None,
) -> tuple[Course, ...]:
    """Train every adapter, each with its own head, on the linearised model.

    Loss: cross-entropy. B starts at 0, A and the head as given. Where the recipe has more rows than the sample, the
    sample's rows come again instead of rows that are not known: such a run fits its rows better than the real one.

    Args:
        starts: Adapters; one without sites is a head that trains alone.
        head: The head that all start from; initial logits are V φ + b.
        train: Training examples.
        evaluation: Examples to predict.
        recipe: Steps, rates and batches.
        points: Evaluations spread over the steps, beside the one before training; the last is at the end.
        train_a: Whether A trains; fixed, the adapter is what its tangent kernel says.
        dtype: Type to compute in.
        on_step: Called after each step.

    Returns:
        A course for each start.

    Raises:
        KernelError: If the samples do not belong together.
    """
    if train.factors.sites != evaluation.factors.sites or not starts:
        raise KernelError("the two samples' factors differ in sites, or there is nothing to simulate")
    runs = _Runs(starts, head, train.factors, dtype, train_a=train_a)
    device = train.factors.logits.device
    initial = [module.a.value.clone() for module in runs.modules]
    labels = torch.as_tensor(train.labels, device=device, dtype=torch.long)
    at = sorted({round(recipe.steps * point / points) for point in range(1, points + 1)})
    fitted, measured = [_evaluate(runs, train)], [(0, _evaluate(runs, evaluation))]
    batch_losses = []
    steps = zip(recipe.rates(), recipe.batches(len(labels)), strict=True)
    for number, (rate, batch) in enumerate(steps, start=1):
        rows = torch.as_tensor(batch, device=device)
        f, kept = runs.logits(train, rows)
        slope, losses = _slope(f, labels[rows])
        batch_losses.append(losses.cpu().numpy())
        runs.step(runs.gradients(kept, slope), float(rate), number, recipe)
        del kept
        if number in at:
            measured.append((number, _evaluate(runs, evaluation)))
        if on_step is not None:
            on_step()
    fitted.append(_evaluate(runs, train))
    return _courses(runs, fitted, measured, np.array(batch_losses), runs.movement(initial))


def _slope(f: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """∂/∂f of the mean cross-entropy of each run, and that loss."""
    log_p = torch.log_softmax(f, dim=2)
    chosen = labels[:, None, None].expand(-1, f.shape[1], 1)
    losses = -log_p.gather(2, chosen)[..., 0].mean(0)
    slope = log_p.exp().scatter_add_(2, chosen, -torch.ones_like(chosen, dtype=f.dtype))
    return slope / len(labels), losses


_Measured = tuple[Tensor, Tensor, Tensor]


def _evaluate(runs: _Runs, sample: Sample) -> _Measured:
    """Loss and accuracy of each run, and logits examples × runs × C."""
    device = sample.factors.logits.device
    everything = torch.arange(sample.factors.n, device=device)
    f = torch.cat([runs.logits(sample, rows)[0] for rows in everything.split(64)])
    labels = torch.as_tensor(sample.labels, device=device, dtype=torch.long)
    wanted = labels[:, None].expand(-1, runs.count)
    losses = cross_entropy(f.flatten(0, 1), wanted.flatten(), reduction="none").unflatten(0, (-1, runs.count))
    return losses.mean(0), (f.argmax(2) == wanted).to(f.dtype).mean(0), f


def _courses(
    runs: _Runs,
    fitted: Sequence[_Measured],
    measured: Sequence[tuple[int, _Measured]],
    batch_losses: NDArray[np.float32],
    movement: NDArray[np.float64],
) -> tuple[Course, ...]:
    def over_time(entries: Sequence[_Measured], what: int, run: int) -> tuple[float, ...]:
        return tuple(float(entry[what][run]) for entry in entries)

    held = [entry for _, entry in measured]

    return tuple(
        Course(
            steps=tuple(number for number, _ in measured),
            train_loss=over_time(fitted, 0, run),
            train_accuracy=over_time(fitted, 1, run),
            eval_loss=over_time(held, 0, run),
            eval_accuracy=over_time(held, 1, run),
            batch_loss=tuple(float(loss) for loss in batch_losses[:, run]),
            movement=float(movement[run]),
            eval_logits=held[-1][2][:, run].float().cpu().numpy(),
        )
        for run in range(runs.count)
    )
