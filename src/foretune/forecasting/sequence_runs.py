"""Simulated runs of a language model: A and B train on the sketches of its sequences.

For a sequence i with T_i targets, loss ℓ_i = Σ_t ℓ_it and sketches C_ia (`foretune.ntk.sketches`), a change s B A of
the adapted modules changes the loss and those of drawn labels by

    z_ia = Σ_m s_m ⟨C_ia, (Q_gᵀ B_m)(A_m Q_h)⟩,   a = 0 … S

and the loss of the sequence becomes, with the curvature of its Gauss–Newton matrix as the draws sketch it,

    quadratic:  L_i = ℓ_i + z_i0 + (1/2S) Σ_s z_is²
    bounded:    L_i = Σ_t log(1 + e^{u_t − m}) + (1/2S) Σ_s z_is²,  u_t = log((1−p_t)/p_t),  m = −z_i0 / Σ_t (1−p_t)

The quadratic one is unbiased where the draws played no part in the change, on sequences to predict. On those that
train, the change would run down along z_i0, for the few drawn directions hardly meet it: there the bounded one, whose
targets move together as if each had one rival, with the same value and slope at 0, and never below 0.
A batch's loss is Σ_i L_i / Σ_i T_i, as the Trainer and TRL average.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import softplus

from foretune.errors import KernelError
from foretune.forecasting.linear_model import StackedAdapter, Start, mean_movement
from foretune.ntk.sketches import SequenceSketches

CHUNK = 16  # sequences whose sketches are in the type of the computation at once
Link = Literal["quadratic", "bounded"]


@dataclass(frozen=True)
class SequenceSample:
    """Sequences with their sketches.

    Attributes:
        sketches: Sketches.
        link: How a change of the loss is read.
    """

    sketches: SequenceSketches
    link: Link

    def loss(self, z: Tensor, rows: Tensor) -> Tensor:
        """Loss of sequences, summed over their targets.

        Args:
            z: m × (1 + S) × runs changes.
            rows: m sequences.

        Returns:
            m × runs losses.
        """
        s = self.sketches
        curvature = z[:, 1:].square().sum(1) / (2 * max(1, s.draws))
        if self.link == "quadratic":
            return s.losses.to(z.dtype)[rows][:, None] + z[:, 0] + curvature
        each, place = rows.unique(return_inverse=True)  # a row may be there more than once
        wanted = torch.full((s.n,), -1, device=rows.device)
        wanted[each] = torch.arange(len(each), device=rows.device)
        chosen = wanted[s.place] >= 0
        where, own = wanted[s.place[chosen]], s.target_losses[chosen].to(z.dtype)
        missing = -torch.expm1(-own)  # 1 − p
        odds = missing.clamp(min=torch.finfo(z.dtype).tiny).log() + own
        of_sequence = z.new_zeros(len(each)).index_add(0, where, missing).clamp(min=torch.finfo(z.dtype).tiny)
        first = torch.empty_like(each).scatter(0, place, torch.arange(len(rows), device=rows.device))
        m = -z[first, 0] / of_sequence[:, None]
        bounded = z.new_zeros(m.shape).index_add(0, where, softplus(odds[:, None] - m[where]))
        return bounded[place] + curvature


class _Sketched(StackedAdapter):
    """An adapted module by the sketches of the sequences."""

    def change(self, of_g: Tensor, of_h: Tensor) -> Tensor:
        """Compute s (Q_gᵀ B)(A Q_h) of each run: q_g × q_h each, flat."""
        product = (self.b @ of_g).mT @ (self.a @ of_h)
        return (product * self.scaling[:, None, None]).flatten(1)


class SequenceRuns(nn.Module):
    """Several runs on the sketches, side by side.

    Attributes:
        count: Number of runs.
        stacked: All trained parameters, runs on their first axis, and which runs these are.
    """

    def __init__(self, starts: Sequence[Start], sketches: SequenceSketches, dtype: torch.dtype, *, train_a: bool):
        super().__init__()
        self.count = len(starts)
        if not any(start.sites for start in starts):
            raise KernelError("no adapter trains: a language model has no head to train without one")
        like = torch.zeros(0, dtype=dtype, device=sketches.target_losses.device)
        self.adapters = tuple(
            _Sketched(site, starts, len(sketches.bases[site].g), like, train_a=train_a)
            for site in sorted({site for start in starts for site in start.sites})
        )
        self.parts = nn.ModuleList(self.adapters)  # registers their parameters
        self.stacked = tuple(
            (parameter, adapter.runs)
            for adapter in self.adapters
            for parameter in adapter.parameters()
            if parameter.requires_grad
        )
        self._bases = [
            (sketches.bases[adapter.site].g.to(like), sketches.bases[adapter.site].h.to(like))
            for adapter in self.adapters
        ]

    def changes(self) -> list[Tensor]:
        """What each module has changed of its weight, in its directions: runs × (q_g q_h)."""
        return [adapter.change(*basis) for adapter, basis in zip(self.adapters, self._bases, strict=True)]

    def forward(self, sketches: SequenceSketches, rows: Tensor, changes: Sequence[Tensor]) -> Tensor:
        """Compute z of m sequences: m × (1 + S) × runs."""
        z = changes[0].new_zeros(len(rows), 1 + sketches.draws, self.count)
        for adapter, change in zip(self.adapters, changes, strict=True):
            part = sketches.sketches[adapter.site][rows].to(z.dtype).flatten(2) @ change.T
            z = z.index_add(2, adapter.runs, part)
        return z

    def batch_loss(self, sample: SequenceSample, rows: Tensor) -> Tensor:
        """Loss of each run per target of a batch."""
        z = self(sample.sketches, rows, self.changes())
        return sample.loss(z, rows).sum(0) / sample.sketches.targets.to(z.dtype)[rows].sum()

    def measure(self, sample: SequenceSample) -> tuple[Tensor, Tensor, Tensor]:
        """Loss per target and perplexity of each run, and the changes z, runs × sequences × (1 + S)."""
        everything, changes = torch.arange(sample.sketches.n, device=sample.sketches.place.device), self.changes()
        parts = [(rows, self(sample.sketches, rows, changes)) for rows in everything.split(CHUNK)]
        total = torch.stack([sample.loss(z, rows).sum(0) for rows, z in parts]).sum(0)
        loss = total / sample.sketches.targets.to(total.dtype).sum()
        return loss, loss.double().exp(), torch.cat([z for _, z in parts]).permute(2, 0, 1)

    def weights(self, run: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Read one run's adapter as it is: A, r × d_in, and s B, d_out × r, of each of its sites by position."""
        found = {}
        for adapter in self.adapters:
            for place in (adapter.runs == run).nonzero()[:, 0].tolist():
                scaled = adapter.b[place].detach().T * adapter.scaling[place]
                found[adapter.site] = (adapter.a[place].detach(), scaled)
        return found

    def movement(self) -> NDArray[np.float64]:
        """How far each run's adapters went from zero, in units of their own A."""
        return mean_movement(self.adapters, self.count)
