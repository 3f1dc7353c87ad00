"""What commands do alike: load a configuration, tell its kind, keep a folder free, say where a run lies."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretune.errors import ConfigError, DataError, ForetuneError, shown
from foretune.settings.commands import Configuration
from foretune.settings.groups import LANGUAGE_KINDS, DataConfig, ModelConfig

if TYPE_CHECKING:
    from peft import PeftConfig
    from rich.console import Console

    from foretune.language.rows import LanguageTask
    from foretune.models.classifier import Classifier
    from foretune.models.language_model import LanguageModel
    from foretune.processes.group import Processes
    from foretune.readers.folder import Splits
    from foretune.tasks.load import Task


@dataclass(frozen=True)
class Loaded:
    """A configuration with its model and its data.

    Attributes:
        task: Data.
        classifier: Model and tokenizer.
        lora: peft's configuration of the adapter.
        words: The adapter in words.
    """

    task: "Task"
    classifier: "Classifier"
    lora: "PeftConfig"
    words: str


@dataclass(frozen=True)
class LoadedLanguage:
    """A configuration of a language model with its model and its data.

    Attributes:
        task: Data.
        language: Model and tokenizer.
        lora: peft's configuration of the adapter.
        words: The adapter in words.
    """

    task: "LanguageTask"
    language: "LanguageModel"
    lora: "PeftConfig"
    words: str


def open_data(config: DataConfig) -> "Splits":
    """Find the splits of a data set, each of which is read once.

    Args:
        config: Which data set.

    Returns:
        A reader for each split.
    """
    from foretune.tasks.sources import open_source

    return {name: cache(read) for name, read in open_source(config).items()}


def is_language(model: ModelConfig, data: DataConfig, splits: "Splits") -> bool:
    """Tell the configurations of language models from those of classifiers.

    Args:
        model: Which model.
        data: Which data set; its task says it, or else its columns, and for plain texts the model.
        splits: Splits of the data set.

    Returns:
        Whether it is one of a language model.
    """
    from foretune.language.load import holds_language
    from foretune.models.language_model import is_language_model

    return holds_language(
        splits, data, is_causal=lambda: is_language_model(model.model, trust_remote_code=model.trust_remote_code)
    )


@contextmanager
def classifiers_only(refusal: str, model: ModelConfig, data: DataConfig) -> Iterator[None]:
    """Refuse language models, where that is why the data cannot be read.

    Args:
        refusal: What to say.
        model: Which model.
        data: Which data set.

    Yields:
        Nothing.

    Raises:
        ConfigError: If the configuration is one of a language model.
        DataError: As it came, if it is not.
    """
    if data.task in LANGUAGE_KINDS:
        raise ConfigError(refusal)
    try:
        yield
    except DataError as error:
        if _may_be_language(model, data):
            raise ConfigError(refusal) from error
        raise


def _may_be_language(model: ModelConfig, data: DataConfig) -> bool:
    try:
        return is_language(model, data, open_data(data))
    except ForetuneError:  # what was raised before is the one to tell
        return False


def read_adapter(config: Configuration[Any], *, language: bool = False) -> "PeftConfig | None":
    """Read the adapter where a file describes it.

    Args:
        config: Configuration.
        language: Whether it is for a language model.

    Returns:
        peft's configuration; None where settings describe the adapter.
    """
    from foretune.models.adapter_file import adapter_from_file
    from foretune.models.language_model import language_kind
    from foretune.models.output_layer import CLASSIFIER, TASK_TYPES

    if not isinstance(config.adapter, Path):
        return None
    if not language:
        return adapter_from_file(config.adapter, task_type=CLASSIFIER)
    kind = language_kind(config.model.model, trust_remote_code=config.model.trust_remote_code)
    return adapter_from_file(config.adapter, task_type=TASK_TYPES[kind])


def load(
    config: Configuration[Any], given: "PeftConfig | None", *, seed: int, splits: "Splits | None" = None
) -> Loaded:
    """Load the data and the model of a configuration.

    Args:
        config: Configuration.
        given: The adapter, from `read_adapter`.
        seed: Seed of a new head.
        splits: Splits of the data set, from `open_data`; None to find them.

    Returns:
        Both, with the adapter for the model.
    """
    from foretune.models.adapter_file import adapter_in_words, placement_in_words
    from foretune.models.classifier import load_model
    from foretune.models.placement import lora_config
    from foretune.tasks.load import task_of

    task = task_of(open_data(config.data) if splits is None else splits, config.data)
    classifier = load_model(config.model, task.objective, seed)
    if isinstance(config.adapter, Path):
        assert given is not None  # read before anything else
        return Loaded(task, classifier, given, adapter_in_words(given))
    return Loaded(task, classifier, lora_config(classifier.model, config.adapter), placement_in_words(config.adapter))


def load_language(config: Configuration[Any], given: "PeftConfig | None", splits: "Splits") -> LoadedLanguage:
    """Load the data and the model of a configuration of a language model.

    Args:
        config: Configuration.
        given: The adapter, from `read_adapter`.
        splits: Splits of the data set.

    Returns:
        Both, with the adapter for the model.
    """
    from foretune.models.adapter_file import adapter_in_words, placement_in_words
    from foretune.models.placement import for_language, lora_config

    language, task = load_language_alone(config.model, config.data, splits)
    if isinstance(config.adapter, Path):
        assert given is not None  # read before anything else
        return LoadedLanguage(task, language, given, adapter_in_words(given))
    adapter = for_language(config.adapter)
    return LoadedLanguage(task, language, lora_config(language.model, adapter), placement_in_words(adapter))


def load_language_alone(model: ModelConfig, data: DataConfig, splits: "Splits") -> "tuple[LanguageModel, LanguageTask]":
    """Load a language model and its data, without an adapter.

    Args:
        model: Which model.
        data: Which data set.
        splits: Splits of the data set.

    Returns:
        Both.
    """
    from foretune.language.load import language_task_of
    from foretune.models.language_model import load_language_model

    task = language_task_of(splits, data)
    language = load_language_model(
        model.model,
        dtype=model.dtype,
        device=model.device,
        quantization=model.quantization,
        trust_remote_code=model.trust_remote_code,
    )
    return language, task


@contextmanager
def in_processes(command: str, settings: Mapping[str, Any], output: Path | None) -> Iterator["Processes"]:
    """Do a command in all processes that a launcher started for it; the first one keeps its folder.

    Args:
        command: Name of the command.
        settings: Its settings by the flags' names.
        output: Folder; None for a run that is not saved.

    Yields:
        This process among them.
    """
    from foretune.processes.group import together
    from foretune.report.provenance import versions

    def statement() -> dict[str, object]:
        of_packages = {f"{name}'s version": version for name, version in versions().items() if name != "python"}
        return {"command": command, **of_packages, **settings, "output": None if output is None else str(output)}

    with together(statement) as processes, free_folder(output if processes.is_main else None):
        processes.agree()
        yield processes


def one_process(processes: "Processes", spend: str) -> None:
    """Refuse trials in several processes, which share passes and not trainings.

    Args:
        processes: This process among those that share the work.
        spend: What may be spent on trials.

    Raises:
        ConfigError: If there are any.
    """
    from foretune.settings.spend import parse_spend

    if processes.world > 1 and parse_spend(spend):
        raise ConfigError(
            f"spend = {shown(spend)}: {processes.world} processes share the pass over the samples and not the "
            "trials: leave --spend out, or give the command without torchrun or accelerate launch (rank takes "
            "--workers)"
        )


@contextmanager
def free_folder(output: Path | None) -> Iterator[None]:
    """Keep a new folder free of other runs while one is made for it.

    Args:
        output: Folder; None for a run that is not saved.

    Yields:
        Nothing.
    """
    from foretune.report.folders import hold
    from foretune.report.store import check_free

    if output is None:
        yield
        return
    with hold(output):
        check_free(output)
        yield


def say_where(log: "Console", output: Path | None, more: str = "") -> None:
    """Say where a run was saved.

    Args:
        log: Where to.
        output: Folder; None if it was not.
        more: What to say besides, of a run that was.
    """
    if output is None:
        log.print("nothing saved: name a folder with --output", style="dim")
    else:
        log.print(f"saved to {output}{more}")
