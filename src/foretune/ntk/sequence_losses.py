"""The numbers of a language model that are differentiated: the loss of a sequence, and of labels that the model draws.

For a sequence i whose positions t have targets (the label after them; of an encoder-decoder the label there), with
p_t = softmax of the logits,

    z⁰_i = −Σ_t log p_t[y_t]          z^s_i = −Σ_t log p_t[ŷ^s_t],  ŷ^s_t drawn from p_t and then fixed,  s = 1 … S

sums over targets, not means. As ∂z^s/∂f_t = p_t − e_ŷ has mean 0 and covariance diag(p) − p pᵀ, and the draws are
independent over t, E[∇z^s ∇z^sᵀ] = Σ_t J_tᵀ (diag(p_t) − p_t p_tᵀ) J_t: the Gauss–Newton matrix of the sequence, which
is its Fisher matrix.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from foretune.errors import KernelError
from foretune.language.encode import NO_LOSS, targets_of


@dataclass(frozen=True)
class SequenceBatch:
    """Sequences side by side, padded on the right.

    Attributes:
        rows: Positions of the sequences in the sample.
        inputs: Keyword arguments of the model; every tensor has the sequences first.
        labels: n × T token ids, −100 where there is no loss; the label at t is the target of position t − shift.
        shift: 1 of a causal model, 0 of an encoder-decoder.
    """

    rows: Int[Tensor, " n"]
    inputs: Mapping[str, Tensor]
    labels: Int[Tensor, "n T"]
    shift: int = 1

    @property
    def targets(self) -> Int[Tensor, "n T"]:
        """Target of each position that gives logits, −100 where it has none."""
        return targets_of(self.labels, self.shift)

    def singles(self) -> Iterator["SequenceBatch"]:
        """Take the batch apart.

        Yields:
            Batches of one sequence each, without padding.
        """
        for row in range(len(self.rows)):
            one = slice(row, row + 1)
            labels, read = self.labels[one], int(self.inputs["attention_mask"][row].sum())
            # a decoder alone reads what it writes; of an encoder-decoder the labels count
            targets = (labels[0] != NO_LOSS).nonzero()[:, 0].tolist()
            written = 1 + max(targets, default=0) if self.shift == 0 else read
            inputs = {
                name: tensor[one, : written if name.startswith("decoder") else read]
                for name, tensor in self.inputs.items()
            }
            yield replace(self, rows=self.rows[one], inputs=inputs, labels=labels[:, :written])


@dataclass(frozen=True)
class SequenceLosses:
    """Losses of the sequences of a batch.

    Attributes:
        totals: k = 1 + S numbers with their graph: z⁰ and z^s, each summed over the sequences.
        place: For each target its sequence, M integers, sequences in a row.
        target_losses: −log p of each target, M numbers.
        right: Whether each target is the likeliest token.
    """

    totals: Float[Tensor, " k"]
    place: Int[Tensor, " targets"]
    target_losses: Float[Tensor, " targets"]
    right: Tensor

    def of_each(self, n: int) -> Float64[Tensor, " n"]:
        """Sum up the losses of each sequence.

        Args:
            n: Sequences of the batch.

        Returns:
            z⁰, in nats.
        """
        none = torch.zeros(n, dtype=torch.float64)
        return none.index_add(0, self.place.cpu(), self.target_losses.double().cpu())


def sequence_losses(logits: Float[Tensor, "n ..."], batch: SequenceBatch, draws: int, *, seed: int) -> SequenceLosses:
    """Take the losses of a batch, and of labels drawn from the model.

    The draws of a sequence depend on the seed, its row and the number of its targets, never on the batch.

    Args:
        logits: n × T × V outputs of the model.
        batch: Labels.
        draws: Draws S of the labels.
        seed: Of the draws.

    Returns:
        The losses.

    Raises:
        KernelError: If the logits are not sequences × positions × vocabulary, or a label is beyond the vocabulary.
    """
    if logits.ndim != 3 or logits.shape[:2] != batch.labels.shape:
        raise KernelError(
            f"the model's logits have shape {tuple(logits.shape)}, expected {' × '.join(map(str, batch.labels.shape))} "
            "× vocabulary: only causal language models and encoder-decoders are supported"
        )
    of_positions = batch.targets
    counted = of_positions != NO_LOSS
    place, targets = counted.nonzero()[:, 0], of_positions[counted]
    n_tokens = logits.shape[-1]
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < n_tokens:
        raise KernelError(f"a label is beyond the model's {n_tokens} tokens: use the tokenizer of the model")
    log_p = torch.log_softmax(logits[counted].to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    own = -log_p.gather(1, targets[:, None])[:, 0]
    with torch.no_grad():
        right = log_p.argmax(1) == targets
        drawn = _drawn(log_p, counted.sum(1), batch.rows, draws, seed)
    sampled = -log_p.gather(1, drawn)
    return SequenceLosses(torch.cat([own.sum()[None], sampled.sum(0)]), place, own.detach(), right)


def _drawn(log_p: Tensor, counts: Tensor, rows: Tensor, draws: int, seed: int) -> Tensor:
    """Targets × S tokens from the inverse of the distribution function, in float64: the last bits of p count there."""
    uniform = [
        np.random.default_rng([seed, row]).random((count, draws))
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True)
    ]
    u = torch.as_tensor(np.concatenate([np.empty((0, draws)), *uniform]), device=log_p.device)
    drawn = [_inverse(part, of_part) for part, of_part in zip(log_p.split(64), u.split(64), strict=True)]
    return torch.cat([torch.empty(0, draws, dtype=torch.long, device=log_p.device), *drawn])


def _inverse(log_p: Tensor, u: Tensor) -> Tensor:
    reached = torch.cumsum(log_p.double().exp(), dim=1)
    return torch.searchsorted(reached, u * reached[:, -1:]).clamp(max=log_p.shape[1] - 1)
