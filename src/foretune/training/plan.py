"""The plan of a fine-tune: the placed model and the rows that it trains and is evaluated on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftConfig, PeftModel
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from foretune.models.adapted import describe_placement
from foretune.models.classifier import Classifier, Encoded, encode, padded
from foretune.models.head_parts import check_saved
from foretune.models.identity import fingerprint
from foretune.models.packed import n_weights
from foretune.models.placement import read_adapters
from foretune.models.sites import Site
from foretune.models.tuner import is_base
from foretune.problem import place_for
from foretune.settings.commands import TuneSettings
from foretune.tasks.load import Task, TextSplit
from foretune.tasks.metrics import Metric
from foretune.tasks.objective import Targets
from foretune.tasks.sampling import draw_indices, split
from foretune.training.trainable import Course, steps_in, trainable


@dataclass(frozen=True)
class Rows:
    """Tokenised rows with their targets.

    Attributes:
        encoded: Token ids.
        labels: n classes from 0, or n × C numbers.
        indices: Rows of the split that they come from.
    """

    encoded: Encoded
    labels: Targets
    indices: NDArray[np.int64]

    def records(self, *, by_length: bool = False) -> list[dict[str, Any]]:
        """List the rows as a Trainer's data set.

        Args:
            by_length: Whether to put the longest first, so that batches hold little padding.

        Returns:
            For each row the tokenizer's lists and its target.
        """
        order = np.argsort(-self.encoded.lengths, kind="stable") if by_length else range(len(self.labels))
        return [{**self.encoded.features[row], "labels": self.labels[row]} for row in order]


@dataclass(frozen=True)
class TunePlan:
    """A placed model and how it will be trained.

    Attributes:
        classifier: The user's model and tokenizer, with the adapters in `placed`.
        placed: peft model.
        sites: Adapted modules.
        task: Data.
        settings: Settings.
        train: Training rows.
        train_eval: Training rows that the loss is taken on in eval mode; None for none.
        evaluation: Evaluation rows.
        held_out: Whether the task has no evaluation split, so that the rows are held out of training.
        course: When it is evaluated, and whether it can be resumed.
    """

    classifier: Classifier
    placed: PeftModel
    sites: tuple[Site, ...]
    task: Task
    settings: TuneSettings
    train: Rows
    train_eval: Rows | None
    evaluation: Rows
    held_out: bool
    course: Course = "whole"

    def steps_per_epoch(self, world_size: int = 1) -> int:
        """Count the optimiser steps of an epoch.

        Args:
            world_size: Processes that share the work.

        Returns:
            ⌈⌈rows / processes⌉ / batch size⌉.
        """
        return steps_in(len(self.train.labels), self.settings, world_size)

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return self.classifier.device

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.classifier.tokenizer

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Measures, the main one first."""
        return self.task.objective.metrics

    @property
    def loss_unit(self) -> str:
        """What the loss is counted in."""
        return self.task.objective.loss_unit

    def trainer(self, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback]) -> Trainer:
        """Make what trains it: its evaluation sets are `train`, if there is one, and then `eval`.

        Args:
            arguments: How.
            callbacks: What to call meanwhile.

        Returns:
            The Trainer.
        """
        objective = self.task.objective
        # in this order: read_log closes an epoch at the evaluation rows
        sets = {} if self.train_eval is None else {"train": self.train_eval.records(by_length=True)}
        sets["eval"] = self.evaluation.records(by_length=True)

        def collate(records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            labels = objective.tensor(np.array([record["labels"] for record in records]))
            inputs = [{name: value for name, value in record.items() if name != "labels"} for record in records]
            return {**padded(inputs, self.classifier), "labels": labels}

        def metrics(prediction: EvalPrediction) -> dict[str, float]:
            given = prediction.predictions
            outputs = np.asarray(given[0] if isinstance(given, tuple) else given, dtype=np.float64)
            return dict(objective.measure(outputs, np.asarray(prediction.label_ids)))

        return Trainer(
            model=self.placed,
            args=arguments,
            data_collator=collate,
            train_dataset=self.train.records(),
            eval_dataset=sets,
            compute_metrics=metrics,
            callbacks=list(callbacks),
        )

    def describe(self) -> dict[str, Any]:
        """Say what was understood, before the work starts.

        Returns:
            Facts by name, JSON-ready.
        """
        return _describe(self)


def prepare_tune(
    classifier: Classifier,
    task: Task,
    config: PeftConfig | None,
    settings: TuneSettings,
    *,
    inplace: bool = False,
) -> TunePlan:
    """Place the adapters as for a score, choose and tokenise the rows: all that can go wrong before the work starts.

    With an evaluation split all rows of the training split train; without one, a fifth of them is held out, the same
    that every score and forecast with this seed holds out. `eval_samples` chooses among the rows to evaluate on, and
    never changes what trains.

    Args:
        classifier: Model and tokenizer.
        task: Data.
        config: peft's configuration; None if the model is a peft model already.
        settings: Settings.
        inplace: Whether the adapters may go into the classifier's own model instead of a copy.

    Returns:
        The plan.

    Raises:
        PlacementError: If a layer is new and would not be saved with the adapter.
    """
    placed = place_for(task, classifier, config, seed=settings.seed, inplace=inplace)
    sites = read_adapters(placed, seed=settings.seed).sites
    check_saved(placed)
    rows = split(task, samples=0, eval_samples=settings.eval_samples, seed=settings.seed)
    on_placed = replace(classifier, model=placed)  # virtual tokens take positions
    train = _rows(task.train, rows.training, on_placed, settings.max_length)
    evaluation = _rows(task.evaluation or task.train, rows.eval_indices, on_placed, settings.max_length)
    train_eval = None
    if settings.train_eval_samples:
        chosen = draw_indices(len(rows.training), min(settings.train_eval_samples, len(rows.training)), seed=0)
        train_eval = _select(train, np.sort(chosen))
    return TunePlan(classifier, placed, sites, task, settings, train, train_eval, evaluation, rows.held_out)


def _rows(split: TextSplit, indices: NDArray[np.int64], classifier: Classifier, max_length: int) -> Rows:
    texts = [split.texts[row] for row in indices]
    pairs = None if split.pairs is None else [split.pairs[row] for row in indices]
    return Rows(encode(texts, pairs, classifier, max_length=max_length), split.labels[indices], indices)


def _select(rows: Rows, positions: NDArray[np.int64]) -> Rows:
    features = tuple(rows.encoded.features[position] for position in positions)
    encoded = Encoded(features, 0, rows.encoded.max_length)
    return Rows(encoded, rows.labels[positions], rows.indices[positions])


def _describe(plan: TunePlan) -> dict[str, Any]:
    task, settings = plan.task, plan.settings
    counts = trainable(plan.placed)
    encoded = (plan.train.encoded, plan.evaluation.encoded)
    return {
        "model": plan.classifier.source,
        "weights": fingerprint(plan.placed),
        "dataset": task.source,
        "architecture": type(plan.placed.get_base_model()).__name__,
        "parameters": sum(n_weights(p) for name, p in plan.placed.named_parameters() if is_base(name)),
        "head_source": plan.classifier.head_source,
        "head_new": list(plan.classifier.new),
        "head_notes": list(plan.classifier.notes),
        "placement": {
            **describe_placement(plan.placed.active_peft_config, plan.sites),
            "modules": [site.name for site in plan.sites],
            "trainable_parameters": counts["adapter"],
            "head_parameters": counts["head"],
        },
        "data": {
            "task": task.objective.kind,
            "label_names": list(task.label_names),
            "text_columns": list(task.text_columns),
            "label_column": task.label_column,
            "train_split": task.train.name,
            "eval_split": f"{task.train.name} (held out)" if task.evaluation is None else task.evaluation.name,
            "train_rows": len(plan.train.labels),
            "train_eval_rows": 0 if plan.train_eval is None else len(plan.train_eval.labels),
            "eval_rows": len(plan.evaluation.labels),
            **{f"eval_{name}": value for name, value in task.objective.describe(plan.evaluation.labels).items()},
            "fingerprint": task.fingerprint,
            "max_length": plan.train.encoded.max_length,
            "truncated_share": sum(part.n_truncated for part in encoded) / sum(len(part.features) for part in encoded),
        },
        "steps": settings.epochs * plan.steps_per_epoch(),
    }
