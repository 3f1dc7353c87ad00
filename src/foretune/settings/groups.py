"""Settings as frozen dataclasses: one tree for the command line, YAML files and Python.

Imports nothing heavy: the command line builds its help from these.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from foretune.errors import ConfigError
from foretune.settings.ranges import (
    LARGEST,
    Count,
    CountOrNone,
    Decay,
    Few,
    Layer,
    Number,
    Range,
    Rank,
    Regularisation,
    Scale,
    Seed,
    Share,
    check,
)

HeadPolicy = Literal["random", "average", "probe"]
NtkParams = Literal["adapter", "adapter+head"]
Dtype = Literal["float32", "float64", "bfloat16", "float16"]
EngineName = Literal["local", "ray"]
Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup"]
Init = Literal["default", "gaussian", "pissa", "olora", "orthogonal"]
TaskKind = Literal["classification", "regression", "multi-label"]

Pair = Annotated[int, Range(2, LARGEST)]  # fewer rows tell nothing apart

ADAPTER_FILE = "adapter_config.json"  # peft's name


@dataclass(frozen=True)
class ModelConfig:
    """Which model, where and how precise.

    Attributes:
        model: Folder or hub id of the pretrained model.
        dtype: Precision of weights and gradients; kernels are float64 always.
        device: auto, cpu, cuda, cuda:1, …
        trust_remote_code: Let code from the model's repository run.
    """

    model: str
    dtype: Dtype = "float32"
    device: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check(self)


@dataclass(frozen=True)
class DataConfig:
    """Which data set, and what of it.

    Attributes:
        dataset: Folder or file (csv, tsv, jsonl, json, parquet, save_to_disk), or hub id.
        config_name: Configuration of a hub data set, such as sst2 of glue.
        text_column: Text column, or two for pairs of texts; found by the usual names if not given.
        label_column: Label column; found by the usual names if not given. Several for several numbers, or for several
            labels that are each 0 or 1.
        task: What the labels are: classification (a class for each text), regression (numbers) or multi-label (any
            of several labels). By default numbers with a fraction are regression, and lists of labels multi-label.
        train_split: Split that the samples come from.
        eval_split: Split that the forecast is for; without it validation, dev or test, the first that has
            labels, else a fifth is held out of the training split.
        max_train: Random training rows to keep, the same for every seed; without it all.
        positive_from: Make two classes of numbered ones, such as stars: this number and above is class 1.
    """

    dataset: str
    config_name: str | None = None
    text_column: tuple[str, ...] | None = None
    label_column: tuple[str, ...] | None = None
    task: TaskKind | None = None
    train_split: str = "train"
    eval_split: str | None = None
    max_train: Pair | None = None
    positive_from: Number | None = None

    def __post_init__(self) -> None:
        """Check types and ranges; one label column may stand for itself."""
        label: object = self.label_column
        if isinstance(label, str):
            object.__setattr__(self, "label_column", (label,))
        check(self)


@dataclass(frozen=True)
class AdapterConfig:
    """Which LoRA adapter, in peft's words.

    Attributes:
        target_modules: Modules that get an adapter, by the end of their names; all-linear for all linear
            ones. Without it peft's default for the architecture.
        layers: Numbers of the layers that get one, from 0; without it all.
        r: Rank.
        alpha: Scaling numerator α: the adapter is scaled by α/r.
        rslora: Scale by α/√r instead.
        init: Initialisation of A and B.
    """

    target_modules: tuple[str, ...] | None = None
    layers: tuple[Layer, ...] | None = None
    r: Rank = 8
    alpha: Scale = 8
    rslora: bool = False
    init: Init = "default"

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check(self)


@dataclass(frozen=True)
class ScoreSettings:
    """How a configuration is scored.

    Attributes:
        samples: Random training samples n of the kernel.
        eval_samples: Random rows to predict, at most, of the evaluation split or, where there is none, of the fifth of
            the rows that is held out; 0 for no forecast of evaluation.
        repeats: Redraws of the n samples.
        draws: Draws of the random A, all from the same pass.
        reduction: Output reduction: margin, trace, full or class:k; by default margin for two classes, else trace.
        head: `random` (as initialised or loaded), `average` (over `heads` random heads) or `probe`.
        heads: Random heads of `average`; each costs a pass.
        ntk_params: `adapter`, or `adapter+head` to add the trained head's kernel.
        sigma: Regularisation σ of the condition number and the bounds.
        ridge: Ridge δ of the kernel regression; by default chosen by leave-one-out.
        max_length: Longest sequence in tokens.
        batch_size: Texts in a batch.
        seed: Seed of A, samples and further heads.
    """

    samples: Pair = 32
    eval_samples: CountOrNone = 128
    repeats: Few = 1
    draws: Few = 5
    reduction: str | None = None
    head: HeadPolicy = "random"
    heads: Few = 4
    ntk_params: NtkParams = "adapter"
    sigma: Regularisation = 1e-4
    ridge: Regularisation | None = None
    max_length: Count = 512
    batch_size: Count = 32
    seed: Seed = 0

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check(self)


@dataclass(frozen=True)
class TuneSettings:
    """How a configuration is fine-tuned; the defaults are those of the paper's Table 3.

    Attributes:
        epochs: Passes over the training rows.
        learning_rate: Peak learning rate of AdamW.
        train_batch_size: Texts in a step, on each device.
        weight_decay: Weight decay of AdamW.
        warmup_ratio: Share of the steps over which the learning rate rises from 0.
        scheduler: Learning rate schedule after that, in transformers' words.
        max_length: Longest sequence in tokens.
        batch_size: Texts in a batch of evaluation, on each device.
        eval_samples: Random rows to evaluate on, at most, as `score` draws them, of the evaluation split or, where
            there is none, of the fifth of the rows that is held out; without it all. It never changes what trains.
        train_eval_samples: Random training rows on which the training loss is taken again in eval mode after
            each epoch; 0 for none.
        bf16: Mixed precision in bfloat16, where the device has it.
        seed: Seed of a new head, of A, of the order of the rows and of dropout.
        report_to: Trackers that the Trainer reports to, such as tensorboard.
    """

    epochs: Count = 10
    learning_rate: Scale = 4e-4
    train_batch_size: Count = 32
    weight_decay: Decay = 0.0
    warmup_ratio: Share = 0.06
    scheduler: Scheduler = "linear"
    max_length: Count = 512
    batch_size: Count = 32
    eval_samples: Count | None = None
    train_eval_samples: CountOrNone = 2000
    bf16: bool = False
    seed: Seed = 0
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check(self)


@dataclass(frozen=True)
class ScoreConfig:
    """One run of `foretune score`.

    Attributes:
        model: Model.
        data: Data set.
        adapter: Adapter.
        settings: How it is scored.
        adapter_config: peft's `adapter_config.json`, or the folder that holds it, instead of `adapter`.
    """

    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    settings: ScoreSettings = field(default_factory=ScoreSettings)
    adapter_config: Path | None = None

    def __post_init__(self) -> None:
        """Check that there is one adapter."""
        one_adapter(None if self.adapter == AdapterConfig() else self.adapter, self.adapter_config)

    def to_dict(self) -> dict[str, Any]:
        """Flatten to the flags' names, as in `config.yaml`.

        Returns:
            Settings by name; lists for tuples. `adapter_config` names the copy that lies beside `config.yaml`.
        """
        return _flags(self.model, self.data, self.adapter, self.settings, self.adapter_config)


@dataclass(frozen=True)
class TuneConfig:
    """One run of `foretune tune`.

    Attributes:
        model: Model.
        data: Data set.
        adapter: Adapter.
        settings: How it is fine-tuned.
        adapter_config: peft's `adapter_config.json`, or the folder that holds it, instead of `adapter`.
    """

    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    settings: TuneSettings = field(default_factory=TuneSettings)
    adapter_config: Path | None = None

    def __post_init__(self) -> None:
        """Check that there is one adapter."""
        one_adapter(None if self.adapter == AdapterConfig() else self.adapter, self.adapter_config)

    def to_dict(self) -> dict[str, Any]:
        """Flatten to the flags' names, as in `config.yaml`.

        Returns:
            Settings by name; lists for tuples. `adapter_config` names the copy that lies beside `config.yaml`.
        """
        return _flags(self.model, self.data, self.adapter, self.settings, self.adapter_config)


@dataclass(frozen=True)
class PaperSettings:
    """On what, and how large, the paper's experiment is run; without a value as in the paper.

    Attributes:
        model: Folder or hub id of another model than roberta-base.
        data_dir: Folder with the data sets in folders cola, sst2, yelp and imdb, instead of the hub.
        max_train: Random training texts of each data set.
        epochs: Epochs.
        max_length: Longest sequence in tokens.
        learning_rate: Learning rate for all data sets.
        seeds: Seeds; tables show mean and standard deviation.
        device: auto, cpu or cuda.
    """

    model: str | None = None
    data_dir: Path | None = None
    max_train: Pair | None = None
    epochs: Count | None = None
    max_length: Count | None = None
    learning_rate: Scale | None = None
    seeds: tuple[Seed, ...] = (0,)
    device: str = "auto"

    def __post_init__(self) -> None:
        """Check types and ranges, and that each seed is there once.

        Raises:
            ConfigError: If there are none, or one is named twice.
        """
        check(self)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds = {self.seeds}: name at least one, each once")


def flat(*groups: ModelConfig | DataConfig | AdapterConfig | ScoreSettings | TuneSettings) -> dict[str, Any]:
    """Join groups of settings under the flags' names.

    Args:
        *groups: Settings.

    Returns:
        Settings by name; lists for tuples.
    """
    joined = {name: value for group in groups for name, value in vars(group).items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in joined.items()}


def _flags(
    model: ModelConfig,
    data: DataConfig,
    adapter: AdapterConfig,
    settings: ScoreSettings | TuneSettings,
    adapter_config: Path | None,
) -> dict[str, Any]:
    if adapter_config is None:
        return flat(model, data, adapter, settings)
    return {**flat(model, data, settings), "adapter_config": ADAPTER_FILE}


def one_adapter(adapter: AdapterConfig | None, adapter_config: Path | None) -> AdapterConfig:
    """Refuse an adapter that is described twice.

    Args:
        adapter: Settings, None if none were given.
        adapter_config: File that describes the adapter, None if none was given.

    Returns:
        The settings; their defaults if none were given.

    Raises:
        ConfigError: If both were given, naming both.
    """
    if adapter is None or adapter_config is None:
        return adapter or AdapterConfig()
    names = [setting.name for setting in fields(AdapterConfig)]
    given = [name for name in names if getattr(adapter, name) != getattr(AdapterConfig(), name)]
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in given or names)
    raise ConfigError(
        f"--adapter-config {str(adapter_config)!r} and {'' if given else 'one of '}{flags} both describe the adapter: "
        "give one, or change the file"
    )
