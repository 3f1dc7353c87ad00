"""What tells an encoder-decoder from a decoder alone: what its decoder reads, made of the labels."""

import sys
from typing import Any

import torch
from torch import Tensor

from foretune.errors import ModelError
from foretune.settings.groups import LanguageKind


def kind_of(config: Any) -> LanguageKind:
    """Say which kind of language model a configuration makes.

    Args:
        config: transformers' configuration.

    Returns:
        seq2seq of an encoder-decoder, else causal-lm.
    """
    return "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal-lm"


def decoder_inputs(model: Any, labels: Tensor) -> dict[str, Tensor]:
    """Make what the decoder reads of the labels that it is to write, as DataCollatorForSeq2Seq does.

    Of a model that has no method for it (M2M100, NLLB, Blenderbot), as the model itself does with labels alone.

    Args:
        model: transformers language model, or a peft model of one.
        labels: rows × T token ids, −100 where there is no loss.

    Returns:
        `decoder_input_ids`, rows × T, the label before in each place; nothing of a decoder alone.

    Raises:
        ModelError: If the model does not say how.
    """
    if kind_of(model.config) == "causal-lm":
        return {}
    with torch.no_grad():
        prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if prepare is not None:
            return {"decoder_input_ids": prepare(labels=labels)}
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        shift = getattr(sys.modules[type(base).__module__], "shift_tokens_right", None)
        if shift is not None:
            config = model.config
            return {"decoder_input_ids": shift(labels, config.pad_token_id, config.decoder_start_token_id)}
    raise ModelError(
        f"{type(model).__name__} has no prepare_decoder_input_ids_from_labels, so that nobody knows what its decoder "
        "reads: name another model"
    )
