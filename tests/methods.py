"""The table of adapter methods, and tiny models that carry them.

`METHODS` says what foretune does with each method on each family, as docs/methods.md shows it: `fast` by a closed form,
`general` by automatic differentiation, `trials` where a model can only be tuned, `refused` with a line that says why.
To add a method, add a row; the tests run over the rows, and the table of the docs is compared with them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peft import (
    AdaLoraConfig,
    BeftConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    VeraConfig,
)
from torch import nn

import families
from foretune.models.placement import place

FAMILIES = ("bert", "roberta", "distilbert", "gpt2", "llama", "t5")
LINEAR = {
    "bert": ["query", "value", "output.dense"],
    "roberta": ["query", "value", "output.dense"],
    "distilbert": ["q_lin", "v_lin", "lin2"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "t5": ["q", "v", "wo"],
}
FORWARD = {
    "bert": ["output.dense"],
    "roberta": ["output.dense"],
    "distilbert": ["lin2"],
    "gpt2": ["mlp.c_proj"],
    "llama": ["down_proj"],
    "t5": ["wo"],
}
NORMS = {
    "bert": ["LayerNorm"],
    "roberta": ["LayerNorm"],
    "distilbert": ["sa_layer_norm", "output_layer_norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "t5": ["layer_norm", "final_layer_norm"],
}
TABLES = {
    "bert": "word_embeddings",
    "roberta": "word_embeddings",
    "distilbert": "word_embeddings",
    "gpt2": "wte",
    "llama": "embed_tokens",
    "t5": "shared",
}
Make = Callable[[str], PeftConfig]


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        config: Makes peft's configuration for a family.
        start: What foretune does with a new adapter, by family; families that are not named have `default`.
        default: The same.
        trained: What it does with one that has trained.
        moved: Parts of the names of the parameters that training moves away from their start; empty where the fast path
            covers the start alone.
        parts: Parts of the names of all that it trains.
        note: For the docs.
    """

    config: Make
    default: str
    trained: str
    parts: tuple[str, ...]
    moved: tuple[str, ...] = ()
    start: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def of(self, family: str) -> str:
        return self.start.get(family, self.default)


def _lora(**options) -> Make:
    return lambda family: LoraConfig(
        task_type="SEQ_CLS", r=3, lora_alpha=5, target_modules=[*LINEAR[family]], **options
    )


def _table(family: str) -> PeftConfig:
    return LoraConfig(task_type="SEQ_CLS", r=3, target_modules=[TABLES[family], *LINEAR[family]])


METHODS: dict[str, Method] = {
    "LoRA": Method(_lora(), "fast", "fast", ("lora_",), ("lora_B",)),
    "LoRA, rank-stabilised": Method(_lora(use_rslora=True), "fast", "fast", ("lora_",), ("lora_B",)),
    "LoRA with biases of B": Method(_lora(lora_bias=True), "fast", "fast", ("lora_",), ("lora_B",), note="`lora_bias`"),
    "LoRA with all biases": Method(
        _lora(bias="all"), "fast", "fast", ("lora_", ".bias"), ("lora_B",), note="`bias='all'`, BitFit beside it"
    ),
    "LoRA with the modules' biases": Method(
        _lora(bias="lora_only"), "fast", "fast", ("lora_", "base_layer.bias"), ("lora_B",), note="`bias='lora_only'`"
    ),
    "LoRA of embeddings": Method(
        _table, "general", "general", ("lora_",), note="B is random and A is 0: gradients of whole tables"
    ),
    "DoRA": Method(
        _lora(use_dora=True), "fast", "general", ("lora_",), note="its start: B = 0 and the magnitudes those of W"
    ),
    "AdaLoRA": Method(
        lambda family: AdaLoraConfig(
            task_type="SEQ_CLS", init_r=3, target_r=2, total_step=10, target_modules=LINEAR[family]
        ),
        "fast",
        "fast",
        ("lora_A", "lora_B", "lora_E"),
        ("lora_E",),
        note="the kernel of its start is that of E alone",
    ),
    "VeRA": Method(
        lambda family: VeraConfig(task_type="SEQ_CLS", r=5, target_modules=LINEAR[family]),
        "fast",
        "fast",
        ("vera_lambda_",),
        ("vera_lambda_",),
    ),
    "(IA)³": Method(
        lambda family: IA3Config(
            task_type="SEQ_CLS", target_modules=LINEAR[family], feedforward_modules=FORWARD[family]
        ),
        "fast",
        "fast",
        ("ia3_l",),
        ("ia3_l",),
    ),
    "LN tuning": Method(
        lambda family: LNTuningConfig(task_type="SEQ_CLS", target_modules=NORMS[family]),
        "fast",
        "fast",
        ("ln_tuning_layers",),
        ("ln_tuning_layers",),
    ),
    "BEFT": Method(
        lambda family: BeftConfig(task_type="SEQ_CLS", target_modules=LINEAR[family]),
        "fast",
        "fast",
        ("beft_bias",),
        ("beft_bias",),
        start={"gpt2": "refused"},
        note="peft puts it on `nn.Linear` alone",
    ),
}
FAST = [(method, family) for method, row in METHODS.items() for family in FAMILIES if row.of(family) == "fast"]


def placed(method: str, family: str, n_classes: int = 3):
    """A tiny model in float64 that carries a new adapter."""
    return place(families.build(family, n_classes), METHODS[method].config(family), seed=0)


def moved(method: str, model: nn.Module) -> nn.Module:
    """Move what the fast path covers away from its start, as some training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and any(part in name for part in METHODS[method].moved):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.1 * noise.to(parameter))
    return model


def table() -> str:
    """The table of docs/methods.md."""
    rows = ["| method | " + " | ".join(FAMILIES) + " | trained | |", "|" + "---|" * (len(FAMILIES) + 3)]
    for name, row in METHODS.items():
        cells = [name, *(row.of(family) for family in FAMILIES), row.trained, row.note]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(row.replace("|  |", "| |") for row in rows)
