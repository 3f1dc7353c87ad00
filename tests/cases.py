"""Tiny classifiers of every supported architecture, built from configs: no files, no network."""

import copy
from collections.abc import Callable

import torch
import transformers as tf
from peft import LoraConfig
from torch import nn

from foretune.models.adapted import Batch

import precision

VOCABULARY = 50
PAD = 1
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def encoder(config: type, model: type, n_classes: int, **options: int) -> nn.Module:
    return model(config(vocab_size=VOCABULARY, pad_token_id=PAD, num_labels=n_classes, **SIZES, **options))


def bert(n_classes: int) -> nn.Module:
    return encoder(tf.BertConfig, tf.BertForSequenceClassification, n_classes)


def roberta(n_classes: int) -> nn.Module:
    return encoder(tf.RobertaConfig, tf.RobertaForSequenceClassification, n_classes, max_position_embeddings=40)


def mpnet(n_classes: int) -> nn.Module:
    return encoder(tf.MPNetConfig, tf.MPNetForSequenceClassification, n_classes, max_position_embeddings=40)


def distilbert(n_classes: int) -> nn.Module:
    config = tf.DistilBertConfig(
        vocab_size=VOCABULARY, pad_token_id=PAD, num_labels=n_classes, dim=16, n_layers=2, n_heads=2, hidden_dim=24
    )
    return tf.DistilBertForSequenceClassification(config)


def gpt2(n_classes: int) -> nn.Module:
    config = tf.GPT2Config(
        vocab_size=VOCABULARY,
        pad_token_id=PAD,
        bos_token_id=0,
        eos_token_id=0,
        num_labels=n_classes,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=40,
    )
    return tf.GPT2ForSequenceClassification(config)


def llama(n_classes: int) -> nn.Module:
    config = tf.LlamaConfig(
        vocab_size=VOCABULARY,
        pad_token_id=PAD,
        bos_token_id=0,
        eos_token_id=2,
        num_labels=n_classes,
        num_key_value_heads=1,
        **SIZES,
    )
    return tf.LlamaForSequenceClassification(config)


def other(name: str, n_classes: int) -> nn.Module:
    """Families whose head, backbone or reading differs: built from their own names of sizes."""
    special = {"pad_token_id": PAD, "eos_token_id": 3, "bos_token_id": 2, "num_labels": n_classes}
    ends = {"decoder_start_token_id": 3, "d_model": 16}
    kind, options = {
        "albert": ("Albert", {"embedding_size": 12, **SIZES}),
        "electra": ("Electra", {"embedding_size": 12, **SIZES}),
        "deberta-v2": (
            "DebertaV2",
            {"type_vocab_size": 0, "relative_attention": True, "pos_att_type": ["p2c"], **SIZES},
        ),
        "modernbert": ("ModernBert", {"cls_token_id": 2, "sep_token_id": 3, "local_attention": 8, **SIZES}),
        "xlm": ("XLM", {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 40}),
        "xlnet": ("XLNet", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}),
        "opt": ("OPT", {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 40, **SIZES}),
        "bart": (
            "Bart",
            {
                **{
                    f"{part}_{what}": n
                    for part in ("encoder", "decoder")
                    for what, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))
                },
                "max_position_embeddings": 40,
                **ends,
            },
        ),
        "t5": ("T5", {"d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, **ends}),
    }[name]
    if name == "opt":
        options.pop("intermediate_size", None)
    config = getattr(tf, f"{kind}Config")(vocab_size=VOCABULARY, **{**special, **options})
    return getattr(tf, f"{kind}ForSequenceClassification")(config)


OTHERS = ("albert", "electra", "deberta-v2", "modernbert", "xlm", "xlnet", "opt", "bart", "t5")
MODELS: dict[str, Callable[[int], nn.Module]] = {
    "bert": bert,
    "roberta": roberta,
    "mpnet": mpnet,
    "distilbert": distilbert,
    "gpt2": gpt2,
    "llama": llama,
}
# attention input and output projections and both sides of the feed-forward block
TARGETS = {
    "bert": ["query", "value", "output.dense", "intermediate.dense"],
    "roberta": ["query", "key", "value", "output.dense"],
    "mpnet": ["attn.q", "attn.v", "attn.o", "intermediate.dense"],
    "distilbert": ["q_lin", "v_lin", "lin1", "lin2"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
}


def tiny(name: str, n_classes: int = 2, *, dtype: torch.dtype = torch.float64, spread: float = 10.0) -> nn.Module:
    """A tiny model with weights `spread` times the usual, so that gradients are not lost in rounding."""
    torch.manual_seed(3)
    model = MODELS[name](n_classes) if name in MODELS else other(name, n_classes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(spread)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))  # biases that are not zero
    model.config._name_or_path = f"tiny-{name}"
    return model.eval().to(dtype)


def within(name: str, exact: float) -> float:
    """Relative error that results of `tiny(name)` keep to on every processor."""
    return precision.within(exact, tiny, name)


def lora(name: str, **options: object) -> LoraConfig:
    return LoraConfig(**{"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 6, "target_modules": TARGETS[name], **options})


def ragged(n: int = 6, longest: int = 9, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [longest, 3, *torch.randint(3, longest + 1, (n - 2,), generator=generator).tolist()]
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths[:n]]


def batch_of(sequences: list[list[int]], rows: list[int] | None = None, width: int | None = None) -> Batch:
    rows = list(range(len(sequences))) if rows is None else rows
    width = max(len(sequences[row]) for row in rows) if width is None else width
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for position, row in enumerate(rows):
        ids[position, : len(sequences[row])] = torch.tensor(sequences[row])
        mask[position, : len(sequences[row])] = 1
    return Batch(torch.tensor(rows), {"input_ids": ids, "attention_mask": mask})


def with_nonzero_b(model: nn.Module) -> nn.Module:
    """Give every B random entries, as after some training."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


WORDS = "good bad fine poor great awful film book food song very quite really not the a was is it".split()  # noqa: SIM905


def tokenizer(pad: bool = True):
    """Word-level tokenizer over `WORDS` with BERT's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]
    vocabulary = {word: index for index, word in enumerate(special + WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    options = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "[SEP]"}
    if pad:
        options["pad_token"] = "[PAD]"
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=words, model_max_length=32, model_input_names=["input_ids", "attention_mask"], **options
    )


def save(folder, name: str = "bert", *, head: bool = False, pad: bool = True, dtype=torch.float32) -> str:
    """Save a tiny pretrained model as the hub would hold it: without a classifier head unless asked for."""
    model = tiny(name, 2, dtype=dtype, spread=5.0)
    (model if head else model.base_model).save_pretrained(folder)
    tokenizer(pad).save_pretrained(folder)
    return str(folder)


def review(index: int) -> tuple[str, str]:
    """A text and its label."""
    good = index % 2 == 0
    adjective = (["good", "fine", "great"] if good else ["bad", "poor", "awful"])[index % 3]
    words = ["the", WORDS[6 + index % 4], "was", *["very"] * (index % 5), adjective, WORDS[index % len(WORDS)]]
    return " ".join(words), "positive" if good else "negative"


def write_reviews(folder, n_train: int = 60, n_eval: int = 20) -> str:
    """A data set folder with train.csv and validation.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", range(n_train)), ("validation", range(n_train, n_train + n_eval))):
        lines = [f"{text},{label}" for text, label in map(review, rows)]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n", encoding="utf-8")
    return str(folder)


def write_scores(folder, n_train: int = 60, n_eval: int = 20) -> str:
    """A data set folder of pairs with a number: how many of the words they share, and how long they are."""

    def pair(index: int) -> tuple[str, str, float]:
        first, second = review(index)[0], review(index * 7 + index // 3)[0]
        a, b = set(first.split()), set(second.split())
        return first, second, round(5 * len(a & b) / len(a | b) + len(second.split()) / 10, 2)

    return _write(folder, ("sentence1", "sentence2", "score"), pair, n_train, n_eval)


def write_tags(folder, n_train: int = 60, n_eval: int = 20) -> str:
    """A data set folder of texts with any of three labels, joined by a bar."""

    def tagged(index: int) -> tuple[str, str]:
        text, label = review(index)
        there = {"positive": label == "positive", "long": len(text.split()) > 6, "food": "food" in text}
        return text, "|".join(name for name, holds in there.items() if holds)

    return _write(folder, ("text", "tags"), tagged, n_train, n_eval)


def _write(folder, header: tuple[str, ...], row_of: Callable[[int], tuple], n_train: int, n_eval: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", range(n_train)), ("validation", range(n_train, n_train + n_eval))):
        lines = [",".join(map(str, row)) for row in (header, *map(row_of, rows))]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


KINDS = [("classification", 2), ("classification", 3), ("regression", 1), ("regression", 3), ("multi-label", 3)]


def task_of(kind: str, n_outputs: int, n_train: int = 40, n_eval: int = 20):
    """Reviews with a class, numbers or flags that follow from their words."""
    import datasets

    import foretune as ft

    def rows(numbers: range) -> datasets.Dataset:
        texts = [review(i)[0] for i in numbers]
        known = [
            (review(i)[1] == "positive", text.split().count("very")) for i, text in zip(numbers, texts, strict=True)
        ]
        if kind == "classification":
            columns = {"label": ["abc"[int(good) if n_outputs == 2 else very % 3] for good, very in known]}
        elif kind == "regression":
            columns = {
                f"y{k}": [3.0 * good * (k == 0) + 0.5 * very - k for good, very in known] for k in range(n_outputs)
            }
        else:
            flags = [(int(good), int(very > 2), int(very == 1)) for good, very in known]
            columns = {f"y{k}": [row[k] for row in flags] for k in range(n_outputs)}
        return datasets.Dataset.from_dict({"text": texts, **columns})

    names = "label" if kind == "classification" else [f"y{k}" for k in range(n_outputs)]
    splits = rows(range(n_train)), rows(range(n_train, n_train + n_eval))
    return ft.task_from_datasets(*splits, text_column="text", label_column=names, task=kind)
