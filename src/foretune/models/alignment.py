"""Model and tokenizer brought to agree, by one rule for what was loaded and for the user's own objects.

The tokenizer pads the batches, so its padding token is the one that the model must take for padding: a decoder reads
its logits at the last token that is none. The user's own model is never changed: where something has to be set, it is
set on a copy that shares the weights.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from foretune.errors import ModelError, border
from foretune.models.dispatched import inputs_device
from foretune.models.encoder_decoder import decoder_inputs, kind_of
from foretune.models.output_layer import output_layer
from foretune.models.packed import PACKS, alias, keep_gradients
from foretune.models.source import quiet
from foretune.models.tuner import logits_of_texts

_CLASSES = "single_label_classification"  # what transformers takes integer labels for
_INPUT_GRADS = "make_inputs_require_grad"  # hooks of transformers and peft: enable_input_require_grads
_TRIAL = ("a", "a a a")


def sharing_copy(model: Any) -> Any:
    """Copy a model's modules and settings, not its weights.

    Args:
        model: Any module.

    Returns:
        A model of its own that has the same parameters and buffers.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): alias(tensor) for tensor in tensors})


def table_size(model: Any) -> int | None:
    """Count the rows of the model's table of token embeddings.

    Args:
        model: transformers model.

    Returns:
        Rows; None where it has no such table.
    """
    try:
        table = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return int(table.num_embeddings) if isinstance(table, nn.Embedding) else None


def pad_tokenizer(tokenizer: Any) -> Any:
    """Give a tokenizer without padding token one: decoders often come without.

    Args:
        tokenizer: transformers tokenizer; not changed.

    Returns:
        The tokenizer itself, or a copy that pads with its end-of-text or unknown token.

    Raises:
        ModelError: If it has none of these.
    """
    if tokenizer.pad_token is not None:
        return tokenizer
    token = tokenizer.eos_token or tokenizer.unk_token
    if token is None:
        raise ModelError("the tokenizer has no padding token: set tokenizer.pad_token, and save it")
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = token
    return padded


def check_padding(model: Any, tokenizer: Any) -> None:
    """Refuse a padding token that the model cannot take.

    Args:
        model: transformers model.
        tokenizer: A tokenizer with a padding token.

    Raises:
        ModelError: If it is beyond the table of embeddings, or the token at which the model reads its logits.
    """
    token, pad, rows = tokenizer.pad_token, tokenizer.pad_token_id, table_size(model)
    if pad is None or pad < 0 or (rows is not None and pad >= rows):
        raise ModelError(
            f"the tokenizer's padding token {token!r} has the id {pad}, and the model's embedding table has {rows} "
            "rows: call model.resize_token_embeddings(len(tokenizer)) and save, or let tokenizer.pad_token be another"
        )
    config = model.config
    classifies = kind_of(config) == "seq2seq" and output_layer(model) is None
    if classifies and pad == getattr(config, "eos_token_id", None):
        raise ModelError(
            f"the model reads its logits at the end-of-text token {token!r} (id {pad}), with which the tokenizer pads: "
            "let tokenizer.pad_token be another"
        )


def check_ids(ids: Sequence[Sequence[int]], model: Any, tokenizer: Any) -> None:
    """Refuse tokens that the model has no embedding for.

    Args:
        ids: Token ids of some texts.
        model: transformers model.
        tokenizer: Its tokenizer.

    Raises:
        ModelError: If an id is beyond the table, or several texts hold nothing that the tokenizer knows.
    """
    rows = table_size(model)
    largest = max((max(text) for text in ids if len(text)), default=0)
    if rows is not None and largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ModelError(
            f"the token {token!r} has the id {largest}, and the model's embedding table has {rows} rows: take the "
            "tokenizer that belongs to the model, or call model.resize_token_embeddings(len(tokenizer)) and save"
        )
    unknown = tokenizer.unk_token_id
    special = set(tokenizer.all_special_ids)
    known = any(not special.issuperset(text) for text in ids)
    if len(ids) > 1 and not known and unknown is not None and any(unknown in text for text in ids):
        raise ModelError(
            "the tokenizer knows no word of the texts, all are its unknown token: take the tokenizer that belongs to "
            "the model"
        )


def padding_side(model: Any) -> str:
    """Say where a batch is padded.

    Args:
        model: transformers model.

    Returns:
        `right`; `left` for a model that reads its logits at the last position, whatever stands there (XLNet).
    """
    config = model.config
    last = getattr(config, "model_type", None) == "xlnet" and getattr(config, "summary_type", None) == "last"
    return "left" if last else "right"


def _configs(model: nn.Module) -> Iterator[Any]:
    """Every configuration in the model once: the parts of some models have their own."""
    seen = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "to_dict") and id(config) not in seen:
            seen.add(id(config))
            yield config


def _texts_config(model: Any) -> Any:
    get = getattr(model.config, "get_text_config", None)
    return model.config if get is None else get()


def _input_grad_hooks(model: nn.Module) -> list[tuple[Any, int]]:
    return [
        (module._forward_hooks, number)
        for module in model.modules()
        for number, hook in module._forward_hooks.items()
        if getattr(hook, "__name__", "").startswith(_INPUT_GRADS)
    ]


def is_neutral(model: Any, tokenizer: Any, problem_type: str | None) -> bool:
    """Tell whether nothing has to be set for the model to be read as this tokenizer pads.

    Args:
        model: transformers model, or a peft model of one.
        tokenizer: A tokenizer with a padding token.
        problem_type: Kind of the task in transformers' words; None for a language model.

    Returns:
        Whether `make_neutral` would change nothing.
    """
    pad = tokenizer.pad_token_id
    return (
        all(getattr(config, "pad_token_id", None) == pad for config in (model.config, _texts_config(model)))
        and (_keeps_nothing(model) if problem_type is None else _poses(model.config, problem_type))
        and all(getattr(config, "return_dict", True) is True for config in _configs(model))
        and not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        and not _input_grad_hooks(model)
        and not any(getattr(module, PACKS, False) for module in model.modules())
    )


def _poses(config: Any, problem_type: str) -> bool:
    """Whether the model's own loss is that of the task; without a word of its own it goes by outputs and labels."""
    stated = getattr(config, "problem_type", None)
    return stated == problem_type or (stated is None and problem_type == _CLASSES and config.num_labels > 1)


def _keeps_nothing(model: nn.Module) -> bool:
    return not any(getattr(config, "use_cache", False) for config in _configs(model))


def make_neutral(model: Any, tokenizer: Any, problem_type: str | None) -> None:
    """Set what a checkpoint or a user brings from another task so that it does not change what is measured.

    The padding token is the tokenizer's; the loss is that of the task; outputs have names; nothing is checkpointed and
    the embeddings need no gradient, which costs passes and changes no number; 4-bit weights keep the order that has a
    gradient. A language model keeps no keys and values
    for a next token.

    Args:
        model: transformers model, or a peft model of one; changed in place.
        tokenizer: A tokenizer with a padding token.
        problem_type: Kind of the task in transformers' words; None for a language model.

    Raises:
        ModelError: If 4-bit weights are in the order that has none.
    """
    for config in (model.config, _texts_config(model)):
        config.pad_token_id = tokenizer.pad_token_id  # after the layers are made: their offsets stay
    if problem_type is not None:
        model.config.problem_type = problem_type
    for config in _configs(model):
        config.return_dict = True
        if problem_type is None and hasattr(config, "use_cache"):
            config.use_cache = False
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
    for hooks, number in _input_grad_hooks(model):
        del hooks[number]
    keep_gradients(model)


@contextmanager
def _on_trial(model: Any, named: str) -> Iterator[Any]:
    """A copy to put short texts through, for some models change their settings at the first one."""
    with border(ModelError, f"{named} does not run on a short text"), quiet(), torch.no_grad():
        yield sharing_copy(model).eval()


def _padded(texts: Sequence[str], model: Any, tokenizer: Any) -> Any:
    encoded = tokenizer(list(texts))
    check_ids([*encoded["input_ids"][:1]], model, tokenizer)
    names = [name for name in encoded if name in tokenizer.model_input_names]
    return tokenizer.pad({name: encoded[name] for name in names}, padding_side=padding_side(model), return_tensors="pt")


def _logits(trial: Any, inputs: Any) -> Any:
    device = inputs_device(trial)
    logits = getattr(trial(**{name: tensor.to(device) for name, tensor in inputs.items()}), "logits", None)
    written = inputs["decoder_input_ids"] if "decoder_input_ids" in inputs else inputs["input_ids"]
    return logits_of_texts(trial, logits, written.shape[1]) if isinstance(logits, torch.Tensor) else logits


_TENSOR_FLOAT = 2.0**-10


def try_out(model: Any, tokenizer: Any, named: str) -> None:
    """Put two short texts through a copy of the model: what cannot work is found before the work starts.

    Args:
        model: transformers sequence classifier, or a peft model of one; left as it is.
        tokenizer: A tokenizer with a padding token.
        named: What the model is called in a message.

    Raises:
        ModelError: If the pass fails, or does not give the outputs that config.json says.
    """
    with _on_trial(model, named) as trial:
        logits = _logits(trial, _padded(_TRIAL, model, tokenizer))
    n_outputs = model.config.num_labels
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != (len(_TRIAL), n_outputs):
        shape = "no logits" if not isinstance(logits, torch.Tensor) else f"logits of shape {tuple(logits.shape)}"
        raise ModelError(
            f"{named} gives {shape} for {len(_TRIAL)} texts and {n_outputs} outputs: load it with "
            "AutoModelForSequenceClassification.from_pretrained(…, num_labels=C)"
        )


def try_language(model: Any, tokenizer: Any, named: str) -> None:
    """Put short texts through a copy of a language model: it must not look ahead, an encoder-decoder in its decoder.

    A token added at the end may change the logits of those before it by rounding only, √ε of the largest of them, with
    ε of float32 on a GPU that of TensorFloat-32, which its products may be rounded to, and of 8 bits that of bfloat16.

    Args:
        model: transformers language model, or a peft model of one; left as it is.
        tokenizer: A tokenizer with a padding token.
        named: What the model is called in a message.

    Raises:
        ModelError: If the pass fails, gives no logits over the vocabulary, or logits depend on later tokens.
    """
    auto = "AutoModelForCausalLM" if kind_of(model.config) == "causal-lm" else "AutoModelForSeq2SeqLM"
    remedy = f"load it with {auto}.from_pretrained"
    with _on_trial(model, named) as trial:
        padded = _padded(_TRIAL, model, tokenizer)
        inputs = {name: padded[name] for name in ("input_ids", "attention_mask")}  # what batches hold
        batch, length = inputs["input_ids"].shape
        both = _logits(trial, inputs | decoder_inputs(trial, inputs["input_ids"]))
        if not isinstance(both, torch.Tensor) or both.ndim != 3 or tuple(both.shape[:2]) != (batch, length):
            shape = "no logits" if not isinstance(both, torch.Tensor) else f"logits of shape {tuple(both.shape)}"
            raise ModelError(f"{named} gives {shape} for {batch} texts of {length} tokens: {remedy}")
        ids = inputs["input_ids"][-1:]
        other = next(token for token in range(both.shape[-1]) if not bool((ids == token).any()))
        longer = torch.cat([ids, torch.tensor([[other]])], dim=1)
        alone, followed = (_logits(trial, _going_on(trial, ids, each)) for each in (ids, longer))
    largest = float(alone.abs().max())
    change = float((followed[:, :length] - alone).abs().max())
    epsilon = max(torch.finfo(alone.dtype).eps, _TENSOR_FLOAT if alone.device.type != "cpu" else 0.0)
    if any(parameter.dtype == torch.int8 for parameter in model.parameters()):
        epsilon = max(epsilon, torch.finfo(torch.bfloat16).eps)  # the inputs may be rounded to 8 bits too, by batch
    if change > epsilon**0.5 * largest:
        raise ModelError(f"{named} reads the tokens that come after, so it is no causal language model: {remedy}")


def _going_on(trial: Any, ids: torch.Tensor, written: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs whose logits are those of the written tokens; an encoder reads `ids` whatever is written."""
    of_decoder = decoder_inputs(trial, written)
    read = ids if of_decoder else written
    return {"input_ids": read, "attention_mask": torch.ones_like(read), **of_decoder}
