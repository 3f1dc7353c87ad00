"""Every adapter method of peft on tiny language models, and which way the gradients of their sequences are taken."""

import warnings

import numpy as np
import peft
import torch
import transformers as tf
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import families
import general_methods
import pairs
from foretune.language.encode import NO_LOSS
from foretune.ntk.sequence_losses import SequenceBatch

import sequences as made

FAMILIES = ("llama", "gpt2", "t5")
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
VOCABULARY = 29
START = families.FAMILIES["t5"]["decoder_start_token_id"]


def build(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A tiny model, biases and norms those of a trained one."""
    torch.manual_seed(3)
    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CONFIG_MAPPING[family](**{**common, **families.FAMILIES[family]})
    auto = tf.AutoModelForSeq2SeqLM if family == "t5" else tf.AutoModelForCausalLM
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(1.5 if family == "t5" else 6.0)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval().to(dtype)


def config_of(method: str, family: str) -> PeftConfig:
    if method == "CPT":
        return peft.CPTConfig(
            task_type=TASKS[family],
            num_virtual_tokens=2,
            cpt_token_ids=[3, 4],
            cpt_mask=[1, 1],
            cpt_tokens_type_mask=[1, 1],
        )
    config = general_methods.METHODS[method](family)
    config.task_type = TASKS[family]
    return config


def install(family: str, method: str, *, spread: float = 0.1) -> PeftModel:
    """The method on a tiny model, in float64 where it can be; what it trains is moved off its start, often at 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own words on what it starts from
        model = get_peft_model(build(family, torch.float32), config_of(method, family)).eval()
        model = model if method in general_methods.FLOAT32 else model.double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(spread * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def rows(family: str, n: int = 5):
    """Sequences of different lengths: tokens with labels, or what is read with what is written."""
    if family != "t5":
        return made.sequences(n, longest=8, vocabulary=VOCABULARY)
    return [
        ([token % (VOCABULARY - 5) + 5 for token in read], [token % (VOCABULARY - 5) + 5 for token in written])
        for read, written in pairs.sequences(n)
    ]


def batch_of(model: nn.Module, family: str, given, places=None) -> SequenceBatch:
    return pairs.batch_of(model, given, places) if family == "t5" else made.batch_of(given, places)


def gradients(model: nn.Module, family: str, given, parameters, *, draws: int = 0, seed: int = 0) -> np.ndarray:
    """n × (1 + draws) × P gradients of the loss and of drawn labels, every sequence alone and without padding.

    Logits are counted from the last position, so that it does not matter what peft puts before the sequence.
    """
    found = []
    for row, (first, second) in enumerate(given):
        ids = torch.tensor([first])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if family == "t5":
            inputs["decoder_input_ids"] = torch.tensor([[START, *second[:-1]]])
            wanted = [(t - len(second), token) for t, token in enumerate(second)]
        else:
            wanted = [(t - 1 - len(first), second[t]) for t in range(1, len(first)) if second[t] != NO_LOSS]
        log_p = torch.log_softmax(model(**inputs).logits[0], dim=1)
        p = log_p.detach().double().exp().numpy()
        uniform = np.random.default_rng([seed, row]).random((len(wanted), draws))
        columns = [[token for _, token in wanted]]
        for draw in range(draws):
            columns.append(
                [int(np.searchsorted(np.cumsum(p[at]), uniform[t, draw])) for t, (at, _) in enumerate(wanted)]
            )
        of_row = []
        for labels in columns:
            loss = -sum(log_p[at, label] for (at, _), label in zip(wanted, labels, strict=True))
            taken = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, taken, strict=True)]
            of_row.append(torch.cat([part.flatten() for part in parts]).double().numpy())
        found.append(np.stack(of_row))
    return np.stack(found)


def counts(family: str, given) -> np.ndarray:
    """Targets of each sequence."""
    return np.array([len(b) if family == "t5" else sum(label != NO_LOSS for label in b[1:]) for _, b in given])


REFUSED = {
    ("ADAPTION_PROMPT", "t5"): "Unsupported model type for adaption prompt",
    ("CPT", "llama"): "CPT trains on a loss of its own",
    ("CPT", "gpt2"): "CPT trains on a loss of its own",
    ("CPT", "t5"): "CPTConfig only supports task_type = CAUSAL_LM",
    ("MULTITASK_PROMPT_TUNING", ""): "task_ids cannot be None",
    ("OSF", "gpt2"): "nothing trains beside the head",
    ("POLY", ""): "task_ids should not be None",
    ("POLY", "gpt2"): "Conv1D",
    ("SHADOW", "llama"): "'ShadowCarrier' object has no attribute 'view'",
    ("SHADOW", "gpt2"): "shapes cannot be multiplied",
    ("SHADOW", "t5"): "You must specify exactly one of input_ids or inputs_embeds",
} | {(method, "gpt2"): "Conv1D" for method in general_methods.LINEAR_ALONE}
ALONE = {("LILY", "llama"), ("LILY", "t5")}
LOOPED = {("ADAPTION_PROMPT", "llama"), ("ADAPTION_PROMPT", "gpt2"), ("OSF", "llama"), ("OSF", "t5")}


WAYS = general_methods.Ways(REFUSED, ALONE, LOOPED)
GENERAL = {method: {family: WAYS.of(method, family) for family in FAMILIES} for method in general_methods.METHODS}


def table() -> str:
    """The third table of docs/methods.md: methods without a closed form on language models."""
    rows = ["| method | " + " | ".join(f"{family}, {TASKS[family]}" for family in FAMILIES) + " |"]
    rows.append("|" + "---|" * (len(FAMILIES) + 1))
    for method, ways in GENERAL.items():
        if method not in general_methods.CLOSED:
            rows.append(f"| {method} | " + " | ".join(ways[family] for family in FAMILIES) + " |")
    return "\n".join(rows)
