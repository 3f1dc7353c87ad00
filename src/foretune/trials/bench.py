"""What trials are made on: a classifier or a language model, with the rows of the run that is forecast."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from peft import PeftConfig
from torch import Tensor

from foretune.language.rows import LanguageTask
from foretune.models.classifier import Classifier, batches, encode
from foretune.models.language_model import LanguageModel
from foretune.models.packed import copied
from foretune.ranking.methods import in_proportion
from foretune.sequence_plan import LOGITS, ChosenRows, SequencePlan
from foretune.settings.commands import TuneSettings, fields_of
from foretune.settings.groups import Batching, Recipe, TaskKind
from foretune.tasks.load import Task
from foretune.tasks.metrics import LANGUAGE_METRICS, Metric, metrics_of
from foretune.tasks.sampling import Split, split
from foretune.training.language import prepare_language
from foretune.training.plan import prepare_tune
from foretune.training.trainable import Course, Trainable, steps_in
from foretune.trials.plan import Extent, Trial
from foretune.trials.rows import restrict
from foretune.trials.sequences import restrict_sequences

Loaded = TypeVar("Loaded", Classifier, LanguageModel)
OUTPUTS = 1  # of a language model: the fewest rows of a trial do not hang on its vocabulary


@dataclass(frozen=True)
class Candidate:
    """What may be tried.

    Attributes:
        name: In words, for tables.
        config: peft's configuration; None if the model is a peft model already.
        recipe: How its run trains.
    """

    name: str
    config: PeftConfig | None
    recipe: Recipe


class Bench(Protocol):
    """What all trials of a model have in common: the model, which they leave as it is, the data and the rows."""

    @property
    def kind(self) -> TaskKind:
        """Kind of task."""

    @property
    def batching(self) -> Batching:
        """Length, batches of evaluation, and the seed that the full run has."""

    @property
    def model(self) -> Any:
        """The model, without what a trial puts on it."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""

    @property
    def source(self) -> Mapping[str, str]:
        """Model and data set as given."""

    def extent(self) -> Extent:
        """Say how large the run and its data are.

        Returns:
            Rows and outputs.
        """

    def content(self, trial: Trial) -> Mapping[str, Any]:
        """Name what a trial trains and is evaluated on by its content.

        Args:
            trial: Rows and seed.

        Returns:
            What its outcome hangs on, but for model, adapter and recipe: `data` is a fingerprint of the rows.
        """

    def prepare(self, candidate: Candidate, trial: Trial, course: Course) -> Trainable:
        """Put a candidate on a copy of the model, and take the rows of a trial.

        Args:
            candidate: Adapter and recipe.
            trial: Rows and seed.
            course: When it is evaluated.

        Returns:
            What is to be trained.
        """

    def few(self, count: int) -> tuple[Mapping[str, Tensor], int]:
        """Take a few training rows as one batch on the model's device.

        Args:
            count: How many, at most.

        Returns:
            What the model is called with, and how many rows it holds.
        """


@dataclass(frozen=True)
class ClassifierBench:
    """The bench of a classifier.

    Attributes:
        classifier: Model and tokenizer, without what a trial puts on it: trials work on copies.
        task: Data of the full run.
        held: Rows of the full run: those that train, those to evaluate on.
        batching: Length, batches of evaluation, and the seed that the full run has.
    """

    classifier: Classifier
    task: Task
    held: Split
    batching: Batching

    @property
    def kind(self) -> TaskKind:
        """Kind of task."""
        return self.task.objective.kind

    @property
    def model(self) -> Any:
        """The model."""
        return self.classifier.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.classifier.tokenizer

    @property
    def source(self) -> Mapping[str, str]:
        """Model and data set as given."""
        return {"model": self.classifier.source, "dataset": self.task.source}

    def extent(self) -> Extent:
        """Say how large the run and its data are.

        Returns:
            Rows and outputs.
        """
        n_train = len(self.held.training)
        return Extent(n_train, n_train, len(self.held.eval_indices), self.task.objective.n_outputs)

    def content(self, trial: Trial) -> Mapping[str, Any]:
        """Name the texts and labels of a trial.

        Args:
            trial: Rows and seed.

        Returns:
            Their fingerprint.
        """
        return {"data": self._task(trial).fingerprint}

    def prepare(self, candidate: Candidate, trial: Trial, course: Course) -> Trainable:
        """Put a candidate on a copy of the model, and take the rows of a trial.

        Args:
            candidate: Adapter and recipe.
            trial: Rows and seed.
            course: When it is evaluated.

        Returns:
            What is to be trained.
        """
        classifier = _left_alone(self.classifier, candidate)
        config, settings = adapter_of(self, candidate, trial), _settings(self, candidate, trial)
        plan = prepare_tune(classifier, self._task(trial), config, settings)
        return dataclasses.replace(plan, course=course)

    def few(self, count: int) -> tuple[Mapping[str, Tensor], int]:
        """Take a few training rows as one batch on the model's device.

        Args:
            count: How many, at most.

        Returns:
            What the model is called with, and how many rows it holds.
        """
        rows, part = self.held.training[:count], self.task.train
        pairs = None if part.pairs is None else [part.pairs[row] for row in rows]
        encoded = encode([part.texts[row] for row in rows], pairs, self.classifier, max_length=self.batching.max_length)
        batch = next(batches(encoded, self.classifier, batch_size=count, rows=range(len(rows))))
        return batch.inputs, len(batch.rows)

    def _task(self, trial: Trial) -> Task:
        return restrict(self.task, trial.rows, self.held, seed=trial.seed)


@dataclass(frozen=True)
class LanguageBench:
    """The bench of a language model.

    Attributes:
        language: Model and tokenizer, without what a trial puts on it: trials work on copies.
        task: Data of the full run.
        rows: Rows of the full run as tokens: those that train, those to evaluate on.
        batching: Length, batches of evaluation, and the seed that the full run has.
    """

    language: LanguageModel
    task: LanguageTask
    rows: ChosenRows
    batching: Batching

    @property
    def kind(self) -> TaskKind:
        """Kind of task."""
        return self.language.kind

    @property
    def model(self) -> Any:
        """The model."""
        return self.language.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.language.tokenizer

    @property
    def source(self) -> Mapping[str, str]:
        """Model and data set as given."""
        return {"model": self.language.source, "dataset": self.task.source}

    def extent(self) -> Extent:
        """Say how large the run and its data are.

        Returns:
            Rows that carry loss; one output.
        """
        n_train = len(self.rows.train.features)
        return Extent(n_train, n_train, len(self.rows.evaluation.features), OUTPUTS)

    def content(self, trial: Trial) -> Mapping[str, Any]:
        """Name the rows of a trial, and what makes tokens with labels of them.

        Args:
            trial: Rows and seed.

        Returns:
            Their fingerprint, their format, which tokens carry loss, and the chat template, which a tokenizer's rules
            do not hold.
        """
        task = self._task(trial)
        template = getattr(self.tokenizer, "chat_template", None)
        return {
            "data": task.fingerprint,
            "kind": self.kind,
            "format": task.format,
            "loss_on": task.loss_on,
            "chat_template": template,
        }

    def prepare(self, candidate: Candidate, trial: Trial, course: Course) -> Trainable:
        """Put a candidate on a copy of the model, and take the rows of a trial.

        Args:
            candidate: Adapter and recipe.
            trial: Rows and seed.
            course: When it is evaluated.

        Returns:
            What is to be trained.
        """
        language = _left_alone(self.language, candidate)
        config, settings = adapter_of(self, candidate, trial), _settings(self, candidate, trial)
        plan = prepare_language(language, self._task(trial), config, settings)
        return dataclasses.replace(plan, course=course)

    def few(self, count: int) -> tuple[Mapping[str, Tensor], int]:
        """Take a few training rows as one batch on the model's device, so many that their logits stay small.

        Args:
            count: How many, at most.

        Returns:
            What the model is called with, and how many rows it holds.
        """
        features = self.rows.train.features[:count]
        longest = max(len(feature["input_ids"]) for feature in features)
        fit = LOGITS // (longest * int(self.model.config.get_text_config().vocab_size))
        features = features[: max(1, fit)]
        batch = self.language.collate(features)
        del batch["labels"]
        return {name: tensor.to(self.language.device) for name, tensor in batch.items()}, len(features)

    def _task(self, trial: Trial) -> LanguageTask:
        return restrict_sequences(self.task, trial.rows, self.rows, seed=trial.seed)


def _left_alone(loaded: Loaded, candidate: Candidate) -> Loaded:
    """The model to put a candidate on: a copy where the adapter is on it already, for it would be trained itself."""
    if candidate.config is not None:
        return loaded
    return dataclasses.replace(loaded, model=copied(loaded.model))


def adapter_of(bench: Bench, candidate: Candidate, trial: Trial) -> PeftConfig | None:
    """Take the adapter that a trial trains: that of the run, but for what depends on its number of steps.

    Args:
        bench: Data of the full run.
        candidate: Adapter and recipe.
        trial: Rows.

    Returns:
        peft's configuration: of AdaLoRA one whose ranks fall within the trial as they do within the run. None if the
        model is a peft model already.
    """
    settings = _settings(bench, candidate, trial)
    steps, whole = (settings.epochs * steps_in(rows, settings, 1) for rows in (trial.rows, bench.extent().run_rows))
    return in_proportion(candidate.config, steps, whole)


def _settings(bench: Bench, candidate: Candidate, trial: Trial) -> TuneSettings:
    return TuneSettings(
        **fields_of(candidate.recipe, Recipe),
        **{**fields_of(bench.batching, Batching), "seed": trial.seed},
        train_eval_samples=0,
    )


def bench_of(classifier: Classifier, task: Task, batching: Batching, *, eval_samples: int | None) -> ClassifierBench:
    """Choose the rows that a classifier's trials are made on and evaluated on.

    Args:
        classifier: Model and tokenizer; left as it is.
        task: Data of the full run.
        batching: Length, batches of evaluation and seed of the full run.
        eval_samples: Rows to evaluate on, at most; None for all.

    Returns:
        The bench.
    """
    held = split(task, samples=0, eval_samples=eval_samples, seed=batching.seed)
    return ClassifierBench(classifier, task, held, batching)


def bench_of_plan(plan: SequencePlan) -> LanguageBench:
    """Make a language model's trials on the rows of its forecast.

    Args:
        plan: Plan of the forecast or ranking, whose adapters lie on a copy of the model.

    Returns:
        The bench.
    """
    return LanguageBench(plan.language, plan.task, plan.rows, plan.settings)


def measures(kind: TaskKind) -> Sequence[Metric]:
    """Metrics that a trial keeps, beside its losses.

    Args:
        kind: Kind of task.

    Returns:
        The main one; of a language model the token accuracy as well.
    """
    found = metrics_of(kind)
    return found if found is LANGUAGE_METRICS else found[:1]
