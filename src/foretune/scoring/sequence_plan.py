"""The plan of a language model's score: what is refused, the placed model, the drawn sequences and their memory."""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from peft import PeftConfig

from foretune.errors import ConfigError, DataError, shown
from foretune.forecasting.factor_room import GIB, free_bytes
from foretune.language.rows import LanguageTask
from foretune.models.adapted import AdaptedModel
from foretune.models.language_model import LanguageModel
from foretune.models.packed import computing_dtype, n_bytes
from foretune.models.placement import read_adapters
from foretune.ntk.sequence_features import SequenceKernelName, check_kernel_name, feature_bytes
from foretune.ntk.sequence_groups import find_sequence_layout
from foretune.sequence_plan import (
    LOGITS,
    SequencePlan,
    TokenRows,
    choose_rows,
    describe_sequences,
    place_adapters,
    sequence_batches,
)
from foretune.settings.commands import ScoreSettings
from foretune.tasks.sampling import draw_indices

LABEL_DRAWS = 4  # labels drawn for each target, of the Fisher kernel
_OF_CLASSIFIERS = {
    "head": "no head trains in a language model",
    "heads": "no head trains in a language model",
    "ntk_params": "no head trains in a language model",
    "ridge": "no kernel regression is made of a language model",
    "memory": "a score keeps the gradients of all of a language model's sequences",
    "scratch": "a score keeps the gradients of all of a language model's sequences",
    "sketch": "the gradients of a language model are not projected",
}


@dataclass(frozen=True)
class SequenceScorePlan:
    """What will be scored.

    Attributes:
        placed: The placed model and the rows of the first draw of samples.
        settings: How it is scored.
        kernel: Which kernel is taken.
    """

    placed: SequencePlan
    settings: ScoreSettings
    kernel: SequenceKernelName

    @property
    def label_draws(self) -> int:
        """Draws S of the labels; 0 of a kernel of the loss."""
        return LABEL_DRAWS if self.kernel == "fisher" else 0

    @property
    def n(self) -> int:
        """Sequences of a draw of samples."""
        return len(self.placed.known.features)

    @property
    def n_passes(self) -> int:
        """Sequences that go through the model in all, for a progress bar."""
        return self.n * self.settings.repeats

    @cached_property
    def samples(self) -> tuple[TokenRows, ...]:
        """The sequences of each draw of samples, the plan's own first."""
        every = self.placed.rows.train
        return tuple(_draw(every, self.n, self.settings.seed, repeat) for repeat in range(self.settings.repeats))


def _draw(every: TokenRows, n: int, seed: int, repeat: int) -> TokenRows:
    return every.take(draw_indices(len(every.features), n, seed=seed, repeat=repeat))


def check_language_settings(settings: ScoreSettings) -> SequenceKernelName:
    """Refuse what means nothing of a language model.

    Args:
        settings: How it is scored.

    Returns:
        The kernel.

    Raises:
        ConfigError: Naming the setting.
    """
    kernel = check_kernel_name(settings.reduction)
    defaults = {field.name: field.default for field in fields(ScoreSettings)}
    for name, why in _OF_CLASSIFIERS.items():
        value = getattr(settings, name)
        if value != defaults[name]:
            raise ConfigError(f"{name} = {shown(value)}: {why}, leave it out")
    return kernel


def prepare_sequence_score(
    language: LanguageModel,
    task: LanguageTask,
    config: PeftConfig | None,
    settings: ScoreSettings,
    *,
    inplace: bool = False,
) -> SequenceScorePlan:
    """Place the adapters, draw the rows and tokenise them: all that can go wrong before the work starts.

    The samples are drawn from the rows that train, as those of a forecast. No row is predicted.

    Args:
        language: Model and tokenizer.
        task: Data.
        config: peft's configuration; None if the model is a peft model already.
        settings: How it is scored; no more samples are taken than rows train.
        inplace: Whether the adapters may go into the given model instead of a copy.

    Returns:
        The plan.

    Raises:
        ConfigError: If a setting means nothing of a language model, or the pass needs more memory than there is.
        DataError: If fewer than two rows that train carry loss.
        KernelError: If what trains has no closed form, and the model does not run with it, or mixes the sequences of a
            batch.
    """
    kernel = check_language_settings(settings)
    placed = place_adapters(language, config, seed=settings.seed, inplace=inplace)
    adapted = replace(read_adapters(placed, draws=settings.draws, seed=settings.seed), head={})
    on_placed = replace(language, model=placed)  # virtual tokens take positions
    rows = choose_rows(on_placed, task, settings.max_length, eval_samples=None, seed=settings.seed)
    n_train = len(rows.train.features)
    if n_train < 2:
        raise DataError("1 row that trains carries loss, and a kernel needs 2: give more rows, or raise --max-length")
    known = _draw(rows.train, min(settings.samples, n_train), settings.seed, 0)
    plan = SequenceScorePlan(SequencePlan(language, placed, adapted, task, rows, settings, known), settings, kernel)
    _check_memory(plan)
    return _with_layout(plan) if adapted.groups else plan


def _with_layout(plan: SequenceScorePlan) -> SequenceScorePlan:
    """Decide how gradients without a closed form are taken, on two sequences of a batch that differ much."""
    placed, tokens = plan.placed, plan.placed.known
    lengths = [len(feature["input_ids"]) for feature in tokens.features]
    ends = [(int(batch.rows[0]), int(batch.rows[-1])) for batch in sequence_batches(placed, tokens)]  # longest first
    pair = max(ends, key=lambda rows: (rows[0] != rows[1], lengths[rows[0]] - lengths[rows[1]]))
    some = tokens.take(np.array(list(dict.fromkeys(pair))))
    layout = find_sequence_layout(placed.adapted, list(sequence_batches(placed, some)))
    return replace(plan, placed=replace(placed, adapted=replace(placed.adapted, layout=layout)))


def expected_sequence_bytes(plan: SequenceScorePlan) -> dict[str, int]:
    """Estimate the memory of the passes.

    Args:
        plan: What will be done.

    Returns:
        Bytes of `weights`, `features` and `kernels` (exact), `activations` (a rough upper figure for transformers:
        what a forward pass of the largest batch keeps, with its logits and one batch's features) and their sum
        `total`.
    """
    model, adapted, settings = plan.placed.placed, plan.placed.adapted, plan.settings
    size = computing_dtype(model).itemsize
    weights = sum(map(n_bytes, model.parameters()))
    outputs = plan.label_draws or 1
    counted = feature_bytes(
        adapted,
        n=plan.n,
        outputs=outputs,
        draws=adapted.draws,
        element_size=_element_size(adapted, size),
    )
    features = [feature for tokens in plan.samples for feature in tokens.features]
    longest, written = (max(len(feature[name]) for feature in features) for name in ("input_ids", "labels"))
    config = model.config.get_text_config()
    hidden, layers, heads = (
        int(getattr(config, name, 0) or 0) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    per_row = written * plan.placed.n_vocabulary
    batch = max(1, min(settings.batch_size, plan.n, LOGITS // per_row))
    # about 16 tensors of the hidden width for each token and layer, and one attention map for each head
    sides = [longest, written] if plan.placed.language.kind == "seq2seq" else [longest]
    activations = sum(batch * one * layers * (16 * hidden + heads * longest) * size for one in sides)
    activations += 3 * batch * per_row * max(4, size) + counted["features"] * batch // plan.n
    found = {"weights": weights, **counted, "activations": activations}
    return found | {"total": sum(found.values())}


def _element_size(adapted: AdaptedModel, size: int) -> int:
    """Bytes of a number of the gradients, which have the type of what trains."""
    if adapted.adapters:
        return adapted.adapters[0].rows.element_size()
    return max((p.element_size() for group in adapted.groups for p in group.parameters.values()), default=size)


def _check_memory(plan: SequenceScorePlan) -> None:
    found, device = expected_sequence_bytes(plan), plan.placed.language.device
    needed = found["total"] - found["weights"]  # those are loaded
    free = free_bytes(device)
    if needed > free:
        raise ConfigError(
            f"the score of {plan.n} sequences needs about {needed / GIB:.2g} GiB, {found['features'] / GIB:.2g} of "
            f"them for gradients, and {free / GIB:.2g} GiB are free: {_remedy(plan)}"
        )


def _remedy(plan: SequenceScorePlan) -> str:
    if plan.placed.adapted.groups:
        return "lower --samples or --batch-size, or let fewer numbers train"
    return "lower --samples, --draws, --lora-r or --batch-size, or name fewer --target-modules or --layers"


def describe_sequence_score(plan: SequenceScorePlan) -> dict[str, Any]:
    """Say what was understood, before the work starts.

    Args:
        plan: What will be done.

    Returns:
        Facts by name, JSON-ready.
    """
    facts = describe_sequences(plan.placed)
    known = plan.placed.known.features
    facts["n_eval"] = 0
    facts["repeats"] = plan.settings.repeats
    facts["label_draws"] = plan.label_draws
    facts["adapter"] |= {"draws_of_a": plan.placed.adapted.draws}
    facts["data"] |= {
        "sample_targets": [tokens.n_targets for tokens in plan.samples],
        "duplicates": len(known) - len({(*f["input_ids"], *f["labels"]) for f in known}),
    }
    facts["expected_bytes"] = expected_sequence_bytes(plan)
    return facts
