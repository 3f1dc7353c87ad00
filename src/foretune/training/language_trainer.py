"""The Trainer of a language model: the loss of a batch is the model's own, an evaluation counts every token once."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer

from foretune.language.encode import NO_LOSS, targets_of
from foretune.models.language_model import LanguageModel
from foretune.models.tuner import logits_of_texts

_LARGEST = math.log(np.finfo(np.float64).max)


def make_collator(language: LanguageModel) -> Callable[[Sequence[Mapping[str, Sequence[int]]]], dict[str, Tensor]]:
    """Make what puts rows into a batch.

    Args:
        language: Whose rows they are.

    Returns:
        A function from rows to `input_ids`, `attention_mask` and `labels`, of an encoder-decoder `decoder_input_ids`
        too.
    """

    def batch_of(features: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        batch = language.collate(features)
        # never a target; some versions of the Trainer would count it among those that the loss is divided by
        batch["labels"][:, : language.shift] = NO_LOSS
        return batch

    return batch_of


def token_sums(logits: Tensor, targets: Int64[Tensor, "rows tokens"]) -> Float64[Tensor, "rows 3"]:
    """Sum up what a model says of the tokens of each row.

    Args:
        logits: rows × tokens × vocabulary.
        targets: Token that each position's logits are held against, -100 where none is.

    Returns:
        For each row Σ −log p of its targets, the number of them that are the likeliest token, and their number.
    """
    sums = torch.zeros(len(targets), 3, dtype=torch.float64, device=logits.device)
    for row, (said, wanted) in enumerate(zip(logits, targets, strict=True)):  # one in float32 at a time
        asked = wanted != NO_LOSS
        of_row, tokens = said[asked].float(), wanted[asked]
        sums[row, 0] = nn.functional.cross_entropy(of_row, tokens, reduction="none").double().sum()
        sums[row, 1] = (of_row.argmax(-1) == tokens).sum()
        sums[row, 2] = len(tokens)
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
    """A Trainer that evaluates by sums over each row's tokens: no logits outlive their batch.

    Attributes:
        shift: Logits at position t are held against the label at t + shift.
    """

    shift = 1

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
            logits = logits_of_texts(self.model, model(**inputs).logits, labels.shape[1])
            sums = token_sums(logits, targets_of(labels, self.shift))
        return None, sums, sums
