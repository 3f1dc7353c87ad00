"""What each command takes: groups of settings put together, flat for Python, YAML and the command line alike.

A class that inherits a group has the group's fields; it declares only what nobody else takes, or takes otherwise.
Imports nothing heavy: the command line builds its help from these.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from foretune.errors import ConfigError, shown
from foretune.settings.groups import (
    AdapterConfig,
    Batching,
    DataConfig,
    MethodName,
    ModelConfig,
    Pair,
    Placement,
    Recipe,
    Recipes,
    Sample,
    Spending,
)
from foretune.settings.ranges import Count, CountOrNone, Few, Range, Rank, Regularisation, Scale, Seed, Settings
from foretune.settings.sizes import parse_bytes
from foretune.settings.spend import parse_spend

HeadPolicy = Literal["random", "average", "probe"]
NtkParams = Literal["adapter", "adapter+head"]
EngineName = Literal["local", "ray"]
_WORKERS = Range(1, 1024)

ADAPTER_FILE = "adapter_config.json"  # peft's name
CHOSEN = "chosen.yaml"  # the configuration of a ranking's chosen row, for foretune tune and forecast
METHOD_ROWS = 3  # placements of a method beside LoRA in a ranking
OF_SEQUENCES = "2GB"  # the memory of a language model's pass, by default
MOST_ROWS = 12  # numbers of rows in one forecast, each with a simulated run of its own


@dataclass(frozen=True, kw_only=True)
class KernelSample(Sample):
    """What is known of the data, and how κ is taken from it.

    Attributes:
        draws: Draws of the random A, all from the same pass.
        sigma: Regularisation σ of the condition number and the bounds.
    """

    draws: Few = 5
    sigma: Regularisation = 1e-4


@dataclass(frozen=True, kw_only=True)
class Budget(Settings):
    """What a pass over the samples may keep.

    Attributes:
        memory: Memory that what the pass keeps may take, such as 4GB; by default half of what is free. What does not
            fit goes through files or is computed again: the numbers are the same. Of a language model it counts in a
            forecast or ranking, by default 2GB: what gradients are kept in depends on it.
    """

    memory: str | None = None

    def __post_init__(self) -> None:
        """Check types and ranges.

        Raises:
            ConfigError: If it is no amount of memory.
        """
        super().__post_init__()
        if self.memory is not None:
            parse_bytes("memory", self.memory)

    @property
    def of_sequences(self) -> int:
        """Bytes that the gradients of a language model's sequences may take."""
        return parse_bytes("memory", self.memory or OF_SEQUENCES)


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(Budget, KernelSample):
    """How a configuration is scored.

    Attributes:
        samples: Random training samples n of the kernel.
        eval_samples: Random rows to predict, at most, of the evaluation split or, where there is none, of the fifth of
            the rows that is held out; 0 for no prediction.
        repeats: Redraws of the n samples.
        reduction: Output reduction: margin, trace, full or class:k; by default margin for two classes, else trace. Of
            numbers and several labels: trace (the default), full or output:k. Of a causal language model the kernel of
            its sequences: loss (gradients of the loss per token, the default), loss-sum (of its sum) or fisher (of
            labels that the model draws).
        head: `random` (as initialised or loaded), `average` (over `heads` random heads) or `probe`.
        heads: Random heads of `average`; each costs a pass.
        ntk_params: `adapter`, or `adapter+head` to add the trained head's kernel.
        ridge: Ridge δ of the kernel regression; by default chosen by leave-one-out.
        scratch: Folder for these files, from which a killed score goes on; none computes again what does not fit. By
            default a hidden folder beside the output, or one among the system's temporary files.
        sketch: Numbers that the gradients of one text are projected onto at random, an even number; by default they are
            taken as they are. The error that it makes is estimated.
    """

    samples: Pair = 32
    eval_samples: CountOrNone = 128
    repeats: Few = 1
    reduction: str | None = None
    head: HeadPolicy = "random"
    heads: Few = 4
    ntk_params: NtkParams = "adapter"
    ridge: Regularisation | None = None
    scratch: str | None = None
    sketch: Pair | None = None


@dataclass(frozen=True, kw_only=True)
class TuneSettings(Batching, Recipe):
    """How a configuration is fine-tuned.

    Attributes:
        eval_samples: Random rows to evaluate on, at most, as `score` draws them, of the evaluation split or, where
            there is none, of the fifth of the rows that is held out; without it all. It never changes what trains.
        train_eval_samples: Random training rows on which the training loss is taken again in eval mode after
            each epoch; 0 for none.
        bf16: Mixed precision in bfloat16, where the device has it.
        report_to: Trackers that the Trainer reports to, such as tensorboard.
    """

    eval_samples: Count | None = None
    train_eval_samples: CountOrNone = 2000
    bf16: bool = False
    report_to: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ForecastSettings(Spending, Budget, Sample, Recipe):
    """Which run is forecast, from what is known, and what may be spent on it.

    Attributes:
        rows: Numbers of training rows, rising, for which the run is forecast as well: the same recipe on fewer or more
            rows than there are.
    """

    rows: tuple[Pair, ...] | None = None

    def __post_init__(self) -> None:
        """Check types and ranges, and that the numbers of rows rise.

        Raises:
            ConfigError: If there are none or too many of them, or they do not rise.
        """
        super().__post_init__()
        if self.rows is None:
            return
        if not 1 <= len(self.rows) <= MOST_ROWS:
            raise ConfigError(f"rows = {shown(list(self.rows))}: name 1 to {MOST_ROWS} numbers")
        if list(self.rows) != sorted(set(self.rows)):
            raise ConfigError(f"rows = {shown(list(self.rows))}: must rise, each number once")


@dataclass(frozen=True, kw_only=True)
class Search(Placement):
    """Which adapters to choose from.

    Attributes:
        exclude_modules: Module kinds that may carry none, by the end of their names. What no output depends on, and
            what is too narrow for the ranks (an expert's gate), is left out by itself.
        ranks: Ranks.
        budget: Trainable parameters of the adapter (500k, 1.2M) or size of its file (2MB), at most; with it sets of
            single modules of a classifier are searched too.
        methods: Adapter methods. Of those beside LoRA a few usual placements are priced each, by the quick score; dora,
            ia3, bitfit, ln, vera and adalora are simulated as well, others need trials (--spend). Of a language model
            lora must be among them, and all others need trials.
        equal_size: Trainable parameters (500k, 1.2M) that every placement is brought to by its rank, within 15 %,
            instead of ranks and a budget; what no rank from 1 to 64 brings there is left out.
        finalists: Candidates whose run is simulated, with every recipe: a third the best of the quick score at every
            size, a third whole module kinds, the others the best of all. Of a language model two thirds whole kinds.
    """

    exclude_modules: tuple[str, ...] | None = None
    ranks: tuple[Rank, ...] = (8,)
    budget: str | None = None
    equal_size: str | None = None
    finalists: Few = 16
    methods: tuple[MethodName, ...] = ("lora",)

    def __post_init__(self) -> None:
        """Check types and ranges, and that sizes are asked for in one way.

        Raises:
            ConfigError: Naming the setting, its value and what it may be.
        """
        super().__post_init__()
        if self.init not in ("default", "gaussian"):
            raise ConfigError(f"init = {shown(self.init)}: ranks are priced from one pass with default or gaussian")
        if not self.ranks:
            raise ConfigError("ranks = []: name at least one, each at least 1")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ConfigError(f"methods = {shown(list(self.methods))}: name at least one, each once")
        if self.equal_size is not None and self.methods != Search.methods:
            raise ConfigError(
                f"equal_size = {shown(self.equal_size)} and methods = {shown(list(self.methods))}: LoRA's rank makes "
                "sizes equal, leave one of them out"
            )
        if self.equal_size is None:
            return
        if self.ranks != Search.ranks:
            raise ConfigError(
                f"equal_size = {shown(self.equal_size)} and ranks = {shown(list(self.ranks))}: the size gives every "
                "placement its rank, leave one of them out"
            )
        if self.budget is not None:
            raise ConfigError(
                f"equal_size = {shown(self.equal_size)} and budget = {shown(self.budget)} both say how large an "
                "adapter is: leave one of them out"
            )


def check_engine(engine: EngineName, workers: int) -> None:
    """Refuse a number of processes that cannot be, or that is not ours to choose.

    Args:
        engine: Who does the work.
        workers: Processes on this machine.

    Raises:
        ConfigError: Naming it.
    """
    _WORKERS.check("workers", workers)
    if engine == "ray" and workers > 1:
        raise ConfigError(f"workers = {workers}: with --engine ray the cluster decides")


@dataclass(frozen=True, kw_only=True)
class Trials(Spending):
    """What may be trained before a run, and where.

    Attributes:
        workers: Processes of this machine in which trials are made side by side; they share its cores, and each holds
            a model of its own.
        engine: `local`, or `ray` to make the trials on a Ray cluster.
    """

    workers: Annotated[int, _WORKERS] = 1
    engine: EngineName = "local"

    def __post_init__(self) -> None:
        """Check types and ranges, and that there is something to do side by side.

        Raises:
            ConfigError: If there are no trials, or the cluster decides how many run at once.
        """
        super().__post_init__()
        check_engine(self.engine, self.workers)
        if (self.engine, self.workers) != ("local", 1) and not parse_spend(self.spend):
            given = f"workers = {self.workers}" if self.engine == "local" else "engine = 'ray'"
            raise ConfigError(f"{given}: only trials are made side by side, and spend = {shown(self.spend)} buys none")


@dataclass(frozen=True, kw_only=True)
class RankSettings(Trials, Budget, Search, KernelSample, Recipes):
    """Which adapters and recipes are ranked, from what is known, and what may be spent on it."""


@dataclass(frozen=True)
class PaperSettings(Settings):
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
        super().__post_init__()
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds = {self.seeds}: name at least one, each once")


S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Configuration(Generic[S]):
    """One run of a command on one configuration.

    Attributes:
        model: Model.
        data: Data set.
        adapter: Adapter, or peft's `adapter_config.json` or the folder that holds it.
        settings: What the command does with them.
    """

    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig | Path
    settings: S

    def to_dict(self) -> dict[str, Any]:
        """Flatten to the flags' names, as in `config.yaml`.

        Returns:
            Settings by name; lists for tuples. `adapter_config` names the copy that lies beside `config.yaml`.
        """
        if isinstance(self.adapter, Path):
            return {**flags(self.model, self.data, self.settings), "adapter_config": ADAPTER_FILE}
        return flags(self.model, self.data, self.adapter, self.settings)


def flags(*groups: Settings) -> dict[str, Any]:
    """Join groups of settings under the flags' names.

    Args:
        *groups: Settings.

    Returns:
        Settings by name; lists for tuples.
    """
    joined = {name: value for group in groups for name, value in vars(group).items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in joined.items()}


def fields_of(settings: Settings, group: type[Settings]) -> dict[str, Any]:
    """Take the fields of a group out of settings that it is a part of.

    Args:
        settings: Settings.
        group: One of the classes that theirs inherits.

    Returns:
        Values by name.
    """
    return {field.name: getattr(settings, field.name) for field in fields(group)}


def one_adapter(adapter: AdapterConfig | None, adapter_config: Path | None) -> AdapterConfig | Path:
    """Refuse an adapter that is described twice.

    Args:
        adapter: Settings, None if none were given.
        adapter_config: File that describes the adapter, None if none was given.

    Returns:
        What was given; the defaults if nothing was.

    Raises:
        ConfigError: If both were given, naming both.
    """
    if adapter is None or adapter_config is None:
        return adapter_config or adapter or AdapterConfig()
    names = [setting.name for setting in fields(AdapterConfig)]
    given = [name for name in names if getattr(adapter, name) != getattr(AdapterConfig(), name)]
    described = ", ".join(f"--{name.replace('_', '-')}" for name in given or names)
    raise ConfigError(
        f"--adapter-config {str(adapter_config)!r} and {'' if given else 'one of '}{described} both describe the "
        "adapter: give one, or change the file"
    )
