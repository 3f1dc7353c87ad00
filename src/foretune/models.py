"""Models and tokenizers: load a classifier, check it, turn texts into batches of token ids."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn
from transformers.utils import logging as transformers_logging

from foretune.config import Dtype, ModelConfig
from foretune.errors import ModelError
from foretune.tangent import Batch


@dataclass(frozen=True)
class Classifier:
    """A loaded sequence classifier.

    Attributes:
        source: Path or hub id as given.
        model: transformers model in eval mode.
        tokenizer: Its tokenizer.
        head_source: `checkpoint`, or `seed S` where the head was initialised at random.
    """

    source: str
    model: Any
    tokenizer: Any
    head_source: str

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        device: torch.device = next(iter(self.model.parameters())).device
        return device


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' loading report and bar away: the caller says what was loaded."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def resolve_device(name: str) -> torch.device:
    """Resolve `auto` to the GPU if there is one, under a launcher to that of this process.

    Args:
        name: `auto`, `cpu`, `cuda`, `cuda:1`, …

    Returns:
        The device.

    Raises:
        ModelError: If the device does not exist here.
    """
    if name == "auto":
        # a launcher of several processes numbers them; each has its own GPU
        local = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {name!r} is not available here: use 'auto' or 'cpu'") from error
    return device


def load_classifier(
    source: str,
    *,
    label_names: Sequence[str],
    seed: int,
    dtype: str = "float32",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Classifier:
    """Load a pretrained model with a classification head for the given classes.

    The seed is set before loading, so that a head that the checkpoint lacks is the same for the same seed.
    Only safetensors are read: nothing is unpickled.

    Args:
        source: Local folder or hub id.
        label_names: Names of the C classes.
        seed: Seed of a new head.
        dtype: One of `foretune.config.Dtype`.
        device: As `resolve_device`.
        trust_remote_code: Whether code from the model's repository may run.

    Returns:
        Model in eval mode on the device, and its tokenizer.

    Raises:
        ModelError: If it cannot be loaded, or a weight is not finite.
    """
    if dtype not in get_args(Dtype):
        raise ModelError(f"unknown dtype {dtype!r}: use one of {', '.join(get_args(Dtype))}")
    target = resolve_device(device)
    path = Path(source).expanduser()
    if not path.is_dir() and (path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1):
        raise ModelError(f"model folder {source!r} does not exist: give a folder with config.json, or a hub id")
    location = str(path) if path.is_dir() else source
    names = dict(enumerate(label_names))
    transformers.set_seed(seed)
    try:
        with _quiet():
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                location,
                num_labels=len(names),
                id2label=names,
                label2id={name: index for index, name in names.items()},
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # a head for other classes is replaced, see head_source
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"cannot load model {source!r}: {_reason(error)}") from error
    new = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    model = model.eval().to(target)
    check_finite(model)
    _set_padding(model, tokenizer)
    return Classifier(source, model, tokenizer, f"seed {seed}" if new else "checkpoint")


def load_model(config: ModelConfig, label_names: Sequence[str], seed: int) -> Classifier:
    """Load the model that the settings name, as `load_classifier` does.

    Args:
        config: Which model, where and how precise.
        label_names: Names of the C classes.
        seed: Seed of a new head.

    Returns:
        Model in eval mode on the device, and its tokenizer.
    """
    return load_classifier(
        config.model,
        label_names=label_names,
        seed=seed,
        dtype=config.dtype,
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )


def _reason(error: Exception) -> str:
    reason = " ".join(str(error).split())
    if "couldn't connect" in reason or "offline" in reason.lower():
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        return f"it is no local folder, and the hub cannot be reached{offline}: download it and give its folder"
    return reason[:300]


def check_finite(model: nn.Module) -> None:
    """Refuse weights that are not finite.

    Args:
        model: Any model.

    Raises:
        ModelError: Naming the first parameter with an infinite or undefined entry.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"weights {name!r} of the model are not finite: load another checkpoint or dtype")


def _set_padding(model: Any, tokenizer: Any) -> None:
    """Decoders often come without a padding token, and classify at the last token that is none."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def position_limit(model: Any) -> int | None:
    """Find the longest sequence that the model's position embeddings allow.

    Args:
        model: transformers model.

    Returns:
        Tokens, or None where positions are not bounded by a table.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(limit) - int(module.padding_idx) - 1  # RoBERTa and its kin count from padding_idx + 1
    return int(limit)


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
        ModelError: If `max_length` is below 1, or the tokenizer cannot pad.
    """
    if max_length < 1:
        raise ModelError(f"max length {max_length} must be at least 1")
    tokenizer = classifier.tokenizer
    if tokenizer.pad_token is None:
        raise ModelError("the tokenizer has no padding token: set tokenizer.pad_token")
    limits = [max_length, int(tokenizer.model_max_length), position_limit(classifier.model) or max_length]
    longest = min(limits)
    arguments = (list(texts),) if pairs is None else (list(texts), list(pairs))
    with _quiet():  # counting the whole length warns of long sequences
        encoded = tokenizer(*arguments, truncation=True, max_length=longest)
        whole = tokenizer(*arguments, truncation=False, return_attention_mask=False)
    names = [name for name in encoded if name in tokenizer.model_input_names]
    features = tuple({name: encoded[name][i] for name in names} for i in range(len(texts)))
    n_truncated = sum(len(ids) > longest for ids in whole["input_ids"])
    return Encoded(features, n_truncated, longest)


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
    chosen = np.arange(len(encoded.features)) if rows is None else np.asarray(rows)
    order = chosen[np.argsort(-encoded.lengths[chosen], kind="stable")]
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        padded = classifier.tokenizer.pad(
            [encoded.features[row] for row in part], padding_side="right", return_tensors="pt"
        )
        inputs = {name: tensor.to(classifier.device) for name, tensor in padded.items()}
        yield Batch(torch.as_tensor(part), inputs)
