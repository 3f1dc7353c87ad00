"""Tiny encoder-decoders with a tokenizer for them, rows of prompts with completions, and slow references."""

import datasets
import tokenizers
import torch
import transformers as tf

from chats import make_tokenizer
from foretune.language.encode import NO_LOSS
from foretune.language.load import language_task_from_datasets
from foretune.models.encoder_decoder import decoder_inputs
from foretune.models.language_model import own_language_model, place_language
from foretune.models.placement import lora_config
from foretune.ntk.sequence_losses import SequenceBatch
from foretune.settings.commands import TuneSettings
from foretune.settings.groups import AdapterConfig
from foretune.training.language import prepare_language

VOCABULARY = 320
SIDES = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 12))
}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
FAMILIES = {
    "t5": {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 1}
    | {"dropout_rate": 0.0},
    "bart": {"d_model": 8, "max_position_embeddings": 64, "decoder_start_token_id": 0, **SIDES, **NO_DROPOUT},
}
GEMMA = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
} | {
    "intermediate_size": 12,
    "vocab_size": VOCABULARY,
}
# whose gradients alone are tested
OTHERS = {
    **dict.fromkeys(["mbart", "pegasus", "marian", "m2m_100", "blenderbot", "plbart"], FAMILIES["bart"]),
    "bigbird_pegasus": {**FAMILIES["bart"], "attention_type": "original_full"},
    **dict.fromkeys(["mt5", "umt5"], FAMILIES["t5"]),
    "longt5": {**FAMILIES["t5"], "local_radius": 3},
    "t5gemma": {"encoder": GEMMA, "decoder": GEMMA, "decoder_start_token_id": 2},
}
LED = {f"max_{side}_position_embeddings": 64 for side in ("encoder", "decoder")} | {"attention_window": 4, "d_model": 8}
REFUSED = {"led": {**SIDES, **LED, "decoder_start_token_id": 0}}
# what all-linear adapts, below the layers of both sides
KINDS = {
    "t5": {
        *(f"layer.0.SelfAttention.{name}" for name in "qkvo"),
        *(f"layer.1.EncDecAttention.{name}" for name in "qkvo"),
        *(f"layer.{place}.DenseReluDense.{name}" for place in (1, 2) for name in ("wi", "wo")),
    },
    "bart": {
        *(f"{kind}.{name}_proj" for kind in ("self_attn", "encoder_attn") for name in ("q", "k", "v", "out")),
        *("fc1", "fc2"),
    },
}
SETTINGS = TuneSettings(epochs=2, learning_rate=1e-2, train_batch_size=4, batch_size=3, max_length=24)
COLOURS = ("blue", "red and thin", "not known to anybody here")


def tokenizer_of(name="t5"):
    """Bytes; every text ends with the end token, and begins with a token of BART's."""
    made = make_tokenizer()
    core = made.backend_tokenizer
    end, begin = made.eos_token, made.bos_token
    special = [(token, made.convert_tokens_to_ids(token)) for token in (end, begin)]
    single = f"{begin} $A {end}" if name == "bart" else f"$A {end}"
    core.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=special)
    made.model_input_names = ["input_ids", "attention_mask"]
    return made


def build(name="t5", *, dtype=torch.float32, spread=4.0, **options):
    """A tiny model with weights `spread` times the usual, so that its logits differ; nothing is dropped."""
    torch.manual_seed(3)
    common = {"vocab_size": VOCABULARY, "eos_token_id": 0, "pad_token_id": 1, "bos_token_id": 2}
    config = tf.AutoConfig.for_model(name, **{**common, **(FAMILIES | OTHERS | REFUSED)[name], **options})
    model = tf.AutoModelForSeq2SeqLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(spread if name == "bart" else 1.5)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval().to(dtype)


def save(folder, name="t5", **options):
    build(name, **options).save_pretrained(folder)
    tokenizer_of(name).save_pretrained(folder)
    return str(folder)


def own(name="t5", **options):
    return own_language_model(build(name, **options), tokenizer_of(name), bare=True)


def placed(name="t5", *, dtype=torch.float64, targets=("all-linear",), r=3):
    return place_language(own(name, dtype=dtype), AdapterConfig(targets, r=r), seed=0)


def rows(n, start=0):
    return [
        {"prompt": f"the colour {'of it ' * (i % 3)}? ", "completion": COLOURS[i % 3]} for i in range(start, start + n)
    ]


def task_of(n=14, n_eval=7):
    evaluation = datasets.Dataset.from_list(rows(n_eval, 100)) if n_eval else None
    return language_task_from_datasets(datasets.Dataset.from_list(rows(n)), evaluation)


def plan_of(name="t5", settings=SETTINGS, **options):
    model = own(name, **options)
    return prepare_language(model, task_of(), lora_config(model.model, AdapterConfig(r=4)), settings)


def sequences(n=5, longest=7, seed=0):
    """Tokens to read and to write, of many lengths; the first reads as many as it writes."""
    generator = torch.Generator().manual_seed(seed)

    def some(row):
        length = longest if row == 0 else int(torch.randint(2, longest + 1, (), generator=generator))
        return [*torch.randint(5, VOCABULARY, (length - 1,), generator=generator).tolist(), 0]

    return [(some(row), some(row)) for row in range(n)]


def padded(lists, filler):
    width = max(map(len, lists))
    return torch.tensor([[*one, *[filler] * (width - len(one))] for one in lists])


def batch_of(model, made, places=None):
    places = list(range(len(made))) if places is None else places
    read, written = [made[place][0] for place in places], [made[place][1] for place in places]
    labels = padded(written, NO_LOSS)
    inputs = {
        "input_ids": padded(read, 1),
        "attention_mask": padded([[1] * len(ids) for ids in read], 0),
        **decoder_inputs(model, labels),
    }
    return SequenceBatch(torch.tensor(places), inputs, labels, shift=0)


def loss_and_gradients(model, read, written, weights):
    """Loss of one sequence without padding, target by target, and its gradient with respect to whole weights."""
    start = model.get_base_model().config.decoder_start_token_id
    for weight in weights:
        weight.requires_grad_(True)
    ids, shifted = torch.tensor([read]), torch.tensor([[start, *written[:-1]]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=shifted).logits[0]
    total = logits.new_zeros(())
    for position, token in enumerate(written):
        total = total - torch.log_softmax(logits[position], dim=0)[token]
    gradients = torch.autograd.grad(total, weights)
    for weight in weights:
        weight.requires_grad_(False)
    return float(total.detach()), gradients
