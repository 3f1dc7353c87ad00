"""Models and tokenizers: load a classifier, check it, turn texts into batches of token ids."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from foretune.errors import ModelError, border
from foretune.models.adapted import Batch
from foretune.models.alignment import (
    check_ids,
    check_padding,
    is_neutral,
    make_neutral,
    pad_tokenizer,
    padding_side,
    sharing_copy,
    try_out,
)
from foretune.models.dispatched import inputs_device
from foretune.models.form import form_of
from foretune.models.head_parts import check_head_plain
from foretune.models.loading import load_parts
from foretune.models.packed import unpacked
from foretune.models.source import quiet, shown_source
from foretune.models.tuner import virtual_tokens
from foretune.settings.groups import LabelKind, ModelConfig
from foretune.tasks.kinds import objective_of
from foretune.tasks.objective import Objective

_NO_LIMIT = 10**9  # transformers says "no limit" by a number of 31 digits


@dataclass(frozen=True)
class Classifier:
    """A loaded sequence classifier, in transformers' words: a model with C outputs for a text.

    Attributes:
        source: Path or hub id as given.
        model: transformers model in eval mode.
        tokenizer: Its tokenizer.
        head_source: `checkpoint`, or `seed S` where the head was initialised at random.
        new: Modules that the checkpoint did not give: of the head, and a pooler.
        notes: What to say of the checkpoint's own outputs.
    """

    source: str
    model: Any
    tokenizer: Any
    head_source: str
    new: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return inputs_device(self.model)


@dataclass(frozen=True)
class Encoded:
    """Token ids of some texts, truncated but not padded.

    Attributes:
        features: For each text the tokenizer's lists (`input_ids`, `attention_mask`, …).
        n_truncated: Texts that were longer than `max_length`.
        max_length: Longest sequence allowed, in tokens.
    """

    features: tuple[dict[str, list[int]], ...]
    n_truncated: int
    max_length: int

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each text."""
        return np.array([len(feature["input_ids"]) for feature in self.features])


def load_classifier(
    source: str,
    *,
    label_names: Sequence[str],
    seed: int,
    task: LabelKind = "classification",
    dtype: str = "float32",
    device: str = "auto",
    quantization: str = "none",
    trust_remote_code: bool = False,
) -> Classifier:
    """Load a pretrained model with a head for the given outputs.

    A head that the checkpoint lacks is the same for the same seed; the global generators are left as they were.
    Only safetensors are read: nothing is unpickled.

    Args:
        source: Local folder or hub id.
        label_names: Names of the C outputs; a head in the checkpoint that has them in another order follows.
        seed: Seed of a new head.
        task: What the outputs are: logits of classes, numbers, or logits of labels that are each there or not.
        dtype: One of `foretune.settings.groups.Dtype`.
        device: As `foretune.models.form.form_of`.
        quantization: One of `foretune.settings.groups.Quantization`.
        trust_remote_code: Whether code from the model's repository may run.

    Returns:
        Model in eval mode on the device, and its tokenizer.

    Raises:
        ModelError: If it cannot be loaded, its weights do not fit its architecture, or one is not finite.
    """
    form = form_of(dtype, device, quantization)
    objective = objective_of(task, label_names)
    loaded = load_parts(source, objective, seed=seed, form=form, trust_remote_code=trust_remote_code)
    tokenizer = pad_tokenizer(loaded.tokenizer)
    check_padding(loaded.model, tokenizer)
    make_neutral(loaded.model, tokenizer, objective.problem_type)
    model = form.settle(loaded.model, f"model {shown_source(source)}")
    check_finite(model)
    try_out(model, tokenizer, f"model {shown_source(source)}")
    head_source = f"seed {seed}" if loaded.new else "checkpoint"
    return Classifier(source, model, tokenizer, head_source, loaded.new, loaded.notes)


def own_classifier(model: Any, tokenizer: Any, objective: Objective, *, bare: bool) -> Classifier:
    """Take the user's own objects; they are left as they are.

    Where the model has to be set to fit (its padding token is not the tokenizer's, it checkpoints, it is set to another
    task, it returns tuples), a copy that shares the weights is taken.

    Args:
        model: transformers sequence classifier, or a peft model of one.
        tokenizer: Its tokenizer.
        objective: What it will be trained for.
        bare: Whether adapters are still to be put on it, so that it must not have any.

    Returns:
        Both, brought to agree.

    Raises:
        ModelError: If one of them is something else, the two do not fit, or the model has other outputs than the task.
    """
    if not isinstance(model, nn.Module) or not hasattr(getattr(model, "config", None), "num_labels"):
        raise ModelError(f"expected a transformers sequence classifier as the model, got {type(model).__name__}")
    check_own(model, tokenizer, bare=bare)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    kind = type(base)
    if kind.__module__.startswith("transformers.") and not kind.__name__.endswith("ForSequenceClassification"):
        raise ModelError(
            f"{kind.__name__} has no head that gives the outputs of a task: load the model with "
            "AutoModelForSequenceClassification.from_pretrained(…, num_labels=C)"
        )
    config: Any = model.config
    n_outputs = len(objective.names)
    if config.num_labels != n_outputs:
        raise ModelError(
            f"the model has {config.num_labels} outputs, the data set needs {n_outputs} ({objective.kind}): "
            f"load the model with num_labels={n_outputs}"
        )
    check_head_plain(base)
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    tokenizer = pad_tokenizer(tokenizer)
    check_padding(base, tokenizer)
    if not is_neutral(model, tokenizer, objective.problem_type):
        model = sharing_copy(model)
        make_neutral(model, tokenizer, objective.problem_type)
    try_out(model, tokenizer, f"the model {kind.__name__}")
    return Classifier(name, model, tokenizer, "given")


def check_own(model: nn.Module, tokenizer: Any, *, bare: bool) -> None:
    """Refuse objects of the user's that are not what they are taken for.

    Args:
        model: transformers model, or a peft model of one.
        tokenizer: Its tokenizer.
        bare: Whether adapters are still to be put on it, so that it must not have any.

    Raises:
        ModelError: If the tokenizer is none of transformers', or the model carries an adapter where it must not.
    """
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        raise ModelError(
            f"expected a transformers tokenizer, got {type(tokenizer).__name__}: load it with "
            "AutoTokenizer.from_pretrained"
        )
    if bare and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ModelError(
            "the model carries an adapter already: give it without (model.unload()), or, to score or train that "
            "adapter, give no configuration beside it"
        )


def load_model(config: ModelConfig, objective: Objective, seed: int) -> Classifier:
    """Load the model that the settings name, as `load_classifier` does.

    Args:
        config: Which model, where and how precise.
        objective: What it will be trained for.
        seed: Seed of a new head.

    Returns:
        Model in eval mode on the device, and its tokenizer.
    """
    return load_classifier(
        config.model,
        label_names=objective.names,
        seed=seed,
        task=objective.kind,
        dtype=config.dtype,
        device=config.device,
        quantization=config.quantization,
        trust_remote_code=config.trust_remote_code,
    )


def check_finite(model: nn.Module) -> None:
    """Refuse weights that are not finite.

    Args:
        model: Any model.

    Raises:
        ModelError: Naming the first parameter with an infinite or undefined entry.
    """
    for name, parameter in model.named_parameters():
        numbers = unpacked(parameter)
        if numbers is not None and not bool(torch.isfinite(numbers).all()):
            raise ModelError(f"weights {name!r} of the model are not finite: load another checkpoint or dtype")


def position_limit(model: Any) -> int | None:
    """Find the longest sequence that the model's position embeddings allow.

    Args:
        model: transformers model.

    Returns:
        Tokens, or None where positions are not bounded by a table.

    Raises:
        ModelError: If the table holds no position.
    """
    limit = _limit(getattr(model.config, "max_position_embeddings", None))
    if limit is None:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit -= int(module.padding_idx) + 1  # RoBERTa and its kin count from padding_idx + 1
            break
    limit -= virtual_tokens(model)
    if limit < 1:
        raise ModelError(f"max_position_embeddings of the model's config.json leaves {limit} positions: set it right")
    return limit


def _limit(value: Any) -> int | None:
    """A length as settings give it: many say 'none' by −1, 0 or a number beyond all bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < _NO_LIMIT:
        return None
    return int(value)


def encode(texts: Sequence[str], pairs: Sequence[str] | None, classifier: Classifier, *, max_length: int) -> Encoded:
    """Tokenise texts, or pairs of texts, and truncate them.

    Args:
        texts: Texts.
        pairs: Second texts, or None.
        classifier: Whose tokenizer and position table count.
        max_length: Longest sequence in tokens; lowered to what model and tokenizer allow.

    Returns:
        Token ids.

    Raises:
        ModelError: If `max_length` is too short for a token of the text, the tokenizer cannot pad, or a token is
            beyond the model's table.
    """
    if max_length < 1:
        raise ModelError(f"max length {max_length} must be at least 1")
    tokenizer = classifier.tokenizer
    if tokenizer.pad_token is None:
        raise ModelError("the tokenizer has no padding token: set tokenizer.pad_token")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise ModelError(f"model_max_length {tokenizer.model_max_length!r} of the tokenizer is no number: set it right")
    limits = [max_length, _limit(tokenizer.model_max_length), position_limit(classifier.model)]
    longest = min(limit for limit in limits if limit is not None)
    added = tokenizer.num_special_tokens_to_add(pair=pairs is not None)
    if longest <= added:  # some tokenizers then do not cut at all
        raise ModelError(
            f"max length {longest} leaves no room for a word beside the {added} tokens of the tokenizer: raise it"
        )
    arguments = (list(texts),) if pairs is None else (list(texts), list(pairs))
    with border(ModelError, f"the tokenizer cannot cut the texts to {longest} tokens"), quiet():
        encoded = tokenizer(*arguments, truncation=True, max_length=longest)
        whole = tokenizer(*arguments, truncation=False, return_attention_mask=False)
    names = [name for name in encoded if name in tokenizer.model_input_names]
    check_ids(encoded["input_ids"], classifier.model, tokenizer)
    features = tuple({name: encoded[name][i] for name in names} for i in range(len(texts)))
    n_truncated = sum(len(ids) > longest for ids in whole["input_ids"])
    return Encoded(features, n_truncated, longest)


def padded(features: Sequence[Mapping[str, Any]], classifier: Classifier) -> Mapping[str, Tensor]:
    """Put texts into one batch, padded to the longest.

    Args:
        features: Token ids of each text.
        classifier: Whose tokenizer pads, on the side that its model takes.

    Returns:
        The model's inputs.
    """
    batch: Mapping[str, Tensor] = classifier.tokenizer.pad(
        [dict(feature) for feature in features], padding_side=padding_side(classifier.model), return_tensors="pt"
    )
    return batch


def batches(
    encoded: Encoded, classifier: Classifier, *, batch_size: int, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Group texts of like length, longest first, each batch padded to its longest.

    Longest first, so that memory is at its peak in the first batch.

    Args:
        encoded: Token ids.
        classifier: Whose tokenizer pads, on whose device the batches lie.
        batch_size: Texts in a batch.
        rows: Texts to take; None takes all.

    Yields:
        Batches with the positions of their texts.
    """
    for rows_of_batch in group_rows(encoded, batch_size=batch_size, rows=rows):
        batch = padded([encoded.features[row] for row in rows_of_batch], classifier)
        inputs = {name: tensor.to(classifier.device) for name, tensor in batch.items()}
        yield Batch(torch.as_tensor(rows_of_batch), inputs)


def group_rows(
    encoded: Encoded, *, batch_size: int, rows: Sequence[int] | None = None
) -> tuple[NDArray[np.int64], ...]:
    """Say which texts come into one batch.

    Args:
        encoded: Token ids.
        batch_size: Texts in a batch.
        rows: Texts to take; None takes all.

    Returns:
        Positions of the texts of each batch, longest first.
    """
    chosen = np.arange(len(encoded.features)) if rows is None else np.asarray(rows, dtype=np.int64)
    order = chosen[np.argsort(-encoded.lengths[chosen], kind="stable")]
    return tuple(order[start : start + batch_size] for start in range(0, len(order), batch_size))
