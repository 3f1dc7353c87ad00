"""Every adapter method of peft on tiny classifiers, and which way its gradients are taken there."""

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

import families
from methods import FAMILIES, FORWARD

ATTENTION = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
}
NORMS = {
    "bert": ["LayerNorm"],
    "roberta": ["LayerNorm"],
    "distilbert": ["sa_layer_norm", "output_layer_norm"],
    "gpt2": ["ln_1", "ln_2"],
    "llama": ["input_layernorm", "post_attention_layernorm"],
    "t5": ["layer_norm"],
}
EMBEDDINGS = dict.fromkeys(FAMILIES, "word_embeddings") | {"gpt2": "wte", "llama": "embed_tokens", "t5": "shared"}
# sizes that peft does not find in DistilBERT's configuration
PROMPTS = {"token_dim": 16, "num_layers": 2, "num_attention_heads": 2}


def _on(kind: str, **options) -> Callable[[str], PeftConfig]:
    """A method that peft puts on the modules of the attention."""
    return lambda family: getattr(peft, f"{kind}Config")(
        task_type="SEQ_CLS", **{"target_modules": ATTENTION[family], **options}
    )


def _prompts(kind: str, **options) -> Callable[[str], PeftConfig]:
    """A method with virtual tokens."""
    return lambda family: getattr(peft, f"{kind}Config")(
        task_type="SEQ_CLS", **{"num_virtual_tokens": 3, **(PROMPTS if family == "distilbert" else {}), **options}
    )


METHODS: dict[str, Callable[[str], PeftConfig]] = {
    "LORA": _on("Lora", r=2),
    "DORA": _on("Lora", r=2, use_dora=True),
    "ADALORA": _on("AdaLora", init_r=3, target_r=2, total_step=10),
    "ADAMSS": _on("Adamss"),
    "ADAPTION_PROMPT": _on("AdaptionPrompt", target_modules=None, adapter_len=3, adapter_layers=2),
    "BEFT": _on("Beft"),
    "BOFT": _on("BOFT", boft_block_size=4),
    "C3A": _on("C3A", block_size=4),
    "CARTRIDGE": _prompts("Cartridge"),
    "CPT": _prompts("CPT", cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1]),
    "DEFT": _on("Deft"),
    "DELORA": _on("Delora", r=2),
    "FOURIERFT": _on("FourierFT", n_frequency=8),
    "FROD": _on("Frod"),
    "GLORA": _on("Glora"),
    "GRALORA": _on("Gralora", r=4, gralora_k=2),
    "HIRA": _on("Hira", r=2),
    "HRA": _on("HRA", r=2),
    "IA3": lambda family: peft.IA3Config(
        task_type="SEQ_CLS",
        target_modules=ATTENTION[family] + FORWARD[family],
        feedforward_modules=FORWARD[family],
    ),
    "LILY": _on("Lily"),
    "LN_TUNING": lambda family: peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=NORMS[family]),
    "LOHA": _on("LoHa", r=2),
    "LOKR": _on("LoKr", r=2),
    "MISS": _on("Miss", r=2),
    "MULTITASK_PROMPT_TUNING": _prompts("MultitaskPromptTuning", num_tasks=2, num_ranks=1),
    "OFT": _on("OFT", oft_block_size=4, r=0),
    "OSF": _on("OSF"),
    "P_TUNING": _prompts("PromptEncoder", encoder_hidden_size=8),
    "PEANUT": _on("Peanut"),
    "POLY": _on("Poly", r=2, n_tasks=2, n_skills=2),
    "PREFIX_TUNING": _prompts("PrefixTuning"),
    "PROMPT_TUNING": _prompts("PromptTuning"),
    "PSOFT": _on("Psoft", r=2),
    "PVERA": _on("Pvera", r=2),
    "RANDLORA": _on("RandLora", r=2),
    "ROAD": _on("Road", group_size=4),
    "SHADOW": _on("Shadow"),
    "SHIRA": _on("Shira", r=2),
    "SUPERTUNING": _on("Supertuning"),
    "TINYLORA": _on("TinyLora", r=2),
    "TRAINABLE_TOKENS": lambda family: peft.TrainableTokensConfig(
        task_type="SEQ_CLS", token_indices=[5, 6, 7], target_modules=[EMBEDDINGS[family]]
    ),
    "UNILORA": _on("UniLora", r=2),
    "VBLORA": _on("VBLoRA", r=2, num_vectors=8, vector_length=4, topk=2),
    "VERA": _on("Vera", r=2),
    "WAVEFT": _on("WaveFT", n_frequency=8),
}


LINEAR_ALONE = (  # which peft puts on nn.Linear and no other module
    *("ADAMSS", "BEFT", "BOFT", "C3A", "DELORA", "GLORA", "HRA", "LILY", "LOHA", "LOKR", "MISS", "OFT", "PEANUT"),
    *("PSOFT", "ROAD", "SHIRA", "SUPERTUNING"),
)
# what peft or the model itself refuses, in its own words; of all families where the family is ""
REFUSED = {
    ("ADAPTION_PROMPT", "bert"): "Unsupported model type for adaption prompt",
    ("ADAPTION_PROMPT", "roberta"): "Unsupported model type for adaption prompt",
    ("ADAPTION_PROMPT", "distilbert"): "Unsupported model type for adaption prompt",
    ("ADAPTION_PROMPT", "t5"): "Unsupported model type for adaption prompt",
    ("CARTRIDGE", "distilbert"): "Model does not support past key values which are required for prefix tuning",
    ("CARTRIDGE", "t5"): "must match the size of tensor",
    ("CPT", ""): "CPTConfig only supports task_type = CAUSAL_LM",
    ("MULTITASK_PROMPT_TUNING", ""): "task_ids cannot be None",
    ("OSF", "gpt2"): "nothing trains beside the head",
    ("P_TUNING", "t5"): "Passing input embeddings is currently not supported",
    ("POLY", ""): "task_ids should not be None",
    ("POLY", "gpt2"): "Conv1D",
    ("PREFIX_TUNING", "distilbert"): "Model does not support past key values which are required for prefix tuning",
    ("PREFIX_TUNING", "t5"): "must match the size of tensor",
    ("PROMPT_TUNING", "t5"): "Passing input embeddings is currently not supported",
    ("SHADOW", ""): "'ShadowCarrier' object has no attribute 'view'",
    ("SHADOW", "gpt2"): "shapes cannot be multiplied",
    ("SHADOW", "t5"): "You must specify exactly one of input_ids or inputs_embeds",
    # the classifier reads its tables elsewhere
    ("TRAINABLE_TOKENS", "t5"): "the outputs do not depend on 'transformer.shared'",
} | {(method, "gpt2"): "Conv1D" for method in LINEAR_ALONE}
# whose outputs depend on the batch: decoders look for padding in token ids, of which virtual tokens have none, and
# Lily's experts are weighted by a mean over all of a batch
ALONE = {(method, family) for method in ("PROMPT_TUNING", "P_TUNING") for family in ("gpt2", "llama")}
ALONE |= {("LILY", family) for family in FAMILIES if family != "gpt2"}
# the module takes more than its inputs, or peft changes the gradient on its way
LOOPED = {("ADAPTION_PROMPT", "gpt2"), ("ADAPTION_PROMPT", "llama")}
LOOPED |= {("OSF", family) for family in FAMILIES if family != "gpt2"}
# in float64 but for what a method computes in float32: Fourier transforms, and matrices of rotations
TOLERANCE = {"C3A": 1e-5, "DEFT": 1e-5, "FOURIERFT": 1e-5, "ADAMSS": 1e-3, "TINYLORA": 1e-5, "RANDLORA": 1e-5}
FLOAT32 = {"ADAMSS"}  # keeps tensors apart from parameters and buffers, which stay in the precision they are made in


@dataclass(frozen=True)
class Ways:
    """Which way the gradients of a method are taken on a family, where it is not by module."""

    refused: Mapping[tuple[str, str], str]
    alone: Collection[tuple[str, str]]
    looped: Collection[tuple[str, str]]

    def refusal(self, method: str, family: str) -> str | None:
        """What the refusal says, None of what goes."""
        return self.refused.get((method, family), self.refused.get((method, "")))

    def of(self, method: str, family: str) -> str:
        """The way in a word or two."""
        if self.refusal(method, family) is not None:
            return "refused"
        if (method, family) in self.alone:
            return "batch size 1"
        return "loop" if (method, family) in self.looped else "by module"


class Hidden(nn.Module):
    """A module that reads a parameter which it does not hold."""

    def __init__(self, inner: nn.Module, elsewhere: torch.Tensor) -> None:
        super().__init__()
        self.inner, self.read = inner, lambda: elsewhere

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.inner(h) + h @ self.read().T


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative difference of gradients, of which some are not 0."""
    assert np.linalg.norm(expected) > 0
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


WAYS = Ways(REFUSED, ALONE, LOOPED)
GENERAL = {method: {family: WAYS.of(method, family) for family in FAMILIES} for method in METHODS}
# of these docs/methods.md says that they go the fast way, where they do
CLOSED = {"LORA", "DORA", "ADALORA", "BEFT", "IA3", "LN_TUNING", "VERA"}


def table() -> str:
    """The second table of docs/methods.md: methods without a closed form, by peft's names."""
    rows = ["| method | " + " | ".join(FAMILIES) + " |", "|" + "---|" * (len(FAMILIES) + 1)]
    for method, ways in GENERAL.items():
        if method not in CLOSED:
            rows.append(f"| {method} | " + " | ".join(ways[family] for family in FAMILIES) + " |")
    return "\n".join(rows)


def install(family: str, method: str, *, spread: float = 0.1) -> PeftModel:
    """The method on a tiny model, in float64 where it can be; what it trains is moved off its start, often at 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own words on what it starts from
        model = get_peft_model(families.build(family, dtype=torch.float32), METHODS[method](family)).eval()
        model = model if method in FLOAT32 else model.double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What trains beside the head."""
    return [p for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n]
