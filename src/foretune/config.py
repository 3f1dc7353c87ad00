"""Settings as frozen dataclasses: one tree for the command line, YAML files and Python.

Imports nothing heavy: the command line builds its help from these.
"""

from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal, get_args

from foretune.errors import ConfigError

HeadPolicy = Literal["random", "average", "probe"]
NtkParams = Literal["adapter", "adapter+head"]
Dtype = Literal["float32", "float64", "bfloat16", "float16"]
Init = Literal["default", "gaussian", "pissa", "olora", "orthogonal"]


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


@dataclass(frozen=True)
class DataConfig:
    """Which data set, and what of it.

    Attributes:
        dataset: Folder or file (csv, tsv, jsonl, json, parquet, save_to_disk), or hub id.
        config_name: Configuration of a hub data set, such as sst2 of glue.
        text_column: Text column, or two for pairs of texts; found by the usual names if not given.
        label_column: Label column; found by the usual names if not given.
        train_split: Split that the samples come from.
        eval_split: Split that the forecast is for; without it validation, dev or test, else rows are held
            out of the training split.
    """

    dataset: str
    config_name: str | None = None
    text_column: tuple[str, ...] | None = None
    label_column: str | None = None
    train_split: str = "train"
    eval_split: str | None = None


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
    layers: tuple[int, ...] | None = None
    r: int = 8
    alpha: float = 8
    rslora: bool = False
    init: Init = "default"


@dataclass(frozen=True)
class ScoreSettings:
    """How a configuration is scored.

    Attributes:
        samples: Random training samples n of the kernel.
        eval_samples: Random rows of the evaluation split to predict; 0 for no forecast of evaluation.
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

    samples: int = 32
    eval_samples: int = 128
    repeats: int = 1
    draws: int = 5
    reduction: str | None = None
    head: HeadPolicy = "random"
    heads: int = 4
    ntk_params: NtkParams = "adapter"
    sigma: float = 1e-4
    ridge: float | None = None
    max_length: int = 512
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: Naming the setting, its value and what it may be.
        """
        at_least = {"samples": 2, "eval_samples": 0}
        for name in ("samples", "eval_samples", "repeats", "draws", "heads", "max_length", "batch_size"):
            least = at_least.get(name, 1)
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be at least {least}")
        for name in ("sigma", "ridge"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and isfinite(value)):
                raise ConfigError(f"{name} = {value}: must be positive and finite")
        if self.head not in get_args(HeadPolicy):
            raise ConfigError(f"head = {self.head!r}: use one of {', '.join(get_args(HeadPolicy))}")
        if self.ntk_params not in get_args(NtkParams):
            raise ConfigError(f"ntk_params = {self.ntk_params!r}: use 'adapter' or 'adapter+head'")


@dataclass(frozen=True)
class ScoreConfig:
    """One run of `foretune score`.

    Attributes:
        model: Model.
        data: Data set.
        adapter: Adapter.
        settings: How it is scored.
    """

    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    settings: ScoreSettings = field(default_factory=ScoreSettings)

    def to_dict(self) -> dict[str, Any]:
        """Flatten to the flags' names, as in `config.yaml`.

        Returns:
            Settings by name; lists for tuples.
        """
        groups = (self.model, self.data, self.adapter, self.settings)
        flat = {name: value for group in groups for name, value in vars(group).items()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}
