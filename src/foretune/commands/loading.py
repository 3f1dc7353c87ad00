"""What commands do alike: load a configuration, keep a folder free, say where a run lies."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretune.settings.commands import Configuration

if TYPE_CHECKING:
    from peft import LoraConfig
    from rich.console import Console

    from foretune.models.classifier import Classifier
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
    lora: "LoraConfig"
    words: str


def read_adapter(config: Configuration[Any]) -> "LoraConfig | None":
    """Read the adapter where a file describes it.

    Args:
        config: Configuration.

    Returns:
        peft's configuration; None where settings describe the adapter.
    """
    from foretune.models.adapter_file import adapter_from_file

    return adapter_from_file(config.adapter) if isinstance(config.adapter, Path) else None


def load(config: Configuration[Any], given: "LoraConfig | None", *, seed: int) -> Loaded:
    """Load the data and the model of a configuration.

    Args:
        config: Configuration.
        given: The adapter, from `read_adapter`.
        seed: Seed of a new head.

    Returns:
        Both, with the adapter for the model.
    """
    from foretune.models.adapter_file import adapter_in_words, placement_in_words
    from foretune.models.classifier import load_model
    from foretune.models.placement import lora_config
    from foretune.tasks.load import load_task

    task = load_task(config.data)
    classifier = load_model(config.model, task.objective, seed)
    if isinstance(config.adapter, Path):
        assert given is not None  # read before anything else
        return Loaded(task, classifier, given, adapter_in_words(given))
    return Loaded(task, classifier, lora_config(classifier.model, config.adapter), placement_in_words(config.adapter))


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
