"""What is read of a model from disk or hub: the one place that loads, so that the rules hold for every command.

Only safetensors are read and nothing is unpickled. No code of a repository runs, and nobody is asked whether it may,
unless the caller trusts it. A weight of the backbone that the checkpoint does not give is refused, never drawn.
"""

import copy
import io
import random
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn

from foretune.errors import ModelError, border
from foretune.models.checkpoint import CheckpointNames, ClassNames, backbone_prefix, check_backbone, follow_names
from foretune.models.form import Form
from foretune.models.source import (
    check_config,
    check_numbers,
    check_weights,
    locate,
    quiet,
    reading,
    refuse_adapter,
    shown_source,
)
from foretune.tasks.objective import Objective

_OF_MODEL = ("*.json", "*.safetensors", "*.txt", "*.model")
_LARGE_VOCABULARY = 10_000
_KEEPS_PACKED = hasattr(transformers, "GgufConfig")  # newer ones compute on packed weights where they can
_TOKENIZER_REMEDY = "save it beside the weights with tokenizer.save_pretrained(folder)"


@dataclass(frozen=True)
class Loaded:
    """A model and a tokenizer as they were read.

    Attributes:
        model: transformers sequence classifier on the CPU.
        tokenizer: Its tokenizer.
        new: Modules that the checkpoint does not give, drawn at random: of the head, and a pooler.
        notes: What to say about the checkpoint's own outputs.
    """

    model: Any
    tokenizer: Any
    new: tuple[str, ...]
    notes: tuple[str, ...]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from a seed, and leave every generator as it was."""
    states = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            transformers.set_seed(seed)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def read_config(source: str, *, trust_remote_code: bool = False) -> Any:
    """Read a model's config.json; no code of the repository runs and nobody is asked, unless it is trusted.

    Args:
        source: Local folder or hub id.
        trust_remote_code: Whether code from the model's repository may run.

    Returns:
        transformers' configuration.

    Raises:
        ModelError: If there is none, or it is broken, or it asks for code.
    """
    location = locate(source)
    refuse_adapter(location, source)
    with reading(source, "config.json of model"), quiet():
        check_numbers(transformers.PreTrainedConfig.get_config_dict(location)[0], source)
        config = transformers.AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
    check_config(config, source, trust_remote_code=trust_remote_code)
    return config


def load_parts(source: str, objective: Objective, *, seed: int, form: Form, trust_remote_code: bool = False) -> Loaded:
    """Read a model with a head for the outputs of a task, and its tokenizer.

    Args:
        source: Local folder or hub id.
        objective: The task; a head in the checkpoint that has its names in another order follows.
        seed: Seed of a new head; the global generators are left as they were.
        form: In which form the weights are loaded.
        trust_remote_code: Whether code from the model's repository may run.

    Returns:
        Model and tokenizer.

    Raises:
        ModelError: If one of them cannot be loaded, or the weights do not fit the architecture.
    """
    config = read_config(source, trust_remote_code=trust_remote_code)
    location = locate(source)
    check_weights(location, config, source)
    names = dict(enumerate(objective.names))
    with reading(source, "config.json of model"):
        theirs = ClassNames(dict(config.id2label or {}), dict(config.label2id or {}), config.problem_type)
        config.num_labels = len(names)
        config.id2label, config.label2id = names, {name: index for index, name in names.items()}
        config.problem_type = objective.problem_type
        config.return_dict = True
        config.output_attentions = config.output_hidden_states = False
    model, checkpoint_names = read_weights(
        transformers.AutoModelForSequenceClassification,
        source,
        config,
        seed=seed,
        form=form,
        trust_remote_code=trust_remote_code,
    )
    with reading(source, "model"):
        new = check_backbone(model, checkpoint_names, shown_source(source))
        notes = follow_names(model, theirs, objective, new)
    return Loaded(model, read_tokenizer(location, source, trust_remote_code=trust_remote_code), new, notes)


def read_weights(
    kind: Any, source: str, config: Any, *, seed: int, form: Form, trust_remote_code: bool
) -> tuple[Any, CheckpointNames]:
    """Read the weights of a model; what the checkpoint does not give is drawn, for the caller to refuse or to keep.

    Args:
        kind: One of transformers' automatic classes.
        source: Local folder or hub id.
        config: transformers' configuration.
        seed: Seed of what is drawn; the global generators are left as they were.
        form: In which form the weights are loaded.
        trust_remote_code: Whether code from the model's repository may run.

    Returns:
        The model, and what was said of the load.

    Raises:
        ModelError: If it cannot be loaded.
    """
    head: tuple[str, ...] = ()
    with reading(source, "model"), quiet(), _seeded(seed):
        if form.quantization != "none":
            head = unquantised(kind, config, trust_remote_code=trust_remote_code)
        model, info = kind.from_pretrained(
            locate(source),
            config=config,
            **form.arguments(config, f"model {shown_source(source)}", head),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # a head for other outputs is replaced; anything else is refused
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    return model, _names(info)


def unquantised(kind: Any, config: Any, *, trust_remote_code: bool) -> tuple[str, ...]:
    """Name what of a model is never quantised: all that lies on its backbone, and poolers.

    Args:
        kind: One of transformers' automatic classes.
        config: transformers' configuration.
        trust_remote_code: Whether code from the model's repository may run.

    Returns:
        Module paths.
    """
    with torch.device("meta"):
        model = kind.from_config(config, trust_remote_code=trust_remote_code)
    prefix = backbone_prefix(model)
    beside = [name for name, _ in model.named_children() if f"{name}." != prefix]
    return (*beside, *(name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] == "pooler"))


def _names(info: Any) -> CheckpointNames:
    mismatched = ((name, tuple(theirs), tuple(ours)) for name, theirs, ours in info["mismatched_keys"])
    return CheckpointNames(tuple(info["missing_keys"]), tuple(mismatched), tuple(info["unexpected_keys"]))


def read_tokenizer(location: str, source: str, *, trust_remote_code: bool) -> Any:
    """Read the tokenizer of a model.

    Args:
        location: Where the model lies.
        source: Its name.
        trust_remote_code: Whether code from the model's repository may run.

    Returns:
        transformers tokenizer.

    Raises:
        ModelError: If there is none, or its vocabulary is empty.
    """
    with reading(source, "the tokenizer of model", _TOKENIZER_REMEDY), quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
        if _is_empty(tokenizer):
            raise ModelError(
                f"model {shown_source(source)} has no tokenizer, or one with an empty vocabulary: {_TOKENIZER_REMEDY}"
            )
    return tokenizer


def read_gguf(gguf_file: Path) -> tuple[Any, Any]:
    """Read a language model and its tokenizer from a GGUF, unpacked.

    Args:
        gguf_file: The file.

    Returns:
        A plain model on the CPU, float32, or bfloat16 where that holds every weight exactly; and the tokenizer.

    Raises:
        ModelError: If transformers cannot read it, or it does not hold every weight.
    """
    named = shown_source(str(gguf_file))
    place = gguf_file.expanduser().absolute()
    folder, arguments = str(place.parent), {"gguf_file": place.name}
    with border(ModelError, f"cannot read the tokenizer of {named}"), quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **arguments)
    # a bar that transformers' switch does not reach
    with border(ModelError, f"cannot read the model of {named}"), quiet(), redirect_stderr(io.StringIO()):
        unpacked = {"quantization_config": transformers.GgufConfig(dequantize=True)} if _KEEPS_PACKED else {}
        read, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **arguments, **unpacked
        )
        check_backbone(read, _names(info), named, whole=True)
        return _plain(read), tokenizer


def _plain(read: Any) -> Any:
    """The same model without what transformers remembers of the file: it does not save one that came from a GGUF."""
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    weights = dict(read.state_dict())
    if all(torch.equal(weight.to(torch.bfloat16).float(), weight) for weight in weights.values()):
        weights = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
        config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    return model


def _is_empty(tokenizer: Any) -> bool:
    """Whether it knows special tokens only: what transformers makes where the vocabulary is missing."""
    if tokenizer.vocab_size > _LARGE_VOCABULARY:
        return False
    special = {*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())}
    return not any(token.strip(" ▁Ġ") and token not in special for token in tokenizer.get_vocab())


def read_skeleton(source: str, *, trust_remote_code: bool = False) -> nn.Module:
    """Build a sequence classifier without its weights, for the names of its modules.

    Args:
        source: Local folder or hub id.
        trust_remote_code: Whether code from the model's repository may run.

    Returns:
        The model on the `meta` device.

    Raises:
        ModelError: If its config.json cannot be read, or makes no sequence classifier.
    """
    config = read_config(source, trust_remote_code=trust_remote_code)
    with reading(source, "model"), quiet(), torch.device("meta"):
        model: nn.Module = transformers.AutoModelForSequenceClassification.from_config(
            config, trust_remote_code=trust_remote_code
        )
    return model


def model_files(source: str) -> tuple[Path, ...]:
    """List the files that make a model what it is, to tell whether it has changed.

    Args:
        source: Local folder or hub id; what is not there is downloaded.

    Returns:
        Configuration, weights and tokenizer.

    Raises:
        ModelError: If the model is not there.
    """
    location = locate(source)
    refuse_adapter(location, source)
    with reading(source, "model"):
        folder = Path(location)
        if not folder.is_dir():
            folder = Path(snapshot_download(source, allow_patterns=list(_OF_MODEL)))
        return tuple(path for pattern in _OF_MODEL for path in sorted(folder.glob(pattern)))
