"""The plan of a language model's forecast: the placed model, and the sequences that are known and to predict."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftConfig, PeftModel

from foretune.errors import ConfigError, DataError
from foretune.language.encode import SHIFT, EncodedRows, count_targets, encode_rows
from foretune.language.encode_pairs import encode_pairs
from foretune.language.rows import LanguageSplit, LanguageTask
from foretune.models.adapted import AdaptedModel
from foretune.models.alignment import table_size
from foretune.models.groups import base_of
from foretune.models.language_model import LanguageModel
from foretune.models.output_layer import task_type
from foretune.models.packed import computing_dtype, n_weights
from foretune.models.placement import place, read_adapters
from foretune.models.tuner import is_base
from foretune.ntk.premises import check_new_adapters
from foretune.ntk.sequence_losses import SequenceBatch
from foretune.processes.group import ALONE, Processes
from foretune.settings.groups import LanguageKind, Sample
from foretune.tasks.sampling import draw_indices, split_rows

LOGITS = 2**25  # numbers of a batch's logits at most; float32 takes 128 MiB of them, three times in a backward pass
LOSS_UNIT = "nats a token"
OnBatch = Callable[[int], None]


@dataclass(frozen=True)
class TokenRows:
    """Rows as tokens with labels.

    Attributes:
        features: For each row `input_ids`, `attention_mask` and `labels`, as `encode_rows` or `encode_pairs` gives
            them.
        indices: Rows of the split that they come from.
        kind: Kind of the model that they are for.
    """

    features: tuple[dict[str, list[int]], ...]
    indices: NDArray[np.int64]
    kind: LanguageKind = "causal-lm"

    @property
    def n_targets(self) -> int:
        """How many tokens carry loss: the first one of a row has nothing before it."""
        return sum(count_targets(self.features, SHIFT[self.kind]))

    def take(self, positions: NDArray[np.int64]) -> "TokenRows":
        """Keep some of the rows.

        Args:
            positions: Their places among these, in the order that they shall have.

        Returns:
            These rows.
        """
        return replace(
            self, features=tuple(self.features[position] for position in positions), indices=self.indices[positions]
        )

    def records(self, *, by_length: bool = False) -> list[dict[str, list[int]]]:
        """List the rows as a Trainer's data set.

        Args:
            by_length: Whether to put the longest first, so that batches hold little padding.

        Returns:
            The rows' lists.
        """
        if not by_length:
            return list(self.features)
        return sorted(self.features, key=lambda feature: -len(feature["input_ids"]))


@dataclass(frozen=True)
class ChosenRows:
    """The rows of a run as tokens.

    Attributes:
        train: Rows that train.
        evaluation: Rows to predict.
        max_length: Most tokens of a row.
        n_truncated: Rows of the splits in use that were longer.
        n_emptied: Rows of these splits of which no token carries loss, so that they are left out.
    """

    train: TokenRows
    evaluation: TokenRows
    max_length: int
    n_truncated: int
    n_emptied: int


@dataclass(frozen=True)
class SequencePlan:
    """A placed language model and what is known of its data.

    Attributes:
        language: The user's model and tokenizer.
        placed: peft model.
        adapted: Its sites and random A.
        task: Data.
        rows: Rows of the run: those that train, and those to predict.
        settings: Sizes and seed.
        known: Rows that are known before the run.
        processes: Who shares the passes; this process alone unless a command was launched in several.
    """

    language: LanguageModel
    placed: PeftModel
    adapted: AdaptedModel
    task: LanguageTask
    rows: ChosenRows
    settings: Sample
    known: TokenRows
    processes: Processes = ALONE

    @property
    def train_rows(self) -> int:
        """Rows that the run trains on."""
        return len(self.rows.train.features)

    @property
    def n_vocabulary(self) -> int:
        """Tokens that the model gives logits of."""
        return int(self.language.model.config.get_text_config().vocab_size)


def choose_rows(
    language: LanguageModel, task: LanguageTask, max_length: int, *, eval_samples: int | None, seed: int
) -> ChosenRows:
    """Choose and tokenise the rows of a run, the same for a forecast and a fine-tune.

    Args:
        language: Model and tokenizer.
        task: Data.
        max_length: Most tokens of a row, lowered to what the model allows.
        eval_samples: Rows to predict, at most; None for all there are.
        seed: Seed.

    Returns:
        The rows.

    Raises:
        DataError: If no row that trains, or none to predict, has a token that carries loss.
        ConfigError: If another kind of model was asked for.
    """
    if task.kind not in (None, language.kind):
        held = "an encoder-decoder" if language.kind == "seq2seq" else "no encoder-decoder"
        raise ConfigError(f"task = {task.kind!r}, but model {language.source} is {held}: leave the task out")
    limits = (max_length, language.position_limit)
    longest = min(limit for limit in limits if limit is not None)
    n_eval = None if task.evaluation is None else len(task.evaluation.rows)
    training, predicted = split_rows(len(task.train.rows), n_eval, eval_samples=eval_samples, seed=seed)
    parts = [_encode(task.train, task, language, longest)]
    if task.evaluation is not None:
        parts.append(_encode(task.evaluation, task, language, longest))
    return ChosenRows(
        _select(parts[0], training, "that train"),
        _select(parts[-1], predicted, "to evaluate on"),
        longest,
        sum(part.n_truncated for part in parts),
        sum(part.n_emptied for part in parts),
    )


def _encode(split: LanguageSplit, task: LanguageTask, language: LanguageModel, max_length: int) -> EncodedRows:
    """The whole split, so that messages name its rows by their numbers."""
    encode = {"causal-lm": encode_rows, "seq2seq": encode_pairs}[language.kind]
    return encode(
        split.rows,
        language.tokenizer,
        max_length=max_length,
        loss_on=task.loss_on,
        vocab_size=table_size(language.model),
    )


def _select(encoded: EncodedRows, rows: Iterable[int], which: str) -> TokenRows:
    places = {row: place for place, row in enumerate(encoded.kept)}
    kept = [int(row) for row in rows if int(row) in places]
    if not kept:
        raise DataError(
            f"none of the rows {which} has a token that carries loss within max_length = {encoded.max_length}: raise "
            f"max_length, or give more rows"
        )
    features = tuple(encoded.features[places[row]] for row in kept)
    return TokenRows(features, np.array(kept, dtype=np.int64), encoded.kind)


def place_adapters(language: LanguageModel, config: PeftConfig | None, *, seed: int, inplace: bool) -> PeftModel:
    """Put adapters on a language model.

    Args:
        language: Model.
        config: peft's configuration, whose task is filled in; None if the model is a peft model already, or layers of
            it train whole.
        seed: Seed of the random A.
        inplace: Whether they may go into the model itself instead of a copy.

    Returns:
        The peft model.
    """
    if config is None:
        placed: PeftModel = language.model
        return placed
    if config.task_type is None:
        config = copy.copy(config)
        config.task_type = task_type(language.model)
    return place(language.model, config, seed=seed, inplace=inplace)


def prepare_sequences(
    language: LanguageModel,
    task: LanguageTask,
    config: PeftConfig | None,
    settings: Sample,
    *,
    inplace: bool = False,
) -> SequencePlan:
    """Place the adapters, draw the rows and tokenise them: all that can go wrong before the work starts.

    Args:
        language: Model and tokenizer.
        task: Data.
        config: peft's configuration; None if the model is a peft model already.
        settings: How many rows are known and predicted; no more are taken than there are.
        inplace: Whether the adapters may go into the given model instead of a copy.

    Returns:
        The plan.

    Raises:
        DataError: If fewer than two known rows carry loss.
        KernelError: If the adapter is no plain LoRA with B = 0.
    """
    placed = place_adapters(language, config, seed=settings.seed, inplace=inplace)
    adapted = read_adapters(placed, draws=1, seed=settings.seed)
    check_new_adapters(adapted)
    rows = choose_rows(language, task, settings.max_length, eval_samples=settings.eval_samples, seed=settings.seed)
    n_train = len(rows.train.features)
    if n_train < 2:
        raise DataError("1 row that trains carries loss, and a forecast needs 2: give more rows, or raise --max-length")
    known = rows.train.take(draw_indices(n_train, min(settings.samples, n_train), seed=settings.seed))
    return SequencePlan(language, placed, adapted, task, rows, settings, known)


def sequence_batches(
    plan: SequencePlan,
    tokens: TokenRows,
    *,
    rows: int | None = None,
    most: int | None = None,
    shared: Processes = ALONE,
    on_batch: OnBatch | None = None,
) -> Iterator[SequenceBatch]:
    """Group sequences of like length, longest first, so many that their logits stay small.

    Args:
        plan: Tokenizer, batch size and device.
        tokens: Sequences.
        rows: How many of the first sequences; None takes all.
        most: Sequences in a batch, at most; None for those of the settings.
        shared: Who shares these batches, of which this process makes its own; by default it makes all.
        on_batch: Called with a number of sequences after each batch, with that of all of them in all.

    Yields:
        Batches with the positions of their sequences.
    """
    largest = plan.settings.batch_size if most is None else min(most, plan.settings.batch_size)
    lengths, written = (
        np.array([len(feature[name]) for feature in tokens.features[:rows]]) for name in ("input_ids", "labels")
    )
    order, start = np.lexsort((-written, -lengths)), 0
    pieces = []
    while start < len(order):
        fit = LOGITS // (int(written[order[start : start + largest]].max()) * plan.n_vocabulary)
        pieces.append(order[start : start + max(1, min(largest, fit))])
        start += len(pieces[-1])
    mine = shared.share([float(lengths[chosen].max()) * len(chosen) for chosen in pieces])
    told = shared.progress([len(pieces[piece]) for piece in mine], len(order))
    for piece, count in zip(mine, told, strict=True):
        chosen = pieces[piece]
        batch = plan.language.collate([tokens.features[row] for row in chosen])
        on_device = {name: tensor.to(plan.language.device) for name, tensor in batch.items()}
        labels = on_device.pop("labels")
        yield SequenceBatch(torch.as_tensor(chosen), on_device, labels, plan.language.shift)
        if on_batch is not None:
            on_batch(count)


def describe_rows(task: LanguageTask, rows: ChosenRows) -> dict[str, Any]:
    """Say what was understood of the data.

    Args:
        task: Data.
        rows: Rows of it that a run takes.

    Returns:
        Facts by name, JSON-ready.
    """
    n_rows = len(task.train.rows) + (0 if task.evaluation is None else len(task.evaluation.rows))
    return {
        "task": rows.train.kind,
        "format": task.format,
        "text_columns": list(task.columns),
        "loss_on": task.loss_on,
        "train_split": task.train.name,
        "eval_split": f"{task.train.name} (held out)" if task.evaluation is None else task.evaluation.name,
        "train_rows": len(rows.train.features),
        "train_targets": rows.train.n_targets,
        "eval_targets": rows.evaluation.n_targets,
        "fingerprint": task.fingerprint,
        "max_length": rows.max_length,
        "truncated_rows": rows.n_truncated,
        "truncated_share": rows.n_truncated / n_rows,
        "emptied_rows": rows.n_emptied,
    }


def describe_sequences(plan: SequencePlan) -> dict[str, Any]:
    """Say what was understood, before the work starts.

    Args:
        plan: What will be done.

    Returns:
        Facts by name, JSON-ready.
    """
    task, sites, model, rows = plan.task, plan.adapted.sites, plan.placed, plan.rows
    return {
        "n": len(plan.known.features),
        "n_eval": len(rows.evaluation.features),
        "model": plan.language.source,
        "dataset": task.source,
        "objective": {"kind": plan.language.kind, "noun": "tokens", "loss_unit": LOSS_UNIT},
        "architecture": type(base_of(model)).__name__,
        "parameters": sum(n_weights(p) for name, p in model.named_parameters() if is_base(name)),
        "device": str(plan.language.device),
        "dtype": str(computing_dtype(model)).removeprefix("torch."),
        "notes": list(plan.language.notes),
        "data": {
            **describe_rows(task, rows),
            "held_out": task.evaluation is None,
            "known_targets": plan.known.n_targets,
        },
        "adapter": {"sites": len(sites), "parameters": sum(site.n_parameters for site in sites), "left_out": []},
        "threads": torch.get_num_threads(),
    }
