"""What `score`, `forecast` and `tune` load alike."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretune.settings.commands import Configuration

if TYPE_CHECKING:
    from peft import LoraConfig

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
        given: The adapter, from `read_adapter`; None reads it, where there is a file.
        seed: Seed of a new head.

    Returns:
        Both, with the adapter for the model.
    """
    from foretune.models.adapter_file import adapter_from_file, adapter_in_words, placement_in_words
    from foretune.models.classifier import load_model
    from foretune.models.placement import lora_config
    from foretune.tasks.load import load_task

    task = load_task(config.data)
    classifier = load_model(config.model, task.objective, seed)
    if isinstance(config.adapter, Path):
        lora = adapter_from_file(config.adapter) if given is None else given
        return Loaded(task, classifier, lora, adapter_in_words(lora))
    return Loaded(task, classifier, lora_config(classifier.model, config.adapter), placement_in_words(config.adapter))
