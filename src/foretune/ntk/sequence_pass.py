"""One pass over a batch of sequences: inputs and gradients of each adapted module, as sequences × positions × width."""

from collections.abc import Callable

from jaxtyping import Bool
from torch import Tensor

from foretune.errors import KernelError
from foretune.language.encode import NO_LOSS
from foretune.models.adapted import AdaptedModel, Batch
from foretune.models.tuner import logits_of_texts
from foretune.ntk.capture import Observation, Receive, observe_totals
from foretune.ntk.premises import check_finite
from foretune.ntk.sequence_losses import SequenceBatch, SequenceLosses, sequence_losses


def positions_of(batch: SequenceBatch) -> dict[int, Bool[Tensor, "n T"]]:
    """Find the positions that a loss may depend on, of all that a module may see.

    A causal model's modules and a decoder's see those of the labels, of which a loss depends on those at or before the
    last target. An encoder's see those of the inputs, of which it depends on all but padding; so do the keys and values
    of a decoder's attention to the encoder.

    Args:
        batch: Sequences.

    Returns:
        By number of positions T; where encoder and decoder have as many, what is in either, for the gradient of the
        other is 0 there.
    """
    written: Tensor = (batch.targets != NO_LOSS).flip(1).cumsum(1).flip(1) > 0
    found = {written.shape[1]: written}
    if "decoder_input_ids" in batch.inputs:
        read = batch.inputs["attention_mask"] != 0
        length = read.shape[1]
        found[length] = read | found[length] if length in found else read
    return found


def pass_sequences(
    adapted: AdaptedModel,
    batch: SequenceBatch,
    draws: int,
    on_use: Callable[[str, Tensor, Tensor], Receive],
    *,
    seed: int,
    with_loss: bool = True,
) -> SequenceLosses:
    """Run one forward pass, and one backward pass for each number that is differentiated.

    Args:
        adapted: Model in eval mode with its adapters.
        batch: Sequences.
        draws: Draws S of the labels.
        on_use: Called with a module's name, its n × T × d_in inputs and n × T × d_out outputs, T the positions that it
            sees: the decoder's or the encoder's; what it returns takes the number of an output and its n × T × d_out
            gradients.
        seed: Of the draws.
        with_loss: Whether the loss z⁰ is differentiated, as output 0 before the draws; else the draws alone.

    Returns:
        The losses of the batch.

    Raises:
        KernelError: If a module does not see sequences or is not reached by the loss, or a loss is not finite.
    """
    n, lengths = len(batch.labels), sorted(positions_of(batch))

    def by_sequence(name: str, tensor: Tensor) -> Tensor:
        if tensor.ndim == 3 and len(tensor) == n and tensor.shape[1] in lengths:
            return tensor
        if tensor.ndim == 2 and len(tensor) in [n * length for length in lengths]:
            return tensor.reshape(n, len(tensor) // n, -1)
        raise KernelError(
            f"module {name!r} sees {' × '.join(map(str, tensor.shape))} numbers of {n} sequences of "
            f"{' or '.join(map(str, lengths))} positions, as experts do: leave it out of the target modules"
        )

    def use(name: str, h: Tensor, y: Tensor) -> Receive:
        receive = on_use(name, by_sequence(name, h), by_sequence(name, y))
        return lambda output, gradient: receive(output, by_sequence(name, gradient))

    observed, found = observe_losses(adapted, batch, draws, use, seed=seed, with_loss=with_loss)
    lost = next((name for name in adapted.modules if name not in observed.reached), None)
    if lost is not None:
        raise KernelError(f"no loss depends on module {lost!r}: leave it out of the target modules")
    check_finite("the losses", found.target_losses)
    return found


def observe_losses(
    adapted: AdaptedModel,
    batch: SequenceBatch,
    draws: int,
    on_use: Callable[[str, Tensor, Tensor], Receive],
    *,
    seed: int,
    with_loss: bool = True,
) -> tuple[Observation, SequenceLosses]:
    """The same of modules that may see anything.

    Args:
        adapted: Model in eval mode with what trains in it.
        batch: Sequences.
        draws: Draws S of the labels.
        on_use: As in `foretune.ntk.capture.observe`: inputs and outputs come as they are.
        seed: Of the draws.
        with_loss: Whether the loss z⁰ is differentiated.

    Returns:
        What the pass has shown, and the losses.
    """
    found: list[SequenceLosses] = []

    def totals(logits: Tensor) -> Tensor:
        found.append(losses_of(adapted, logits, batch, draws, seed=seed))
        return found[0].totals[0 if with_loss else 1 :]

    observed = observe_totals(adapted, Batch(batch.rows, batch.inputs), totals, on_use)
    return observed, found[0]


def losses_of(adapted: AdaptedModel, logits: Tensor, batch: SequenceBatch, draws: int, *, seed: int) -> SequenceLosses:
    """Take the losses of a batch from all that the model gives.

    Args:
        adapted: The model, which may put virtual tokens before the sequences.
        logits: Its outputs.
        batch: Sequences.
        draws: Draws S of the labels.
        seed: Of the draws.

    Returns:
        As `sequence_losses`.
    """
    return sequence_losses(logits_of_texts(adapted.model, logits, batch.labels.shape[1]), batch, draws, seed=seed)
