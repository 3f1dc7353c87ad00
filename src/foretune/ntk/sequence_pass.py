"""One pass over a batch of sequences: inputs and gradients of each adapted module, as sequences × positions × width."""

from collections.abc import Callable

from torch import Tensor

from foretune.errors import KernelError
from foretune.models.adapted import AdaptedModel, Batch
from foretune.ntk.capture import Receive, observe_totals
from foretune.ntk.premises import check_finite
from foretune.ntk.sequence_losses import SequenceBatch, SequenceLosses, sequence_losses


def pass_sequences(
    adapted: AdaptedModel,
    batch: SequenceBatch,
    draws: int,
    on_use: Callable[[str, Tensor], Receive],
    *,
    seed: int,
    with_loss: bool = True,
) -> SequenceLosses:
    """Run one forward pass, and one backward pass for each number that is differentiated.

    Args:
        adapted: Model in eval mode with its adapters.
        batch: Sequences.
        draws: Draws S of the labels.
        on_use: Called with a module's name and its n × T × d_in inputs; what it returns takes the number of an output
            and its n × T × d_out gradients.
        seed: Of the draws.
        with_loss: Whether the loss z⁰ is differentiated, as output 0 before the draws; else the draws alone.

    Returns:
        The losses of the batch.

    Raises:
        KernelError: If a module does not see sequences or is not reached by the loss, or a loss is not finite.
    """
    n, length = batch.labels.shape
    found: list[SequenceLosses] = []

    def totals(logits: Tensor) -> Tensor:
        found.append(sequence_losses(logits, batch, draws, seed=seed))
        return found[0].totals[0 if with_loss else 1 :]

    def by_sequence(name: str, tensor: Tensor) -> Tensor:
        if tensor.shape[:2] == (n, length) and tensor.ndim == 3:
            return tensor
        if tensor.ndim == 2 and len(tensor) == n * length:
            return tensor.reshape(n, length, -1)
        raise KernelError(
            f"module {name!r} sees {' × '.join(map(str, tensor.shape))} numbers of {n} sequences of {length} "
            "positions, as experts do: leave it out of the target modules"
        )

    def use(name: str, h: Tensor) -> Receive:
        receive = on_use(name, by_sequence(name, h))
        return lambda output, gradient: receive(output, by_sequence(name, gradient))

    observed = observe_totals(adapted, Batch(batch.rows, batch.inputs), totals, use)
    lost = next((name for name in adapted.modules if name not in observed.reached), None)
    if lost is not None:
        raise KernelError(f"no loss depends on module {lost!r}: leave it out of the target modules")
    check_finite("the losses", found[0].target_losses)
    return found[0]
