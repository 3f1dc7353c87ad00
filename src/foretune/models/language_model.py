"""Language models, causal or encoder-decoders: loaded by the rules of classifiers, every weight read, and adapted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from foretune.errors import ModelError, few
from foretune.language.encode import SHIFT, collate
from foretune.models.alignment import (
    check_padding,
    is_neutral,
    make_neutral,
    pad_tokenizer,
    sharing_copy,
    table_size,
    try_language,
)
from foretune.models.checkpoint import CheckpointNames, backbone_prefix, check_backbone
from foretune.models.classifier import check_finite, check_own, position_limit
from foretune.models.dispatched import inputs_device
from foretune.models.encoder_decoder import decoder_inputs, kind_of
from foretune.models.form import form_of
from foretune.models.loading import read_config, read_tokenizer, read_weights
from foretune.models.output_layer import output_layer
from foretune.models.placement import lora_config, place
from foretune.models.source import check_weights, locate, quiet, reading, shown_source
from foretune.settings.groups import AdapterConfig, LanguageKind

_REMEDY = "load it with AutoModelForCausalLM.from_pretrained, an encoder-decoder with AutoModelForSeq2SeqLM"
# of each kind transformers' automatic class, which configurations it takes, and the names of its classes
_AUTO: dict[LanguageKind, tuple[str, Any, Mapping[str, Any]]] = {
    "causal-lm": ("AutoModelForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "seq2seq": (
        "AutoModelForSeq2SeqLM",
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ),
}


@dataclass(frozen=True)
class LanguageModel:
    """A loaded language model: logits of the next token at every position, of an encoder-decoder of the completion.

    Attributes:
        source: Path or hub id as given.
        model: transformers model in eval mode, called as `model(**inputs).logits`; it keeps no keys and values.
        tokenizer: Its tokenizer, with a padding token; batches are padded on the right.
        notes: What to say of the checkpoint.
    """

    source: str
    model: Any
    tokenizer: Any
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return inputs_device(self.model)

    @property
    def kind(self) -> LanguageKind:
        """Whether it is causal or an encoder-decoder."""
        return kind_of(self.model.config)

    @property
    def shift(self) -> int:
        """Logits at position t are held against the label at t + shift."""
        return SHIFT[self.kind]

    def collate(self, features: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Put rows into one batch, padded on the right.

        Args:
            features: Rows, as `foretune.sequence_plan` gives them.

        Returns:
            What the model is called with, and `labels`; of an encoder-decoder `decoder_input_ids` too.
        """
        batch = collate(features, int(self.tokenizer.pad_token_id))
        return batch | decoder_inputs(self.model, batch["labels"])

    @property
    def position_limit(self) -> int | None:
        """Longest sequence that the model allows, in tokens; None where positions are not bounded.

        Raises:
            ModelError: If its config.json leaves no position.
        """
        return position_limit(self.model)


def is_language_model(source: str, *, trust_remote_code: bool = False) -> bool:
    """Tell by its config.json whether a checkpoint was saved as a language model, causal or an encoder-decoder.

    Args:
        source: Local folder or hub id.
        trust_remote_code: Whether code from the model's repository may run.

    Returns:
        Whether its architecture is one of transformers', or its own code has one.

    Raises:
        ModelError: If there is no config.json, or it is broken.
    """
    config = read_config(source, trust_remote_code=trust_remote_code)
    auto, _, classes = _AUTO[kind_of(config)]
    known = {name for names in classes.values() for name in ((names,) if isinstance(names, str) else names)}
    if known.intersection(getattr(config, "architectures", None) or ()):
        return True
    return trust_remote_code and auto in (getattr(config, "auto_map", None) or {})


def language_kind(source: str, *, trust_remote_code: bool = False) -> LanguageKind:
    """Tell by its config.json which kind of language model a checkpoint is.

    Args:
        source: Local folder or hub id.
        trust_remote_code: Whether code from the model's repository may run.

    Returns:
        causal-lm or seq2seq.

    Raises:
        ModelError: If there is no config.json, or it is broken.
    """
    return kind_of(read_config(source, trust_remote_code=trust_remote_code))


def load_language_model(
    source: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    quantization: str = "none",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a pretrained language model: of an encoder-decoder the one that writes, else a causal one.

    Only safetensors are read: nothing is unpickled. No weight is drawn; an output layer that is tied to the embeddings
    need not be in the checkpoint. A tokenizer without padding token pads with its end-of-text token, which changes no
    embedding.

    Args:
        source: Local folder or hub id.
        dtype: One of `foretune.settings.groups.Dtype`.
        device: As `foretune.models.form.form_of`.
        quantization: One of `foretune.settings.groups.Quantization`.
        trust_remote_code: Whether code from the model's repository may run.

    Returns:
        Model in eval mode on the device, and its tokenizer.

    Raises:
        ModelError: If it cannot be loaded or is no language model, its weights are not those of its
            architecture, one is not finite, or the tokenizer has tokens that the model has no embedding for.
    """
    form = form_of(dtype, device, quantization)
    config = read_config(source, trust_remote_code=trust_remote_code)
    named = f"model {shown_source(source)}"
    _check_architecture(config, named, trust_remote_code=trust_remote_code)
    location = locate(source)
    check_weights(location, config, source)
    with reading(source, "config.json of model"):
        config.return_dict = True
        config.output_attentions = config.output_hidden_states = False
    model, names = read_weights(
        getattr(transformers, _AUTO[kind_of(config)][0]),
        source,
        config,
        seed=0,
        form=form,
        trust_remote_code=trust_remote_code,
    )
    with reading(source, "model"):
        _check_output(model, names, named)
        check_backbone(model, names, shown_source(source), whole=True)
    tokenizer = pad_tokenizer(read_tokenizer(location, source, trust_remote_code=trust_remote_code))
    check_padding(model, tokenizer)
    _check_vocabulary(model, tokenizer, named)
    make_neutral(model, tokenizer, None)
    model = form.settle(model, named)
    check_finite(model)
    try_language(model, tokenizer, named)
    return LanguageModel(source, model, tokenizer, _notes(model, names.unexpected))


def _check_architecture(config: Any, named: str, *, trust_remote_code: bool) -> None:
    kind = kind_of(config)
    auto, known, _ = _AUTO[kind]
    brought = trust_remote_code and auto in (getattr(config, "auto_map", None) or {})
    if not brought and type(config) not in known:
        what = "causal language model" if kind == "causal-lm" else "sequence-to-sequence language model"
        raise ModelError(f"{named} is of kind {config.model_type!r}, which has no {what}: name another")


def _check_output(model: nn.Module, names: CheckpointNames, named: str) -> None:
    """A checkpoint of the backbone alone, or of a classifier, whose output layer would be drawn at random."""
    last = output_layer(model)
    new = sorted({*names.missing, *(name for name, _, _ in names.mismatched)})
    backbone = tuple(f"{name}." for name, _ in model.named_children() if not f"{last}.".startswith(f"{name}."))
    # T5's configuration ties every model; what it keeps of config.json is that the logits are not scaled as tied ones
    tied = last is not None and model.get_submodule(last).weight is getattr(_table(model), "weight", None)
    if tied and getattr(model.config, "scale_decoder_outputs", True) is False:
        new.append(f"{last}.weight")
    if new and not any(name.startswith(backbone) for name in new):
        raise ModelError(
            f"the checkpoint of {named} does not give the layer of the next token's logits ({few(new)}): take the one "
            f"that {_AUTO[kind_of(model.config)][0]} saved, or set tie_word_embeddings in config.json if it is tied"
        )


def _table(model: Any) -> Any:
    try:
        return model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _check_vocabulary(model: Any, tokenizer: Any, named: str) -> None:
    """Every token needs an embedding to be read, and a logit to be written."""
    last = output_layer(model)
    n_logits = None if last is None else getattr(model.get_submodule(last), "out_features", None)
    rows = min((size for size in (table_size(model), n_logits) if size is not None), default=None)
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if rows is not None and largest >= rows:
        raise ModelError(
            f"the tokenizer of {named} has {largest + 1:,} tokens, the last {token!r}, and the model's embedding table "
            f"has {rows:,} rows: take the tokenizer that belongs to the model, or call "
            "model.resize_token_embeddings(len(tokenizer)) and save"
        )


def _notes(model: nn.Module, unexpected: Sequence[str]) -> tuple[str, ...]:
    prefix = backbone_prefix(model)
    parts = dict.fromkeys(name.split(".")[0] for name in sorted(unexpected) if not name.startswith(prefix))
    return (f"the checkpoint's {few(parts)} has no place in a language model: left out",) if parts else ()


def own_language_model(model: Any, tokenizer: Any, *, bare: bool) -> LanguageModel:
    """Take the user's own objects; they are left as they are.

    Where the model has to be set to fit (its padding token is not the tokenizer's, it keeps keys and values, it
    checkpoints, it returns tuples), a copy that shares the weights is taken.

    Args:
        model: transformers language model, causal or an encoder-decoder, or a peft model of one.
        tokenizer: Its tokenizer.
        bare: Whether adapters are still to be put on it, so that it must not have any.

    Returns:
        Both, brought to agree.

    Raises:
        ModelError: If one of them is something else, the two do not fit, or the model carries an adapter where it
            must not.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    kind = type(base)
    if not isinstance(base, nn.Module) or not hasattr(base, "config"):
        raise ModelError(f"expected a transformers causal language model, got {kind.__name__}: {_REMEDY}")
    if output_layer(base) is None:
        raise ModelError(f"{kind.__name__} has no layer that gives the logits of the next token: {_REMEDY}")
    check_own(model, tokenizer, bare=bare)
    named = f"the model {kind.__name__}"
    tokenizer = pad_tokenizer(tokenizer)
    check_padding(base, tokenizer)
    _check_vocabulary(base, tokenizer, named)
    if not is_neutral(model, tokenizer, None):
        model = sharing_copy(model)
        make_neutral(model, tokenizer, None)
    try_language(model, tokenizer, named)
    name = str(getattr(base.config, "_name_or_path", "") or kind.__name__)
    return LanguageModel(name, model, tokenizer)


def place_language(language: LanguageModel, adapter: AdapterConfig, *, seed: int) -> PeftModel:
    """Put adapters on a language model; B = 0, so that its logits stay as they were until the adapter trains.

    Without modules in the settings all linear ones are adapted. The layer of the next token's logits is left out, tied
    or not; so are experts whose weights lie in one tensor, and routers.

    Args:
        language: Without adapters; left as it is.
        adapter: Settings.
        seed: Seed of the random A.

    Returns:
        The peft model, in eval mode.

    Raises:
        PlacementError: If the settings do not fit the model.
    """
    with quiet():
        return place(language.model, lora_config(language.model, adapter), seed=seed)
