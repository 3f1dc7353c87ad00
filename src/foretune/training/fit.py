"""Train a plan on the Hugging Face Trainer, so that a killed run goes on from its last epoch."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from foretune.errors import ConfigError
from foretune.report.curves import History, read_log
from foretune.report.folders import disk
from foretune.tasks.metrics import Metric
from foretune.training.checkpoints import OnNote, last_whole, seal
from foretune.training.trainable import Trainable

RECORDS_PER_EPOCH = 50
OnStep = Callable[[int, int, float | None], None]
OnRecord = Callable[[History], None]


@dataclass(frozen=True)
class Hooks:
    """What to call while training, in the first process only.

    Attributes:
        on_step: With the steps done, the steps in all and the latest training loss, None before the first.
        on_record: With the course so far, after each record of the log.
        on_note: With a sentence on a checkpoint that cannot be used.
    """

    on_step: OnStep | None = None
    on_record: OnRecord | None = None
    on_note: OnNote | None = None


@dataclass(frozen=True)
class Fitted:
    """A finished training.

    Attributes:
        history: Its course.
        is_main: Whether this process is the first of those that share the work.
        world_size: Processes that shared the work.
        device: Device of this process.
    """

    history: History
    is_main: bool
    world_size: int
    device: str


class _Recorder(TrainerCallback):  # type: ignore[misc]  # transformers comes without types
    """Keep the clock in the Trainer's log, which its checkpoints hold, and pass the course on."""

    def __init__(self, hooks: Hooks, metrics: Sequence[Metric]) -> None:
        self._hooks, self._metrics = hooks, metrics
        self._start = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        before = state.log_history[-1]["seconds"] if state.log_history else 0.0
        self._start = time.perf_counter() - before

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        control.should_log = True  # so that no window of steps holds two epochs

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        state.log_history[-1]["seconds"] = time.perf_counter() - self._start
        if self._hooks.on_record is not None and state.is_world_process_zero:
            self._hooks.on_record(_history(state, self._metrics))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.is_world_process_zero:
            seal(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self._hooks.on_step is not None and state.is_world_process_zero:
            loss = next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
            self._hooks.on_step(state.global_step, state.max_steps, loss)


class _Allocator(TrainerCallback):  # type: ignore[misc]
    """AdaLoRA's share of ranks, which peft leaves to the loop: after a step, while its gradients are there.

    peft adds its penalty to every loss; here steps have it, and evaluations do not.
    """

    def __init__(self, placed: PeftModel) -> None:
        self._tuner, self._config = placed.base_model, placed.active_peft_config
        self._penalty = self._config.orth_reg_weight
        self._config.orth_reg_weight = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._config.orth_reg_weight = self._penalty

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._config.orth_reg_weight = 0.0

    def restore(self) -> None:
        """Give the configuration its penalty back."""
        self._config.orth_reg_weight = self._penalty

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._tuner.update_and_allocate(state.global_step + 1)  # the Trainer counts the step later


def _allocates(placed: PeftModel) -> bool:
    return hasattr(placed.base_model, "update_and_allocate")


def fit(plan: Trainable, folder: Path, *, hooks: Hooks | None = None) -> Fitted:
    """Train adapter and head with AdamW on the plan's loss; go on from the last whole checkpoint if there is one.

    AdaLoRA keeps no checkpoints: its importance of ranks would not be in them, so that a run begins again.

    The Trainer does the rest: one CPU or GPU, several under `accelerate launch` or `torchrun`. Unless the plan says
    otherwise, the model is evaluated before training and after each epoch, and the last two checkpoints are kept.

    Args:
        plan: From `prepare_tune` or `prepare_language`; its model is trained in place.
        folder: Folder of the run.
        hooks: What to call meanwhile.

    Returns:
        The course of the training.

    Raises:
        ConfigError: If bfloat16, a tracker or a GPU other than the first is asked for and cannot be had.
        StoreError: If the disk refuses; the checkpoints that are whole are kept.
    """
    hooks = hooks or Hooks()
    with disk(f"the run in {str(folder)!r} stopped", "make room: the same command goes on from the last whole epoch"):
        return _fit(plan, folder, hooks)


def _fit(plan: Trainable, folder: Path, hooks: Hooks) -> Fitted:
    arguments = _arguments(plan, folder)
    first = arguments.process_index == 0
    last = last_whole(folder, clean=first, on_note=hooks.on_note if first else None)
    arguments.eval_on_start = plan.course == "whole" and last is None  # on resuming, the log has it already
    steps_per_epoch = plan.steps_per_epoch(arguments.world_size)
    arguments.logging_steps = max(1, steps_per_epoch // RECORDS_PER_EPOCH)
    allocators = [_Allocator(plan.placed)] if _allocates(plan.placed) else []
    with _quiet():
        trainer = _trainer(plan, arguments, hooks, allocators)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if plan.course == "end":
            trainer.evaluate()
    for allocator in allocators:
        allocator.restore()
    plan.placed.eval()
    return Fitted(
        _history(trainer.state, plan.metrics),
        bool(trainer.is_world_process_zero()),
        int(arguments.world_size),
        str(arguments.device),
    )


def _history(state: TrainerState, metrics: Sequence[Metric]) -> History:
    return read_log(state.log_history, [metric.name for metric in metrics], better=metrics[0].better)


def _trainer(plan: Trainable, arguments: TrainingArguments, hooks: Hooks, allocators: Sequence[_Allocator]) -> Trainer:
    try:
        trainer = plan.trainer(arguments, [_Recorder(hooks, plan.metrics), *allocators])
    except (RuntimeError, ValueError, ImportError) as error:
        if not plan.settings.report_to:
            raise
        trackers = ", ".join(plan.settings.report_to)
        raise ConfigError(f"report_to = {trackers}: {' '.join(str(error).split())}") from error
    trainer.remove_callback(PrinterCallback)  # the caller shows the progress
    return trainer


def _arguments(plan: Trainable, folder: Path) -> TrainingArguments:
    settings = plan.settings
    try:
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            per_device_train_batch_size=settings.train_batch_size,
            per_device_eval_batch_size=settings.batch_size,
            weight_decay=settings.weight_decay,
            warmup_steps=settings.warmup_ratio,
            lr_scheduler_type=settings.scheduler,
            bf16=settings.bf16,
            seed=settings.seed,
            report_to=list(settings.report_to) or "none",
            use_cpu=plan.device.type == "cpu",
            eval_strategy="no" if plan.course == "end" else "epoch",
            save_strategy="epoch" if plan.course == "whole" and not _allocates(plan.placed) else "no",
            save_total_limit=2,  # the one before counts until the last is sealed
            logging_nan_inf_filter=False,  # a run that diverges says so
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
        )
    except (ValueError, RuntimeError) as error:
        if not settings.bf16:
            raise
        raise ConfigError(f"bf16 is not available here: {' '.join(str(error).split())}; leave --bf16 out") from error
    wanted = plan.device
    if wanted.index and arguments.world_size == 1:
        raise ConfigError(
            f"device '{wanted}': the Trainer takes the first GPU, so set CUDA_VISIBLE_DEVICES={wanted.index}"
        )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several GPUs are the launcher's business, not DataParallel's
    return arguments


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own log lines and peft's question for a deprecated property away."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
