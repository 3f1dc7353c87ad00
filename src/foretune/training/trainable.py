"""What can be trained: a plan of a classifier's fine-tune, or of a language model's."""

from collections.abc import Sequence
from math import ceil
from typing import Any, Literal, Protocol

import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments

from foretune.settings.commands import TuneSettings
from foretune.tasks.metrics import Metric

# `whole`: evaluated before training and after each epoch, with checkpoints to go on from; `epochs`: after each epoch;
# `end`: after the last one; these two without checkpoints.
Course = Literal["whole", "epochs", "end"]


class Trainable(Protocol):
    """A placed model, its rows, and how it will be trained."""

    @property
    def placed(self) -> PeftModel:
        """The peft model."""

    @property
    def settings(self) -> TuneSettings:
        """How it trains."""

    @property
    def course(self) -> Course:
        """When it is evaluated, and whether it can be resumed."""

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Measures, the main one first."""

    @property
    def loss_unit(self) -> str:
        """What the loss is counted in."""

    def steps_per_epoch(self, world_size: int = 1) -> int:
        """Count the optimiser steps of an epoch.

        Args:
            world_size: Processes that share the work.

        Returns:
            ⌈⌈rows / processes⌉ / batch size⌉.
        """

    def trainer(self, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback]) -> Trainer:
        """Make what trains it: its evaluation sets are `train`, if there is one, and then `eval`.

        Args:
            arguments: How.
            callbacks: What to call meanwhile.

        Returns:
            The Trainer.
        """

    def describe(self) -> dict[str, Any]:
        """Say what was understood, before the work starts.

        Returns:
            Facts by name, JSON-ready.
        """


def steps_in(n_rows: int, settings: TuneSettings, world_size: int) -> int:
    """Count the optimiser steps of an epoch.

    Args:
        n_rows: Rows that train.
        settings: How.
        world_size: Processes that share the work.

    Returns:
        ⌈⌈rows / processes⌉ / batch size⌉.
    """
    return ceil(ceil(n_rows / world_size) / settings.train_batch_size)


def trainable(placed: PeftModel) -> dict[str, int]:
    """Count the trainable parameters, those of the adapters and those of the head apart.

    Args:
        placed: A peft model.

    Returns:
        Numbers `adapter` and `head`.
    """
    counts = {"adapter": 0, "head": 0}
    for name, parameter in placed.named_parameters():
        if parameter.requires_grad:
            counts["head" if "modules_to_save" in name else "adapter"] += parameter.numel()
    return counts
