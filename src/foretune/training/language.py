"""The plan of a language model's fine-tune: the placed model and the tokens that it trains and is evaluated on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments

from foretune.language.rows import LanguageTask
from foretune.models.adapted import describe_placement
from foretune.models.identity import fingerprint
from foretune.models.language_model import LanguageModel
from foretune.models.packed import n_weights
from foretune.models.placement import read_adapters
from foretune.models.sites import Site
from foretune.models.tuner import is_base
from foretune.sequence_plan import LOSS_UNIT, ChosenRows, TokenRows, choose_rows, describe_rows, place_adapters
from foretune.settings.commands import TuneSettings
from foretune.tasks.metrics import LANGUAGE_METRICS, Metric
from foretune.tasks.sampling import draw_indices
from foretune.training.language_trainer import LanguageTrainer, make_collator, measure
from foretune.training.trainable import Course, steps_in, trainable


@dataclass(frozen=True)
class LanguagePlan:
    """A placed language model and how it will be trained.

    Attributes:
        language: The user's model and tokenizer, with the adapters in `placed`.
        placed: peft model.
        sites: Adapted modules.
        task: Data.
        settings: Settings.
        rows: Rows that train, and those to evaluate on.
        train_eval: Training rows that the loss is taken on in eval mode; None for none.
        course: When it is evaluated, and whether it can be resumed.
    """

    language: LanguageModel
    placed: PeftModel
    sites: tuple[Site, ...]
    task: LanguageTask
    settings: TuneSettings
    rows: ChosenRows
    train_eval: TokenRows | None
    course: Course = "whole"

    @property
    def train(self) -> TokenRows:
        """Training rows."""
        return self.rows.train

    @property
    def evaluation(self) -> TokenRows:
        """Evaluation rows."""
        return self.rows.evaluation

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return self.language.device

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.language.tokenizer

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Measures, the main one first."""
        return LANGUAGE_METRICS

    @property
    def loss_unit(self) -> str:
        """What the loss is counted in."""
        return LOSS_UNIT

    def steps_per_epoch(self, world_size: int = 1) -> int:
        """Count the optimiser steps of an epoch.

        Args:
            world_size: Processes that share the work.

        Returns:
            ⌈⌈rows / processes⌉ / batch size⌉.
        """
        return steps_in(len(self.train.features), self.settings, world_size)

    def trainer(self, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback]) -> Trainer:
        """Make what trains it: its evaluation sets are `train`, if there is one, and then `eval`.

        Args:
            arguments: How.
            callbacks: What to call meanwhile.

        Returns:
            The Trainer.
        """
        # in this order: read_log closes an epoch at the evaluation rows
        sets = {} if self.train_eval is None else {"train": self.train_eval.records(by_length=True)}
        sets["eval"] = self.evaluation.records(by_length=True)
        trainer = LanguageTrainer(
            model=self.placed,
            args=arguments,
            data_collator=make_collator(self.language),
            train_dataset=self.train.records(),
            eval_dataset=sets,
            compute_metrics=measure,
            callbacks=list(callbacks),
        )
        trainer.shift = self.language.shift
        return trainer

    def describe(self) -> dict[str, Any]:
        """Say what was understood, before the work starts.

        Returns:
            Facts by name, JSON-ready.
        """
        return _describe(self)


def prepare_language(
    language: LanguageModel,
    task: LanguageTask,
    config: PeftConfig | None,
    settings: TuneSettings,
    *,
    inplace: bool = False,
) -> LanguagePlan:
    """Place the adapters, choose and tokenise the rows: all that can go wrong before the work starts.

    With an evaluation split all rows of the training split train; without one, a fifth of them is held out, by the
    numbers of the rows as of a classifier's data. `eval_samples` chooses among the rows to evaluate on, and never
    changes what trains. Rows of which no token carries loss are left out.

    Args:
        language: Model and tokenizer.
        task: Data.
        config: peft's configuration; None if the model is a peft model already.
        settings: Settings.
        inplace: Whether the adapters may go into the model itself instead of a copy.

    Returns:
        The plan.
    """
    placed = place_adapters(language, config, seed=settings.seed, inplace=inplace)
    sites = read_adapters(placed, seed=settings.seed).sites
    on_placed = replace(language, model=placed)  # virtual tokens take positions
    chosen = choose_rows(on_placed, task, settings.max_length, eval_samples=settings.eval_samples, seed=settings.seed)
    train_eval = None
    if settings.train_eval_samples:
        n_rows = len(chosen.train.features)
        some = draw_indices(n_rows, min(settings.train_eval_samples, n_rows), seed=0)
        train_eval = chosen.train.take(np.sort(some))
    return LanguagePlan(language, placed, sites, task, settings, chosen, train_eval)


def _describe(plan: LanguagePlan) -> dict[str, Any]:
    task, settings = plan.task, plan.settings
    counts = trainable(plan.placed)
    return {
        "model": plan.language.source,
        "weights": fingerprint(plan.placed),
        "dataset": task.source,
        "architecture": type(plan.placed.get_base_model()).__name__,
        "parameters": sum(n_weights(p) for name, p in plan.placed.named_parameters() if is_base(name)),
        "notes": list(plan.language.notes),
        "placement": {
            **describe_placement(plan.placed.active_peft_config, plan.sites),
            "modules": [site.name for site in plan.sites],
            "trainable_parameters": counts["adapter"],
            "head_parameters": counts["head"],
        },
        "data": {
            **describe_rows(task, plan.rows),
            "train_eval_rows": 0 if plan.train_eval is None else len(plan.train_eval.features),
            "eval_rows": len(plan.evaluation.features),
        },
        "steps": settings.epochs * plan.steps_per_epoch(),
    }
