"""Tiny sequence classifiers of many architectures of transformers, and what they need to be as small."""

import torch
import transformers as tf
from peft import LoraConfig
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from foretune.models.classifier import Classifier, Encoded
from foretune.models.groups import base_of
from foretune.models.placement import lora_config
from foretune.ntk.layout import find_layout
from foretune.settings.groups import AdapterConfig

import cases
import precision

EOS = 3  # [SEP] of the tiny tokenizer
COMMON = {"vocab_size": cases.VOCABULARY, "pad_token_id": cases.PAD, "bos_token_id": 2, "eos_token_id": EOS}
SIZE = {**cases.SIZES, "max_position_embeddings": 40}
DECODER = {**SIZE, "num_key_value_heads": 1, "head_dim": 8}
EXPERTS = {**DECODER, "num_local_experts": 2, "num_experts_per_tok": 1}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
RELATIVE = {
    **SIZE,
    "type_vocab_size": 0,
    "pos_att_type": ["p2c", "c2p"],
    "relative_attention": True,
    "position_biased_input": False,
}
BART = {"d_model": 16, "max_position_embeddings": 40} | {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": cases.PAD}
XLM = {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 40, "pad_index": cases.PAD}
# by transformers' name of the architecture
FAMILIES = {
    "albert": {**SIZE, "embedding_size": 12},
    "bart": BART,
    "bert": SIZE,
    "big_bird": {**SIZE, "block_size": 4, "num_random_blocks": 1},
    "bigbird_pegasus": {**BART, "block_size": 4, "num_random_blocks": 1, "attention_type": "original_full"},
    "biogpt": SIZE,
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "ctrl": {**GPT, "dff": 24},
    "deberta": RELATIVE,
    "deberta-v2": {**RELATIVE, "share_att_key": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm"},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "electra": {**SIZE, "embedding_size": 12},
    "esm": {**SIZE, "mask_token_id": 4},
    "eurobert": DECODER,
    "falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "flaubert": XLM,
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24},
    "gemma": DECODER,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox": SIZE,
    "layoutlm": {**SIZE, "max_2d_position_embeddings": 8},
    "llama": DECODER,
    "longformer": {**SIZE, "attention_window": 4},
    "mbart": BART,
    "megatron-bert": SIZE,
    "mistral": DECODER,
    "mixtral": EXPERTS,
    "mobilebert": {**SIZE, "embedding_size": 16, "intra_bottleneck_size": 8, "num_feedforward_networks": 2},
    "modernbert": {**SIZE, "global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 2, "sep_token_id": 3},
    "mpnet": SIZE,
    "mt5": T5,
    "openai-gpt": GPT,
    "opt": {
        **{name: value for name, value in SIZE.items() if name != "intermediate_size"},
        "ffn_dim": 24,
        "word_embed_proj_dim": 16,
    },
    "phi": DECODER,
    "phimoe": EXPERTS,
    "qwen2": DECODER,
    "qwen2_moe": {
        **DECODER,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    },
    "rembert": {**SIZE, "input_embedding_size": 12, "output_embedding_size": 12},
    "roberta": SIZE,
    "roformer": SIZE,
    "squeezebert": {
        **SIZE,
        "embedding_size": 16,
        **{f"{part}_groups": 1 for part in ("q", "k", "v", "post_attention", "intermediate", "output")},
    },
    "t5": T5,
    "umt5": T5,
    "xlm": XLM,
    "xlm-roberta": SIZE,
    "xmod": {**SIZE, "languages": ("en_XX",), "default_language": "en_XX"},
}
# whose outputs depend on the batch: padding leaks, or attention is random
LEAKING = {
    "convbert": {**SIZE, "embedding_size": 16, "conv_kernel_size": 3, "head_ratio": 2},
    "fnet": SIZE,
    "nystromformer": {**SIZE, "num_landmarks": 4, "segment_means_seq_len": 4, "conv_kernel_size": 3},
    "yoso": SIZE,
}
XLNET = {"xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}}  # reads the last position
SINGLE = {"mixtral", "qwen2_moe", "phimoe"}  # their experts know no float64


def build(name: str, n_classes: int = 2, *, spread: float = 6.0, dtype: torch.dtype | None = None) -> nn.Module:
    """A tiny model whose gradients are not lost in rounding; biases and norms are those of a trained one."""
    torch.manual_seed(3)
    options = {**FAMILIES, **LEAKING, **XLNET}[name]
    config = CONFIG_MAPPING[name](**{**COMMON, **options, "num_labels": n_classes})
    model = getattr(tf, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[name])(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(spread)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.config._name_or_path = f"tiny-{name}"
    return model.eval().to(dtype or (torch.float32 if name in SINGLE else torch.float64))


def within(name: str, exact: float) -> float:
    """Relative error that results of `build(name)` keep to on every processor."""
    return precision.within(exact, build, name)


def all_linear(name: str, r: int = 2) -> LoraConfig:
    return lora_config(build(name), AdapterConfig(("all-linear",), r=r))


def ragged(n: int = 6, longest: int = 9) -> list[list[int]]:
    """Token ids that end in the token that encoder-decoders read."""
    return [ended(ids) for ids in cases.ragged(n, longest)]


def ended(ids: list[int]) -> list[int]:
    return [*(EOS + 1 if token == EOS else token for token in ids[:-1]), EOS]


def encoded(sequences: list[list[int]]) -> Encoded:
    features = tuple({"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in sequences)
    return Encoded(features, 0, max(map(len, sequences)))


def layout_of(adapted, sequences, *, batch_size: int = 32):
    base = base_of(adapted.model)
    classifier = Classifier(base.config._name_or_path, base, cases.tokenizer(), "given")
    n_classes = base.config.num_labels
    return find_layout(adapted, classifier, [encoded(sequences)], n_outputs=n_classes, batch_size=batch_size)


def save(folder, name: str, *, head: bool = True) -> str:
    """Save a checkpoint: whole, or of the base as the hub holds it, without what a classifier adds."""
    model = build(name, dtype=torch.float32)
    (model if head else model.base_model).save_pretrained(folder)
    cases.tokenizer().save_pretrained(folder)
    return str(folder)
