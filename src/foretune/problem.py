"""The plan of a score: the placed model, the drawn and tokenised samples, and what they cost."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from peft import PeftConfig
from torch import nn

from foretune.errors import ConfigError
from foretune.models.adapted import AdaptedModel, Adapter, Layout
from foretune.models.classifier import Classifier, Encoded, encode
from foretune.models.groups import base_of
from foretune.models.head_parts import trained_head
from foretune.models.packed import computing_dtype, n_bytes, n_weights
from foretune.models.placement import place, read_adapters
from foretune.models.tuner import is_base
from foretune.ntk.layout import find_layout, used_groups
from foretune.processes.group import ALONE, Processes
from foretune.settings.commands import ScoreSettings
from foretune.settings.groups import Sample
from foretune.settings.sizes import parse_bytes
from foretune.tasks.load import Task, TextSplit
from foretune.tasks.outputs import OutputReduction
from foretune.tasks.sampling import Split, n_training, split

OnBatch = Callable[[int], None]


@dataclass(frozen=True)
class Plan:
    """A placed model and what will be done with it.

    Attributes:
        classifier: The user's model and tokenizer, with the adapters in `placed`.
        placed: peft model, or a plain model whose layers train whole.
        adapted: Its sites and draws of A.
        task: Data.
        reduction: Output reduction.
        settings: Settings.
        sample: Rows of the run, and of them the samples of the first repeat; rows to predict.
        train: Tokens of the first repeat's training rows.
        evaluation: Tokens of the evaluation rows, None without.
        processes: Who shares the passes; this process alone unless a command was launched in several.
    """

    classifier: Classifier
    placed: Any
    adapted: AdaptedModel
    task: Task
    reduction: OutputReduction
    settings: ScoreSettings
    sample: Split
    train: Encoded
    evaluation: Encoded | None
    processes: Processes = ALONE

    @property
    def encoded(self) -> tuple[Encoded, ...]:
        """Tokens of the training and, if there are any, the evaluation rows."""
        return (self.train,) if self.evaluation is None else (self.train, self.evaluation)

    @property
    def evaluation_split(self) -> TextSplit:
        """Split that the evaluation rows come from: the training split where rows are held out of it."""
        return _evaluation_split(self.task)

    def redraw(self, repeat: int) -> tuple[Split, Encoded]:
        """Draw and tokenise the training samples of a repeat.

        Args:
            repeat: Number of the draw; 0 is the plan's own.

        Returns:
            Rows and tokens.
        """
        if repeat == 0:
            return self.sample, self.train
        rows = _draw_rows(self.task, self.settings, repeat=repeat)
        placed = replace(self.classifier, model=self.placed)
        return rows, _encode_rows(self.task.train, rows.train_indices, placed, self.settings.max_length)

    @property
    def train_rows(self) -> int:
        """Rows that the run trains on: all but those that are held out."""
        return len(self.sample.training)

    @property
    def n_passes(self) -> int:
        """Examples that go through the model in all, for a progress bar."""
        settings = self.settings
        heads = settings.heads if settings.head == "average" else 1
        probe = settings.samples if settings.head == "probe" else 0
        evaluated = 0 if self.evaluation is None else len(self.evaluation.features)
        return settings.repeats * (heads * (settings.samples + evaluated) + probe)


def _evaluation_split(task: Task) -> TextSplit:
    return task.train if task.evaluation is None else task.evaluation


def _encode_rows(split: TextSplit, rows: NDArray[np.int64], classifier: Classifier, max_length: int) -> Encoded:
    texts = [split.texts[row] for row in rows]
    pairs = None if split.pairs is None else [split.pairs[row] for row in rows]
    return encode(texts, pairs, classifier, max_length=max_length)


def place_for(
    task: Task, classifier: Classifier, config: PeftConfig | None, *, seed: int, inplace: bool = False
) -> Any:
    """Put the adapters on a model that fits the task.

    Args:
        task: Data.
        classifier: Model.
        config: peft's configuration; None if the model is a peft model already.
        seed: Seed of the random A.
        inplace: Whether the adapters may go into the classifier's own model instead of a copy.

    Returns:
        The peft model, or the plain one whose layers train whole.

    Raises:
        ConfigError: If the model's outputs and those that the task asks for differ in number.
    """
    n_outputs, objective = int(classifier.model.config.num_labels), task.objective
    if n_outputs != objective.n_outputs:
        raise ConfigError(
            f"the model has {n_outputs} outputs, the data set {objective.n_outputs} {objective.noun}: "
            f"set num_labels={objective.n_outputs}"
        )
    return classifier.model if config is None else place(classifier.model, config, seed=seed, inplace=inplace)


def prepare(
    classifier: Classifier,
    task: Task,
    config: PeftConfig | None,
    settings: ScoreSettings,
    *,
    inplace: bool = False,
    layout: Layout | None = None,
) -> Plan:
    """Place the adapters, draw the samples and tokenise them: all that can go wrong before the work starts.

    Args:
        classifier: Model and tokenizer.
        task: Data.
        config: peft's configuration; None if the model is a peft model already.
        settings: Settings.
        inplace: Whether the adapters may go into the classifier's own model instead of a copy.
        layout: Layout of a plan with the same arguments; None to look for it.

    Returns:
        The plan.

    Raises:
        ConfigError: If the head is asked for and does not train.
        KernelError: If the model's outputs depend on the batch and batches have more than one text.
    """
    placed = place_for(task, classifier, config, seed=settings.seed, inplace=inplace)
    reduction = task.objective.reduction(settings.reduction)
    adapted = read_adapters(placed, draws=settings.draws, seed=settings.seed)
    if settings.ntk_params == "adapter+head" and not adapted.head:
        _, others = trained_head(placed, str(getattr(placed, "active_adapter", "")))
        if others:
            raise ConfigError(
                f"ntk_params = 'adapter+head': the head trains {others[0]!r} as well, which is not linear, and its "
                "kernel is not known: use ntk_params = 'adapter'"
            )
        raise ConfigError("ntk_params = 'adapter+head', but no head of linear modules trains: use task_type='SEQ_CLS'")
    sample = _draw_rows(task, settings, repeat=0)
    on_placed = replace(classifier, model=placed)  # virtual tokens take positions
    train = _encode_rows(task.train, sample.train_indices, on_placed, settings.max_length)
    evaluation = None
    if settings.eval_samples:
        evaluation = _encode_rows(_evaluation_split(task), sample.eval_indices, on_placed, settings.max_length)
    encoded = [part for part in (train, evaluation) if part is not None]
    if layout is None:
        layout = find_layout(
            adapted, classifier, encoded, n_outputs=task.objective.n_outputs, batch_size=settings.batch_size
        )
    adapted = replace(adapted, layout=layout, head=_reached(adapted.head, layout))  # BigBird does not read its pooler
    if config is not None:
        reached = tuple(
            one for one in adapted.adapters if one.site.name not in layout.idle or not _unnamed(one, config)
        )
        groups = adapted.groups
        if getattr(config, "target_modules", None) == "all-linear":  # the user named none of them
            groups = used_groups(groups, layout.idle)
        adapted = replace(adapted, adapters=reached, groups=groups)
    return Plan(classifier, placed, adapted, task, reduction, settings, sample, train, evaluation)


def _unnamed(adapter: Adapter, config: PeftConfig) -> bool:
    """Whether the user asked for all of its kind, and not for this one."""
    of_biases = getattr(config, "bias", "none") == "all" and not adapter.site.rank
    return of_biases or getattr(config, "target_modules", None) == "all-linear"


def _reached(head: Mapping[str, nn.Module], layout: Layout) -> Mapping[str, nn.Module]:
    return {name: module for name, module in head.items() if name not in layout.idle}


def _draw_rows(task: Task, settings: ScoreSettings, *, repeat: int) -> Split:
    return split(task, samples=settings.samples, eval_samples=settings.eval_samples, seed=settings.seed, repeat=repeat)


def settings_of_pass(
    task: Task, sample: Sample, *, draws: int = 1, sigma: float = 1e-4, memory: str | None = None
) -> ScoreSettings:
    """Make the settings of the one pass over the samples from which runs are forecast, of the outputs that they need.

    Args:
        task: Data; no more samples are taken than rows train.
        sample: What is known of the data.
        draws: Draws of the random A.
        sigma: Regularisation σ of the condition number.
        memory: What the pass may keep in memory.

    Returns:
        The settings.
    """
    return ScoreSettings(
        samples=min(sample.samples, n_training(task)),
        eval_samples=sample.eval_samples,
        draws=draws,
        reduction=task.objective.simulated().name,
        sigma=sigma,
        max_length=sample.max_length,
        batch_size=sample.batch_size,
        seed=sample.seed,
        memory=memory,
    )


def memory_of(settings: ScoreSettings) -> int:
    """Bytes that features and kernels may take: the setting, or half of the memory that is free.

    Args:
        settings: Settings.

    Returns:
        Bytes.
    """
    given = settings.memory
    return int(psutil.virtual_memory().available) // 2 if given is None else parse_bytes("memory", given)


def expected_bytes(plan: Plan) -> dict[str, int]:
    """Estimate the memory of the passes.

    Args:
        plan: What will be done.

    Returns:
        Bytes of `weights`, `features` (exact; at most the memory that they may take), `activations` (a rough upper
        figure for transformers: what a forward pass of the largest batch keeps for its backward pass) and their sum
        `total`.
    """
    model, settings = plan.placed, plan.settings
    size = computing_dtype(model).itemsize
    weights = sum(map(n_bytes, model.parameters()))
    width = sum(adapter.width(plan.adapted.draws) for adapter in plan.adapted.adapters)
    width += sum(group.site.others for group in plan.adapted.groups)
    width = width if settings.sketch is None else settings.sketch * plan.adapted.draws
    features = min(settings.samples * plan.reduction.n_outputs * width * size, memory_of(settings))
    longest = max(int(part.lengths.max()) for part in plan.encoded)
    config = model.config
    hidden = int(getattr(config, "hidden_size", 0) or 0)
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    # about 16 tensors of the hidden width for each token and layer, and one attention map for each head
    activations = settings.batch_size * longest * layers * (16 * hidden + heads * longest) * size
    return {
        "weights": weights,
        "features": features,
        "activations": activations,
        "total": weights + features + activations,
    }


def describe(plan: Plan) -> dict[str, Any]:
    """Say what was understood, before the work starts.

    Args:
        plan: What will be done.

    Returns:
        Facts by name, JSON-ready.
    """
    task, sites, settings = plan.task, plan.adapted.sites, plan.settings
    evaluation = plan.evaluation_split
    of_sample = task.objective.describe(task.train.labels[plan.sample.train_indices])
    n_texts = sum(len(part.features) for part in plan.encoded)
    layout = plan.adapted.layout
    head = sum(p.numel() for module in plan.adapted.head.values() for p in module.parameters())
    return {
        "n": settings.samples,
        "n_eval": 0 if plan.evaluation is None else len(plan.evaluation.features),
        "repeats": settings.repeats,
        "model": plan.classifier.source,
        "dataset": task.source,
        "objective": task.objective.to_dict(),
        "architecture": type(base_of(plan.placed)).__name__,
        "parameters": sum(n_weights(p) for name, p in plan.placed.named_parameters() if is_base(name)),
        "device": str(plan.classifier.device),
        "dtype": str(computing_dtype(plan.placed)).removeprefix("torch."),
        "head": {
            "policy": settings.head,
            "source": plan.classifier.head_source,
            "new": list(plan.classifier.new),
            "notes": list(plan.classifier.notes),
            "heads": settings.heads if settings.head == "average" else 1,
            "parameters": head,
            "in_kernel": settings.ntk_params == "adapter+head",
        },
        "data": {
            "train_split": task.train.name,
            "eval_split": f"{evaluation.name} (held out)" if plan.sample.held_out else evaluation.name,
            "text_columns": list(task.text_columns),
            "label_column": task.label_column,
            "label_names": list(task.label_names),
            "train_rows": len(task.train.labels),
            "eval_rows": 0 if task.evaluation is None else len(task.evaluation.labels),
            **task.objective.describe(task.train.labels),
            **{f"sample_{name}": value for name, value in of_sample.items()},
            "fingerprint": task.fingerprint,
            "max_length": plan.train.max_length,
            "truncated_share": sum(part.n_truncated for part in plan.encoded) / n_texts,
            "duplicates": len(plan.train.features) - len({tuple(f["input_ids"]) for f in plan.train.features}),
        },
        "adapter": {
            "sites": len(sites),
            "parameters": sum(site.n_parameters for site in sites),
            "draws_of_a": plan.adapted.draws,
            "left_out": [] if layout is None else sorted(set(layout.idle).difference(site.name for site in sites)),
            "one_at_a_time": [] if layout is None else list(layout.singly),
        },
        "expected_bytes": expected_bytes(plan),
        "threads": torch.get_num_threads(),
    }
