"""The linearised model that simulated runs train: linear in the change of each weight, the change in LoRA's own form.

    f(x) = V (φ(x) + R z(x)) + b        z_a(x) = Σ_m Σ_t g_at(x) · s_m B_m A_m h_t(x)

where φ, h and g_a = ∂(u_a · φ)/∂y are those of the pretrained model (`foretune.ntk.factors`), u_a the k directions of
the head's inputs φ that a probe reads, and R = U⁺, p × k. It keeps two things that the tangent kernel drops. A trains:
at learning rates at which LoRA works, it moves by more than its own size. The head turns: an adapter learns slowly
until V reads what it changes. Dropped are the curvature of the network, dropout, and what changes φ across all u_a.

What other methods train (the scales of (IA)³, the magnitudes of DoRA, …) counts to first order: z_a(x) grows by
v_a(x) · (θ − θ_0) with v_a = ∂(u_a · φ)/∂θ.

Many adapters train at once, their parameters stacked over runs: the gradient of the summed losses is that of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foretune.errors import KernelError
from foretune.forecasting.head_layer import ACTIVATIONS, HeadLayer
from foretune.ntk.factors import ModuleTokens, TokenFactors
from foretune.tasks.objective import Objective


@dataclass(frozen=True)
class FirstOrder:
    """Numbers θ of an adapter that is not LoRA, or its part that is not, which count to first order.

    Attributes:
        position: Of their features in `Sample.first_order`.
        origin: w numbers θ_0 before training.
    """

    position: int
    origin: Tensor


@dataclass(frozen=True)
class Start:
    """An adapter before training; B is 0.

    Attributes:
        sites: Positions of the adapted modules in the factors.
        a: r × d_in matrix A of each.
        scaling: s of each.
        first_order: What else it trains.
    """

    sites: tuple[int, ...]
    a: tuple[Tensor, ...]
    scaling: tuple[float, ...]
    first_order: tuple[FirstOrder, ...] = ()


@dataclass(frozen=True)
class Head:
    """The head's output layer before training.

    Attributes:
        weight: C × p.
        bias: C, or None where the layer has none.
        hidden: Weights of the trained modules below it that are simulated to first order, one for each of the factors'
            `hidden`; none of them where `layer` is given.
        layer: The trained layer below it, if there is one and its activation is known: it is then simulated as it is.
    """

    weight: Tensor
    bias: Tensor | None
    hidden: tuple[Tensor, ...] = ()
    layer: HeadLayer | None = None


@dataclass(frozen=True)
class Sample:
    """Examples with their factors and targets.

    Attributes:
        factors: Token factors, of the outputs that probes give.
        targets: What the objective's loss takes.
        lifts: R of each of F probes, F × p × k; from `lift`.
        fold: Which probe each example's factors were taken under, n integers.
        objective: Loss and metrics of the targets.
        first_order: Features k × n × w of what methods beside LoRA train, under the same probes.
    """

    factors: TokenFactors
    targets: Tensor
    lifts: Tensor
    fold: Tensor
    objective: Objective
    first_order: tuple[Tensor, ...] = ()

    @property
    def labels(self) -> NDArray[np.integer]:
        """Classes of the examples.

        Raises:
            KernelError: If the targets are no classes.
        """
        if self.targets.ndim != 1 or self.targets.is_floating_point():
            raise KernelError(f"targets of shape {tuple(self.targets.shape)} and {self.targets.dtype} are no classes")
        return self.targets.cpu().numpy()


def lift(weight: Tensor, directions: NDArray[np.float64]) -> Tensor:
    """Find how the head's inputs change, at the least, when the differentiated outputs of a probe change.

    A change Δφ changes the k differentiated outputs by z = U Δφ, and R z is the smallest change that does the same:
    Δφ less its part across all rows of U. What the directions leave out of the C outputs is lost with it. The C − 1 of
    a basis of the centred outputs are therefore enough for a loss that takes outputs by their differences alone, as
    softmax does; any other (squared error, a sigmoid each) needs all of them, directions of rank C such as the
    identity: then U = weight, and a head equal to the probe reads V R z = z wherever z can come from a change of φ.
    The rows may be dependent (outputs that always agree, C > p): singular values that single precision does not resolve
    count as zero, since their inverse would blow up the rounding of z.

    Args:
        weight: C × p weight of the probe.
        directions: C × k outputs that were differentiated.

    Returns:
        R = U⁺ with U = directionsᵀ · weight, p × k.
    """
    u = torch.as_tensor(directions, dtype=torch.float64, device=weight.device).T @ weight.double()
    lifted: Tensor = torch.linalg.pinv(u, rtol=max(u.shape) * torch.finfo(torch.float32).eps)
    return lifted


class StackedAdapter(nn.Module):
    """One adapted module in the runs that adapt it; smaller ranks are filled up with zeros, which stay zero.

    Attributes:
        site: Position of the module in the factors.
        runs: The runs, m of them.
        scaling: s of each.
        a: m × r × d_in.
        b: m × r × d_out, transposed.
        square: ‖A‖² of each before training.
    """

    def __init__(self, site: int, starts: Sequence[Start], d_out: int, like: Tensor, *, train_a: bool) -> None:
        super().__init__()
        self.site = site
        runs = [run for run, start in enumerate(starts) if site in start.sites]
        matrices = [starts[run].a[starts[run].sites.index(site)] for run in runs]
        scaling = [starts[run].scaling[starts[run].sites.index(site)] for run in runs]
        rank = max(len(a) for a in matrices)
        stacked = like.new_zeros(len(runs), rank, matrices[0].shape[1])
        for index, a in enumerate(matrices):
            stacked[index, : len(a)] = a
        self.runs = torch.tensor(runs, device=like.device)
        self.scaling = like.new_tensor(scaling)
        self.square = stacked.double().square().sum((1, 2))
        self.a = nn.Parameter(stacked, requires_grad=train_a)
        self.b = nn.Parameter(like.new_zeros(len(runs), rank, d_out))

    def movement(self) -> Tensor:
        """‖s B A‖² / ‖A_0‖² of each run; ‖B A‖² = tr (BᵀB)(AAᵀ), of r × r matrices."""
        a, b = self.a.detach().double(), self.b.detach().double()
        square = ((b @ b.mT) * (a @ a.mT)).sum((1, 2)) * self.scaling.double() ** 2
        return square / self.square


class _Adapter(StackedAdapter):
    """An adapted module by its token factors."""

    def forward(self, h: Tensor, g: Tensor) -> Tensor:
        """Compute g · s B A h of every position: T × d_in and k × T × d_out → T × k × m."""
        changed: Tensor = _Product.apply(h, g, self.a, self.b)
        return changed * self.scaling


class _Product(torch.autograd.Function):
    """g · B A h of every position, and its gradient: the four matrix products that it takes, and nothing of their size.

    With u = A h and w = Bᵀ g, both of r numbers, and c the gradient of a position: ∂/∂A = Σ c w hᵀ, ∂/∂Bᵀ = Σ c u gᵀ.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, g: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Take T × d_in, k × T × d_out, m × r × d_in and m × r × d_out to T × k × m."""
        u = (h @ a.flatten(0, 1).T).unflatten(1, a.shape[:2])
        w = (g @ b.flatten(0, 1).T).unflatten(2, b.shape[:2])
        ctx.save_for_backward(h, g, u, w)
        product: Tensor = torch.linalg.vecdot(u, w).transpose(0, 1)
        return product

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[None, None, Tensor | None, Tensor]:
        """Take the gradient of the result, T × k × m, to those of A and Bᵀ."""
        h, g, u, w = ctx.saved_tensors
        c = c.transpose(0, 1)[..., None]
        of_a = None
        if ctx.needs_input_grad[2]:
            of_a = ((c * w).sum(0).flatten(1).T @ h).unflatten(0, w.shape[2:])
        of_b = (c * u).flatten(2).flatten(0, 1).T @ g.flatten(0, 1)
        return None, None, of_a, of_b.unflatten(0, u.shape[1:])


class _FirstOrder(nn.Module):
    """Numbers that count to first order, in the runs that train them: θ, runs × w."""

    def __init__(self, position: int, starts: Sequence[Start], like: Tensor) -> None:
        super().__init__()
        self.position = position
        by_run = {
            run: part.origin
            for run, start in enumerate(starts)
            for part in start.first_order
            if part.position == position
        }
        self.runs = torch.tensor(list(by_run), device=like.device)
        self.origin = torch.stack([origin.to(like) for origin in by_run.values()])
        self.weight = nn.Parameter(self.origin.clone())

    def forward(self, v: Tensor) -> Tensor:
        """Compute v · (θ − θ_0): k × n × w → n × k × runs."""
        changed: Tensor = torch.einsum("knw,mw->nkm", v, self.weight - self.origin)
        return changed


class _Change(nn.Module):
    """A trained module of the head to first order: its weight W, runs × q × d, whose change from W_0 counts."""

    def __init__(self, origin: Tensor, runs: int) -> None:
        super().__init__()
        self.origin = origin
        self.weight = nn.Parameter(origin.repeat(runs, 1, 1))
        self.bias = nn.Parameter(origin.new_zeros(runs, len(origin)))

    def forward(self, h: Tensor, g: Tensor) -> Tensor:
        """Compute g · ((W − W_0) h + c) of every position: T × d and k × T × q → T × k × runs."""
        moved = torch.einsum("tp,aqp->taq", h, self.weight - self.origin) + self.bias
        return torch.einsum("ktq,taq->tka", g, moved)


class _Layer(nn.Module):
    """The head's hidden layer φ = σ(W h + c): W runs × p × d, c runs × p."""

    def __init__(self, layer: HeadLayer, like: Tensor, runs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.to(like).repeat(runs, 1, 1))
        self.bias = nn.Parameter(layer.bias.to(like).repeat(runs, 1))
        self.activation = ACTIVATIONS[layer.activation]

    def forward(self, h: Tensor) -> Tensor:
        """Compute φ: n × d → runs × n × p."""
        return self.activation(torch.einsum("nd,apd->anp", h, self.weight) + self.bias[:, None])


class LinearRuns(nn.Module):
    """Several runs of the linearised model, side by side.

    Attributes:
        count: Number of runs.
        stacked: All trained parameters, runs on their first axis, and which runs these are.
    """

    def __init__(
        self, starts: Sequence[Start], head: Head, factors: TokenFactors, dtype: torch.dtype, *, train_a: bool
    ) -> None:
        super().__init__()
        self.count = len(starts)
        first_order = factors.hidden if head.layer is None else ()
        if len(head.hidden) != len(first_order):
            raise KernelError(f"{len(first_order)} modules below the head train, and {len(head.hidden)} are given")
        like = torch.zeros(0, dtype=dtype, device=factors.logits.device)
        self.weight = nn.Parameter(head.weight.to(like).repeat(self.count, 1, 1))
        self.bias = None if head.bias is None else nn.Parameter(head.bias.to(like).repeat(self.count, 1))
        self.layer = None if head.layer is None else _Layer(head.layer, like, self.count)
        self.changes = tuple(_Change(origin.to(like), self.count) for origin in head.hidden)
        self.adapters = tuple(
            _Adapter(site, starts, int(factors.modules[site].g.shape[2]), like, train_a=train_a)
            for site in sorted({site for start in starts for site in start.sites})
        )
        self.others = tuple(
            _FirstOrder(position, starts, like)
            for position in sorted({part.position for start in starts for part in start.first_order})
        )
        self.parts = nn.ModuleList((*self.changes, *self.adapters, *self.others))  # registers their parameters
        everyone = torch.arange(self.count, device=like.device)
        self.stacked = tuple(
            (parameter, module.runs if isinstance(module, _Adapter | _FirstOrder) else everyone)
            for module in self.modules()
            for parameter in module.parameters(recurse=False)
            if parameter.requires_grad
        )

    def forward(self, sample: Sample, rows: Tensor) -> Tensor:
        """Compute V (φ + R z) + b of m examples: runs × m × C."""
        factors, dtype = sample.factors, self.weight.dtype
        phi: Tensor
        if self.layer is None:
            phi = factors.inputs[rows].to(dtype)
        else:
            _, below, _ = factors.hidden[0].of(rows, dtype)
            phi = self.layer(below)
        lifts = sample.lifts.to(dtype)[sample.fold[rows]]
        moved = torch.einsum("npk,nka->anp", lifts, self.z(sample, rows))
        f = torch.einsum("anp,acp->anc", phi + moved, self.weight)
        return f if self.bias is None else f + self.bias[:, None]

    def z(self, sample: Sample, rows: Tensor) -> Tensor:
        """Add up what all modules change of the differentiated outputs: m × k × runs."""
        factors = sample.factors
        z = self.weight.new_zeros(len(rows), factors.reduction.n_outputs, self.count)
        gathered = _Gathered(rows, z.dtype)
        for tokens, change in zip(factors.hidden, self.changes, strict=False):  # none where the layer is as it is
            z = z + _summed(gathered.of(tokens), change, z)
        for adapter in self.adapters:
            part = _summed(gathered.of(factors.modules[adapter.site]), adapter, z[..., : len(adapter.runs)])
            z = z.index_add(2, adapter.runs, part)
        for other in self.others:
            v = sample.first_order[other.position].index_select(1, rows).to(z.dtype)
            z = z.index_add(2, other.runs, other(v))
        factors.let_go()
        return z

    def movement(self) -> NDArray[np.float64]:
        """How far each run's adapters went from zero, in units of their own A."""
        return mean_movement(self.adapters, self.count)


def mean_movement(adapters: Sequence[StackedAdapter], count: int) -> NDArray[np.float64]:
    """Say how far runs went from where they began.

    Args:
        adapters: Adapted modules of the runs.
        count: Number of runs.

    Returns:
        ‖s B A‖ / ‖A_0‖ of each run, root mean square over its modules; 0 without.
    """
    total, modules = np.zeros(count), np.zeros(count)
    for adapter in adapters:
        runs = adapter.runs.cpu().numpy()
        np.add.at(total, runs, adapter.movement().cpu().numpy())
        np.add.at(modules, runs, 1.0)
    return np.asarray(np.sqrt(total / np.maximum(modules, 1.0)))


class _Gathered:
    """Positions of some examples, as `ModuleTokens.of` gives them; what modules share is gathered once.

    Of the inputs only the last are kept: modules that read the same stand side by side.
    """

    def __init__(self, rows: Tensor, dtype: torch.dtype) -> None:
        self._rows, self._dtype = rows, dtype
        self._positions: dict[int, tuple[Tensor, Tensor]] = {}  # by the bounds
        self._read: tuple[Tensor, Tensor, Tensor] | None = None  # all inputs, bounds and those gathered

    def of(self, tokens: ModuleTokens) -> tuple[Tensor, Tensor, Tensor]:
        """Place among the examples, h and g of every position of a module."""
        if id(tokens.starts) not in self._positions:
            self._positions[id(tokens.starts)] = tokens.positions(self._rows)
        place, positions = self._positions[id(tokens.starts)]
        if self._read is None or self._read[0] is not tokens.h or self._read[1] is not tokens.starts:
            self._read = tokens.h, tokens.starts, tokens.h.index_select(0, positions).to(self._dtype)
        return place, self._read[2], tokens.g.index_select(1, positions).to(self._dtype)


def _summed(positions: tuple[Tensor, Tensor, Tensor], module: nn.Module, like: Tensor) -> Tensor:
    """Sum a module's T × k × m over the positions of each example, to the shape of `like`."""
    place, h, g = positions
    return torch.zeros_like(like).index_add(0, place, module(h, g))
