"""Fine-tune a configuration and say what came of it."""

import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig

from foretune.language.rows import LanguageTask
from foretune.models.classifier import own_classifier
from foretune.models.language_model import own_language_model
from foretune.report.curves import Epoch, History
from foretune.report.provenance import versions
from foretune.report.store import finite
from foretune.settings.commands import TuneSettings
from foretune.tasks.load import Task
from foretune.training.fit import Hooks, fit
from foretune.training.language import prepare_language
from foretune.training.plan import prepare_tune
from foretune.training.trainable import Trainable

SCHEMA = 1


@dataclass(frozen=True)
class TuneResult:
    """A finished fine-tune.

    Attributes:
        plan: What was done; its model is trained.
        history: Losses over steps, metrics after each epoch.
        is_main: Whether this process is the first of those that shared the work: it alone writes and prints.
        world_size: Processes that shared the work.
        device: Device of this process.
        seconds: Of `load`, `train`, `evaluate` and `total`; training and evaluation over all restarts.
    """

    plan: Trainable
    history: History
    is_main: bool
    world_size: int
    device: str
    seconds: Mapping[str, float]

    @property
    def last(self) -> Epoch:
        """Metrics after the last epoch."""
        return self.history.epochs[-1]

    def to_dict(self) -> dict[str, Any]:
        """Lay the result out as in `result.json` (docs/study.md).

        Returns:
            JSON-ready values; what is not finite is None.
        """
        facts = self.plan.describe()
        best = self.history.best
        losses = [step.loss for step in self.history.steps]
        content = {
            "schema": SCHEMA,
            "model": facts["model"],
            "dataset": facts["dataset"],
            "placement": facts["placement"],
            "seed": self.plan.settings.seed,
            "final": self.last.to_dict(),
            "best_epoch": None if best is None else best.epoch,
            "before_training": self.history.epochs[0].to_dict(),
            "diverged": not all(map(math.isfinite, [*losses, self.last.eval_loss])),
            "epochs": [epoch.to_dict() for epoch in self.history.epochs],
            "steps": self.last.step,
            "batch_size_total": self.plan.settings.train_batch_size * self.world_size,
            "world_size": self.world_size,
            "device": self.device,
            "details": facts,
            "seconds": dict(self.seconds),
            "versions": versions(),
            "settings": dataclasses.asdict(self.plan.settings),
        }
        laid_out: dict[str, Any] = finite(content)
        return laid_out


def run_tune(plan: Trainable, folder: Path, *, seconds_load: float = 0.0, hooks: Hooks | None = None) -> TuneResult:
    """Carry out a plan.

    Args:
        plan: From `prepare_tune` or `prepare_language`; its model is trained in place.
        folder: Folder for the checkpoints.
        seconds_load: Time that loading took, for the record.
        hooks: What to call meanwhile.

    Returns:
        The result.
    """
    start = time.perf_counter()
    fitted = fit(plan, folder, hooks=hooks)
    seconds = {
        "load": seconds_load,
        "train": fitted.history.seconds_train,
        "evaluate": fitted.history.seconds_evaluate,
        "total": seconds_load + time.perf_counter() - start,
    }
    return TuneResult(plan, fitted.history, fitted.is_main, fitted.world_size, fitted.device, seconds)


def tune(
    model: Any,
    tokenizer: Any,
    config: PeftConfig | None,
    task: Task | LanguageTask,
    *,
    settings: TuneSettings | None = None,
) -> TuneResult:
    """Fine-tune an adapter of any method of peft's on the user's own model and data; the model given is left as it is.

    The trained peft model is `result.plan.placed`. Nothing is kept on disk: for a run that can be resumed use
    `foretune tune --output`.

    Args:
        model: transformers sequence classifier in eval mode, or for language a language model; or a peft model of
            one with its adapter (then it is trained).
        tokenizer: Its tokenizer.
        config: peft's configuration; None if the model is a peft model already.
        task: Data, from `load_task` or `task_from_datasets`, or `load_language_task` or `language_task_from_datasets`.
        settings: Settings; None takes the defaults.

    Returns:
        The result.
    """
    plan: Trainable
    if isinstance(task, LanguageTask):
        language = own_language_model(model, tokenizer, bare=config is not None)
        plan = prepare_language(language, task, config, settings or TuneSettings())
    else:
        classifier = own_classifier(model, tokenizer, task.objective, bare=config is not None)
        plan = prepare_tune(classifier, task, config, settings or TuneSettings())
    with tempfile.TemporaryDirectory() as folder:
        return run_tune(plan, Path(folder))
