"""Groups of settings: each field, its default and what it may be stand here once.

What a command takes is put together from these groups in `commands`. Imports nothing heavy: the command line builds
its help from the annotations and the docstrings.
"""

from dataclasses import KW_ONLY, dataclass, fields
from numbers import Real
from typing import Annotated, Literal, get_args

from foretune.errors import ConfigError, shown
from foretune.settings.ranges import (
    LARGEST,
    Count,
    Decay,
    Layer,
    Number,
    Range,
    Rank,
    Scale,
    Seed,
    Settings,
    Share,
)
from foretune.settings.spend import parse_spend

Dtype = Literal["float32", "float64", "bfloat16", "float16"]
Quantization = Literal["none", "8bit", "4bit"]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup"]
Init = Literal["default", "gaussian", "pissa", "olora", "orthogonal"]
LabelKind = Literal["classification", "regression", "multi-label"]
LanguageKind = Literal["causal-lm", "seq2seq"]
TaskKind = Literal["classification", "regression", "multi-label", "causal-lm", "seq2seq"]
LossOn = Literal["all", "completion", "assistant"]
MethodName = Literal[
    "lora",
    "dora",
    "ia3",
    "bitfit",
    "ln",
    "vera",
    "adalora",
    "loha",
    "lokr",
    "oft",
    "boft",
    "fourierft",
    "vblora",
    "prompt",
    "prefix",
    "ptuning",
]

LANGUAGE_KINDS: tuple[LanguageKind, ...] = get_args(LanguageKind)

# What makes a run another one, beside model, data, adapter and seed: the fields of a recipe, and how texts are cut.
RUN_SETTINGS = (
    "epochs",
    "learning_rate",
    "train_batch_size",
    "weight_decay",
    "warmup_ratio",
    "scheduler",
    "max_length",
)
FEWEST_ROWS = 32  # of a trial
MOST_RUNS = 256  # that a ranking simulates on one data set: adapters times recipes

Pair = Annotated[int, Range(2, LARGEST)]  # fewer rows tell nothing apart


@dataclass(frozen=True)
class ModelName(Settings):
    """Which model.

    Attributes:
        model: Folder or hub id of the pretrained model.
    """

    model: str


@dataclass(frozen=True, kw_only=True)
class Loading(Settings):
    """Where a model runs and how precise.

    Attributes:
        dtype: Precision of weights and gradients; kernels are float64 always.
        device: auto, cpu, cuda, cuda:1, …; map spreads the layers over all devices that there are.
        quantization: Keep the weights of linear modules in 8 or 4 bits (bitsandbytes), all but those of the head.
        trust_remote_code: Let code from the model's repository run.
    """

    dtype: Dtype = "float32"
    device: str = "auto"
    quantization: Quantization = "none"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class ModelConfig(Loading, ModelName):
    """Which model, where and how precise."""


@dataclass(frozen=True)
class DatasetName(Settings):
    """Which data set.

    Attributes:
        dataset: Folder or file (csv, tsv, jsonl, json, parquet, save_to_disk), or hub id.
    """

    dataset: str


@dataclass(frozen=True, kw_only=True)
class Columns(Settings):
    """What of a data set.

    Attributes:
        config_name: Configuration of a hub data set, such as sst2 of glue.
        text_column: Text column, or two for pairs of texts, or a prompt and its completion; found by the usual names
            if not given.
        label_column: Label column; found by the usual names if not given. Several for several numbers, or for several
            labels that are each 0 or 1.
        task: What is learnt: classification (a class for each text), regression (numbers), multi-label (any of several
            labels), causal-lm (the next token) or seq2seq (the completion of a prompt, by an encoder-decoder). By
            default numbers with a fraction are regression, lists of labels multi-label; conversations, prompts with
            completions, and texts without labels are causal-lm, or seq2seq if the model is an encoder-decoder.
        loss_on: Tokens of a language model's rows that carry loss: all, completion (after the prompt) or assistant
            (what it says). By default the completion where a row has a prompt, else all.
        train_split: Split that trains, and that the samples come from.
        eval_split: Split that the forecast is for; without it validation, dev or test, the first that has
            labels, else a fifth is held out of the training split.
        max_train: Random training rows to keep, the same for every seed; without it all.
        positive_from: Make two classes of numbered ones, such as stars: this number and above is class 1.
    """

    config_name: str | None = None
    text_column: tuple[str, ...] | None = None
    label_column: tuple[str, ...] | None = None
    task: TaskKind | None = None
    loss_on: LossOn | None = None
    train_split: str = "train"
    eval_split: str | None = None
    max_train: Pair | None = None
    positive_from: Number | None = None

    def __post_init__(self) -> None:
        """Check types and ranges; one label column may stand for itself."""
        label: object = self.label_column
        if isinstance(label, str):
            object.__setattr__(self, "label_column", (label,))
        super().__post_init__()


@dataclass(frozen=True)
class DataConfig(Columns, DatasetName):
    """Which data set, and what of it."""


@dataclass(frozen=True)
class Placement(Settings):
    """Which modules may carry an adapter, and how it is scaled and begins, in peft's words.

    Attributes:
        target_modules: Modules that get an adapter, by the end of their names; all-linear for all linear ones. Without
            it peft's default for the architecture, and all linear ones to choose from in a ranking.
        layers: Numbers of the layers that get one, from 0; without it all.
        alpha: Scaling numerator α: the adapter is scaled by α/r, r its rank.
        rslora: Scale by α/√r instead.
        init: Initialisation of A and B.
    """

    target_modules: tuple[str, ...] | None = None
    layers: tuple[Layer, ...] | None = None
    _: KW_ONLY
    alpha: Scale = 8
    rslora: bool = False
    init: Init = "default"


@dataclass(frozen=True)
class AdapterConfig(Placement):
    """Which LoRA adapter, in peft's words.

    Attributes:
        r: Rank.
    """

    r: Rank = 8


@dataclass(frozen=True, kw_only=True)
class Steps(Settings):
    """How the steps of a run train; the defaults are those of the paper's Table 3.

    Attributes:
        train_batch_size: Texts in a step, on each device.
        weight_decay: Weight decay of AdamW.
        warmup_ratio: Share of the steps over which the learning rate rises from 0.
        scheduler: Learning rate schedule after that, in transformers' words.
    """

    train_batch_size: Count = 32
    weight_decay: Decay = 0.0
    warmup_ratio: Share = 0.06
    scheduler: Scheduler = "linear"


@dataclass(frozen=True, kw_only=True)
class Recipe(Steps):
    """How a run trains; the defaults are those of the paper's Table 3.

    Attributes:
        epochs: Passes over the training rows.
        learning_rate: Peak learning rate of AdamW.
    """

    epochs: Count = 10
    learning_rate: Scale = 4e-4


@dataclass(frozen=True, kw_only=True)
class Recipes(Steps):
    """Recipes to choose from: every number of epochs at every learning rate. One number may stand for itself.

    Attributes:
        epochs: Passes over the training rows, several to choose from.
        learning_rate: Peak learning rates of AdamW, several to choose from.
    """

    epochs: tuple[Count, ...] = (Recipe.epochs,)
    learning_rate: tuple[Scale, ...] = (Recipe.learning_rate,)

    def __post_init__(self) -> None:
        """Check types and ranges.

        Raises:
            ConfigError: If there is none, or more recipes than can be simulated.
        """
        for name in ("epochs", "learning_rate"):
            value: object = getattr(self, name)
            if not isinstance(value, bool) and isinstance(value, Real):
                object.__setattr__(self, name, (value,))
        super().__post_init__()
        for name in ("epochs", "learning_rate"):
            if not getattr(self, name):
                raise ConfigError(f"{name} = []: name at least one")
        rates, lengths = len(set(self.learning_rate)), len(set(self.epochs))
        if rates * lengths > MOST_RUNS:
            raise ConfigError(
                f"learning_rate = {rates} rates, times {lengths} numbers of epochs: {rates * lengths:,} recipes, and "
                f"at most {MOST_RUNS} runs are simulated: name fewer"
            )

    def each(self) -> tuple[Recipe, ...]:
        """List the recipes.

        Returns:
            Each once: by epochs, then by learning rate, whatever the order that they were given in.
        """
        steps = {field.name: getattr(self, field.name) for field in fields(Steps)}
        return tuple(
            Recipe(epochs=epochs, learning_rate=rate, **steps)
            for epochs in sorted(set(self.epochs))
            for rate in sorted(set(self.learning_rate))
        )


@dataclass(frozen=True, kw_only=True)
class Batching(Settings):
    """How texts go through the model.

    Attributes:
        max_length: Longest sequence in tokens.
        batch_size: Texts in a batch that does not train, on each device.
        seed: Seed of a new head, of A, of the samples, of the order of the rows and of dropout.
    """

    max_length: Count = 512
    batch_size: Count = 32
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class Sample(Batching):
    """What is known of the data before a run.

    Attributes:
        samples: Random labelled training samples n, at most: all rows that train where these are fewer.
        eval_samples: Random labelled rows to predict, at most, of the evaluation split or, where there is none, of the
            fifth of the rows that is held out.
    """

    samples: Annotated[int, Range(4, LARGEST)] = 512
    eval_samples: Count = 512


@dataclass(frozen=True, kw_only=True)
class Spending(Settings):
    """What may be trained before a run.

    Attributes:
        spend: Share of the cost of one full run, such as 2% or 0.02, that may go into trials: real fine-tunes on few
            rows with the whole schedule. 0 trains nothing.
    """

    spend: str = "0"

    def __post_init__(self) -> None:
        """Check types and ranges; a number may stand for itself.

        Raises:
            ConfigError: If it is no share.
        """
        given: object = self.spend
        if isinstance(given, int | float) and not isinstance(given, bool):
            if not 0 <= given <= 1:
                raise ConfigError(f"spend = {shown(given)}: give a share from 0 to 1, or a text such as 2%")
            object.__setattr__(self, "spend", f"{given:.15g}")
        super().__post_init__()
        parse_spend(self.spend)
