"""The Trainer of a language model: the loss of a batch is the model's own, an evaluation counts every token once."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer

from foretune.language.encode import NO_LOSS, collate

_LARGEST = math.log(np.finfo(np.float64).max)


def make_collator(pad_token_id: int) -> Callable[[Sequence[Mapping[str, Sequence[int]]]], dict[str, Tensor]]:
    """Make what puts rows into a batch.

    Args:
        pad_token_id: Token to pad with, on the right.

    Returns:
        A function from rows to `input_ids`, `attention_mask` and `labels`.
    """

    def batch_of(features: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        batch = collate(features, pad_token_id)
        # never a target; some versions of the Trainer would count it among those that the loss is divided by
        batch["labels"][:, 0] = NO_LOSS
        return batch

    return batch_of


def token_sums(logits: Tensor, labels: Int64[Tensor, "rows tokens"]) -> Float64[Tensor, "rows 3"]:
    """Sum up what a model says of the tokens of each row.

    Args:
        logits: rows × tokens × vocabulary; those at position t are held against the label at t + 1.
        labels: Token ids, -100 where a token carries no loss.

    Returns:
        For each row Σ −log p of its targets, the number of them that are the likeliest token, and their number.
    """
    sums = torch.zeros(len(labels), 3, dtype=torch.float64, device=logits.device)
    for row, (said, label) in enumerate(zip(logits[:, :-1], labels[:, 1:], strict=True)):  # one in float32 at a time
        asked = label != NO_LOSS
        of_row, targets = said[asked].float(), label[asked]
        sums[row, 0] = nn.functional.cross_entropy(of_row, targets, reduction="none").double().sum()
        sums[row, 1] = (of_row.argmax(-1) == targets).sum()
        sums[row, 2] = len(targets)
    return sums


def measure(prediction: EvalPrediction) -> dict[str, float]:
    """Measure an evaluation set, each of its targets counted once.

    Args:
        prediction: With the sums of each row, from `token_sums`.

    Returns:
        `loss` = Σ −log p / number of targets, `perplexity` = exp(loss), and `token_accuracy`, the share of the targets
        that are the likeliest token.
    """
    total, right, count = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    loss = float(total / count)
    perplexity = math.inf if loss > _LARGEST else math.exp(loss)
    return {"loss": loss, "perplexity": perplexity, "token_accuracy": float(right / count)}


class LanguageTrainer(Trainer):  # type: ignore[misc]  # transformers comes without types
    """A Trainer that evaluates by sums over each row's tokens: no logits outlive their batch."""

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, Tensor, Tensor]:
        """Evaluate one batch.

        Args:
            model: Model.
            inputs: Batch with labels.
            prediction_loss_only: As the Trainer passes it.
            ignore_keys: As the Trainer passes it.

        Returns:
            No loss, which the Trainer would average over batches; the rows' sums, as outputs and as labels.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = token_sums(model(**inputs).logits, labels)
        return None, sums, sums
