"""What makes a model a language model: a layer that gives the logits of the next token, and stays out of the adapter.

It may be tied to the table of embeddings, so that an adapter on it would not be one on the table.
"""

from typing import Any

from torch import nn

from foretune.models.encoder_decoder import kind_of
from foretune.settings.groups import LanguageKind

CLASSIFIER, LANGUAGE, SEQUENCE = "SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM"  # peft's names of the tasks
TASK_TYPES: dict[LanguageKind, str] = {"causal-lm": LANGUAGE, "seq2seq": SEQUENCE}


def output_layer(model: Any) -> str | None:
    """Find the layer that gives the logits over the vocabulary.

    Args:
        model: transformers model without adapters, or with.

    Returns:
        Its path; None for a classifier.
    """
    get = getattr(model, "get_output_embeddings", None)
    if get is None or type(model).__name__.endswith("ForSequenceClassification"):
        return None
    try:
        layer = get()
    except (NotImplementedError, AttributeError):
        return None
    if not isinstance(layer, nn.Module):
        return None
    return next((name for name, module in model.named_modules() if module is layer), None)


def task_type(model: nn.Module) -> str:
    """Say what a model is for.

    Args:
        model: transformers model without adapters.

    Returns:
        peft's name of the task: `SEQ_CLS` without an `output_layer`, else `SEQ_2_SEQ_LM` of an encoder-decoder and
        `CAUSAL_LM` of a decoder alone.
    """
    return CLASSIFIER if output_layer(model) is None else TASK_TYPES[kind_of(getattr(model, "config", None))]
