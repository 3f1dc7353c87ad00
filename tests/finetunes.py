"""Small fine-tunes of causal language models: rows of every format, tiny models, plans."""

import datasets

import language
from chats import MARKED, make_tokenizer
from foretune.language.load import language_task_from_datasets
from foretune.models.language_model import own_language_model
from foretune.models.placement import lora_config
from foretune.settings.commands import TuneSettings
from foretune.settings.groups import AdapterConfig
from foretune.training.language import prepare_language

SETTINGS = TuneSettings(epochs=3, learning_rate=1e-2, train_batch_size=4, batch_size=3, max_length=40)
COLOURS = ("blue", "red and thin", "not known to anybody here")


def turn(role, content):
    return {"role": role, "content": content}


def completions(n, start=0):
    """Prompts and completions of many lengths."""
    return [
        {"prompt": f"the colour {'of it ' * (i % 3)}? ", "completion": COLOURS[i % 3]} for i in range(start, start + n)
    ]


def messages(n, start=0):
    return [
        {"messages": [turn("user", row["prompt"]), turn("assistant", row["completion"])]}
        for row in completions(n, start)
    ]


def texts(n, start=0):
    return [{"text": row["prompt"] + row["completion"]} for row in completions(n, start)]


FORMATS = {
    "messages": (messages, "assistant", {"assistant_only_loss": True}),
    "prompt-completion": (completions, None, {}),
    "text": (texts, None, {}),
}


def model_of(name="llama"):
    options = {"n_positions": 64} if name == "gpt2" else {"max_position_embeddings": 64}
    return language.build(name, vocab_size=320, spread=3.0, **options)


def task_of(form="prompt-completion", *, n_eval=7):
    made, loss_on, _ = FORMATS[form]
    train = datasets.Dataset.from_list(made(14))
    evaluation = datasets.Dataset.from_list(made(n_eval, 100)) if n_eval else None
    return language_task_from_datasets(train, evaluation, loss_on=loss_on)


def plan_of(task, settings=SETTINGS, name="llama"):
    model = own_language_model(model_of(name), make_tokenizer(MARKED), bare=True)
    return prepare_language(model, task, lora_config(model.model, AdapterConfig(r=4)), settings)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
