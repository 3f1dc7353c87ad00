"""Tiny causal language models of many families, and a tokenizer for them: no files, no network."""

import torch
import transformers as tf
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from chats import CHATML, make_tokenizer

import cases

EOS = 2
SIZES = {**cases.SIZES, "max_position_embeddings": 40}
DECODER = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
# by transformers' name of the architecture
FAMILIES = {
    "llama": DECODER,
    "qwen2": {**DECODER, "tie_word_embeddings": True},
    "qwen3": DECODER,
    "mistral": DECODER,
    "gemma": DECODER,
    "gemma2": {**DECODER, "query_pre_attn_scalar": 8},
    "gemma3_text": {**DECODER, "query_pre_attn_scalar": 8},
    "phi3": {**DECODER, "original_max_position_embeddings": 40},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40},
    "gpt_neox": {**SIZES, "rotary_pct": 0.5},
    "opt": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 40}
    | {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "mixtral": {**DECODER, "num_local_experts": 2, "num_experts_per_tok": 1},
}
CHAT = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' </s> ' }}{% endfor %}"


def tokenizer(*, pad: bool = False, words: int = 20, chat: bool = False):
    """Word-level, ended by `</s>`, as decoders often come: without a padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<unk>", "<s>", "</s>"] + (["<pad>"] if pad else [])
    more = [f"word{number}" for number in range(words - len(cases.WORDS))]
    names = {word: index for index, word in enumerate([*special, *cases.WORDS[:words], *more])}
    core = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    options = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | ({"pad_token": "<pad>"} if pad else {})
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=64, model_input_names=["input_ids", "attention_mask"], **options
    )
    made.chat_template = CHAT if chat else None
    return made


def build(name: str, *, spread: float = 6.0, **options: object) -> nn.Module:
    """A tiny model with weights `spread` times the usual, so that its logits differ."""
    torch.manual_seed(3)
    common = {"vocab_size": cases.VOCABULARY, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": EOS}
    config = CONFIG_MAPPING[name](**{**common, **FAMILIES[name], **options})
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(spread)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def save(folder, name: str = "llama", *, pad: bool = False, **options: object) -> str:
    """Save a checkpoint with its tokenizer, as the hub would hold it."""
    build(name, **options).save_pretrained(folder)
    tokenizer(pad=pad).save_pretrained(folder)
    return str(folder)


def save_chat(folder) -> str:
    """Save a tiny Llama with the tokenizer of bytes and a chat template."""
    build("llama", vocab_size=320, spread=3.0, max_position_embeddings=64).save_pretrained(folder)
    make_tokenizer(CHATML).save_pretrained(folder)
    return str(folder)
