"""Tiny causal language models and sequences with targets, and slow references for their gradients."""

import dataclasses

import datasets
import peft
import torch
import transformers as tf

from chats import make_tokenizer
from foretune.forecasting.reach import Domain
from foretune.forecasting.sequence_calibration import SequenceCalibration, SequenceLine
from foretune.language.encode import NO_LOSS
from foretune.models.language_model import own_language_model
from foretune.ntk.sequence_losses import SequenceBatch

VOCABULARY = 11
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}


def tiny_language_model(dtype=torch.float64, vocabulary=VOCABULARY):
    torch.manual_seed(3)
    config = tf.LlamaConfig(
        vocab_size=vocabulary, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_key_value_heads=1, **SIZES
    )
    model = tf.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
    return model.eval().to(dtype)


def adapted(model, targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"), r=3):
    torch.manual_seed(5)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=6, target_modules=list(targets))
    return peft.get_peft_model(model, config).eval()


def sequences(n=5, longest=7, seed=0, vocabulary=VOCABULARY):
    """Token ids with labels: of every second one, only the end counts."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in range(n):
        length = longest if row == 0 else int(torch.randint(3, longest + 1, (), generator=generator))
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        prompt = length // 2 if row % 2 else 0
        made.append((ids, [NO_LOSS] * prompt + ids[prompt:]))
    return made


WORDS = ["the film was good", "the plot was thin", "what is the colour of the sky", "it is blue", "a user said so"]


def texts(n, offset=0):
    return datasets.Dataset.from_dict({"text": [f"{WORDS[(i + offset) % 5]} {WORDS[i * 3 % 5]}" for i in range(n)]})


def reader():
    """A tiny model with the tokenizer of bytes, for `texts`."""
    tokenizer = make_tokenizer()
    model = tiny_language_model(torch.float32, vocabulary=len(tokenizer))
    model.config.eos_token_id = tokenizer.eos_token_id
    return own_language_model(model, tokenizer, bare=True)


def batch_of(made, rows=None):
    rows = list(range(len(made))) if rows is None else rows
    width = max(len(made[row][0]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels, mask = torch.full_like(ids, NO_LOSS), torch.zeros_like(ids)
    for place, row in enumerate(rows):
        own, own_labels = made[row]
        ids[place, : len(own)], labels[place, : len(own)] = torch.tensor(own), torch.tensor(own_labels)
        mask[place, : len(own)] = 1
    return SequenceBatch(torch.tensor(rows), {"input_ids": ids, "attention_mask": mask}, labels)


def loss_and_gradients(model, ids, labels, weights):
    """Loss of one sequence, target by target, and its gradient with respect to whole weights."""
    for weight in weights:
        weight.requires_grad_(True)
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    total = logits.new_zeros(())
    for position in range(len(ids) - 1):
        if labels[position + 1] != NO_LOSS:
            total = total - torch.log_softmax(logits[position], dim=0)[labels[position + 1]]
    gradients = torch.autograd.grad(total, weights)
    for weight in weights:
        weight.requires_grad_(False)
    return float(total.detach()), gradients


def exact_fisher(model, ids, labels, weight):
    """Σ_t J_tᵀ (diag p − p pᵀ) J_t of one weight, from the Jacobian of every logit."""
    weight.requires_grad_(True)
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    fisher = 0.0
    for position in range(len(ids) - 1):
        if labels[position + 1] != NO_LOSS:
            rows = [torch.autograd.grad(f, weight, retain_graph=True)[0].flatten() for f in logits[position]]
            jacobian, p = torch.stack(rows), torch.softmax(logits[position].detach(), dim=0)
            fisher = fisher + jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    weight.requires_grad_(False)
    return fisher


def calibration(model):
    """A calibration that has seen short runs of a model."""
    plain = SequenceLine(hold=1.5, growth=0.2, trust=0.0, spread=0.01, apart=0.3, beyond=0.05, groups=6, runs=90)
    domain = Domain(
        models=(model,),
        hidden_head=False,
        classes=(1.0, 1.0),
        known_rows=(8.0, 64.0),
        rows_ratio=(1.0, 4.0),
        eval_rows=6.0,
        longest=(8.0, 16.0),
        epochs=(1.0, 3.0),
        steps=(2.0, 64.0),
        batch_size=(4.0, 4.0),
        learning_rate=(1e-5, 1e-2),
        update_rate=(1e-5, 1e0),
        kind="causal-lm",
    )
    tried = dataclasses.replace(plain, trust=1.0)
    trials = dataclasses.replace(domain, known_rows=(4.0, 64.0), rows_ratio=(1.0, 8.0))
    return SequenceCalibration(plain, tried, ("a", "b", "c"), "made", domain, trials)
