"""Fine-tune a configuration and say what came of it."""

import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig

from foretune.models.classifier import own_classifier
from foretune.report.curves import Epoch, History
from foretune.report.provenance import versions
from foretune.report.store import finite
from foretune.settings.commands import TuneSettings
from foretune.tasks.load import Task
from foretune.training.fit import Hooks, fit
from foretune.training.plan import TunePlan, describe_tune, prepare_tune

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

    plan: TunePlan
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
        facts = describe_tune(self.plan)
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


def run_tune(plan: TunePlan, folder: Path, *, seconds_load: float = 0.0, hooks: Hooks | None = None) -> TuneResult:
    """Carry out a plan.

    Args:
        plan: From `prepare_tune`; its model is trained in place.
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
    config: LoraConfig | None,
    task: Task,
    *,
    settings: TuneSettings | None = None,
) -> TuneResult:
    """Fine-tune a LoRA configuration on the user's own model and data; the model given is left as it is.

    The trained peft model is `result.plan.placed`. Nothing is kept on disk: for a run that can be resumed use
    `foretune tune --output`.

    Args:
        model: transformers sequence classifier in eval mode, or a peft model with its adapter (then it is trained).
        tokenizer: Its tokenizer.
        config: peft's configuration; None if the model is a peft model already.
        task: Data, from `load_task` or `task_from_datasets`.
        settings: Settings; None takes the defaults.

    Returns:
        The result.
    """
    classifier = own_classifier(model, tokenizer, task.objective, bare=config is not None)
    plan = prepare_tune(classifier, task, config, settings or TuneSettings())
    with tempfile.TemporaryDirectory() as folder:
        return run_tune(plan, Path(folder))
