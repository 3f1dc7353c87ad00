"""Settings of `foretune rank`. Imports nothing heavy: the command line builds its help from these."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from foretune.errors import ConfigError, shown
from foretune.settings.groups import Dtype, Pair
from foretune.settings.ranges import LARGEST, Count, Few, Layer, Number, Range, Rank, Regularisation, Scale, Seed, check
from foretune.settings.run import Training


@dataclass(frozen=True)
class RankModels:
    """Which models, where and how precise.

    Attributes:
        model: Folders or hub ids of the pretrained models.
        dtype: Precision of weights and gradients.
        device: auto, cpu, cuda, cuda:1, …
        trust_remote_code: Let code from a model's repository run.
    """

    model: tuple[str, ...]
    dtype: Dtype = "float32"
    device: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check(self)


@dataclass(frozen=True)
class RankData:
    """Which data sets, and what of them.

    Attributes:
        dataset: Folders or files (csv, tsv, jsonl, json, parquet, save_to_disk), or hub ids.
        config_name: Configuration of a hub data set, such as sst2 of glue.
        text_column: Text column, or two for pairs of texts; found by the usual names if not given.
        label_column: Label column; found by the usual names if not given.
        train_split: Split that trains.
        eval_split: Split that the forecast is for; without it validation, dev or test, else a fifth is held out.
        max_train: Random training rows to keep; without it all.
        positive_from: Make two classes of numbered ones: this number and above is class 1.
    """

    dataset: tuple[str, ...]
    config_name: str | None = None
    text_column: tuple[str, ...] | None = None
    label_column: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    max_train: Pair | None = None
    positive_from: Number | None = None

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check(self)


@dataclass(frozen=True)
class Candidates:
    """Which adapters to choose from.

    Attributes:
        target_modules: Module kinds that may carry one, by the end of their names; without it all linear ones.
        exclude_modules: Module kinds that may not, by the end of their names. What no output depends on, and what is
            too narrow for the ranks (an expert's gate), is left out by itself.
        layers: Numbers of the layers that may, from 0; without it all.
        ranks: Ranks.
        budget: Trainable parameters of the adapter (500k, 1.2M) or size of its file (2MB), at most; with it sets of
            single modules are searched too.
        finalists: Candidates whose run is simulated: a third the best of the quick score at every size, a third whole
            module kinds, the others the best of all.
        alpha: Scaling numerator α, the same at every rank.
        rslora: Scale by α/√r instead of α/r.
        init: Initialisation of A: default or gaussian.
    """

    target_modules: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] | None = None
    layers: tuple[Layer, ...] | None = None
    ranks: tuple[Rank, ...] = (8,)
    budget: str | None = None
    finalists: Few = 16
    alpha: Scale = 8
    rslora: bool = False
    init: Literal["default", "gaussian"] = "default"

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: Naming the setting, its value and what it may be.
        """
        if self.init not in ("default", "gaussian"):
            raise ConfigError(f"init = {shown(self.init)}: ranks are priced from one pass with default or gaussian")
        check(self)
        if not self.ranks:
            raise ConfigError("ranks = []: name at least one, each at least 1")


@dataclass(frozen=True)
class RankSample:
    """What is known of the data.

    Attributes:
        samples: Random labelled training samples n, at most: all rows that train where these are fewer.
        eval_samples: Random labelled rows to predict, at most, of the evaluation split or of the rows held out.
        draws: Draws of the random A in the quick score and κ, all from the same pass.
        sigma: Regularisation σ of κ.
        max_length: Longest sequence in tokens.
        batch_size: Texts in a batch of the pass.
        seed: Seed of A, samples and head.
    """

    samples: Annotated[int, Range(4, LARGEST)] = 512
    eval_samples: Count = 512
    draws: Few = 5
    sigma: Regularisation = 1e-4
    max_length: Count = 512
    batch_size: Count = 32
    seed: Seed = 0

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check(self)


@dataclass(frozen=True)
class RankSettings:
    """How the adapters of one model on one data set are ranked.

    Attributes:
        candidates: Adapters to choose from.
        sample: What is known of the data.
        training: The run that is forecast.
    """

    candidates: Candidates = field(default_factory=Candidates)
    sample: RankSample = field(default_factory=RankSample)
    training: Training = field(default_factory=Training)


@dataclass(frozen=True)
class RankConfig:
    """One run of `foretune rank`.

    Attributes:
        models: Models.
        data: Data sets.
        candidates: Adapters to choose from.
        sample: What is known of the data.
        training: The run that is forecast.
    """

    models: RankModels
    data: RankData
    candidates: Candidates
    sample: RankSample
    training: Training

    @property
    def settings(self) -> RankSettings:
        """What holds for each model and data set."""
        return RankSettings(self.candidates, self.sample, self.training)
