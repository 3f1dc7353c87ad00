"""The plan of a fine-tune: the placed model and the rows that it trains and is evaluated on."""

from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel

from foretune.models.adapted import describe_placement
from foretune.models.classifier import Classifier, Encoded, encode
from foretune.models.head_parts import check_saved
from foretune.models.identity import fingerprint
from foretune.models.placement import is_base, read_adapters
from foretune.models.sites import Site
from foretune.problem import place_for
from foretune.settings.commands import TuneSettings
from foretune.tasks.load import Task, TextSplit
from foretune.tasks.objective import Targets
from foretune.tasks.sampling import draw_indices, split

# `whole`: evaluated before training and after each epoch, with checkpoints to go on from; `epochs`: after each epoch;
# `end`: after the last one; these two without checkpoints.
Course = Literal["whole", "epochs", "end"]


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
        return ceil(ceil(len(self.train.labels) / world_size) / self.settings.train_batch_size)


def prepare_tune(
    classifier: Classifier,
    task: Task,
    config: LoraConfig | None,
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
    train = _rows(task.train, rows.training, classifier, settings.max_length)
    evaluation = _rows(task.evaluation or task.train, rows.eval_indices, classifier, settings.max_length)
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


def describe_tune(plan: TunePlan) -> dict[str, Any]:
    """Say what was understood, before the work starts.

    Args:
        plan: What will be done.

    Returns:
        Facts by name, JSON-ready.
    """
    task, settings = plan.task, plan.settings
    counts = trainable(plan.placed)
    encoded = (plan.train.encoded, plan.evaluation.encoded)
    return {
        "model": plan.classifier.source,
        "weights": fingerprint(plan.placed),
        "dataset": task.source,
        "architecture": type(plan.placed.get_base_model()).__name__,
        "parameters": sum(p.numel() for name, p in plan.placed.named_parameters() if is_base(name)),
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
            counts["adapter" if "lora_" in name else "head"] += parameter.numel()
    return counts
