"""Settings of the run that is forecast. Imports nothing heavy: the command line builds its help from these."""

from dataclasses import dataclass
from pathlib import Path

from foretune.settings.groups import Scheduler, TuneSettings
from foretune.settings.ranges import Count, Decay, Scale, Share, check


@dataclass(frozen=True)
class Training:
    """The run that is forecast; the defaults are those of `foretune tune`.

    Attributes:
        epochs: Passes over the training rows.
        learning_rate: Peak learning rate of AdamW.
        train_batch_size: Texts in a step.
        weight_decay: Weight decay of AdamW.
        warmup_ratio: Share of the steps over which the learning rate rises from 0.
        scheduler: Learning rate schedule after that.
    """

    epochs: Count = 10
    learning_rate: Scale = 4e-4
    train_batch_size: Count = 32
    weight_decay: Decay = 0.0
    warmup_ratio: Share = 0.06
    scheduler: Scheduler = "linear"

    def __post_init__(self) -> None:
        """Check types and ranges, as `foretune tune` does."""
        check(self)

    def settings(self, *, max_length: int, seed: int) -> TuneSettings:
        """Write the run's settings out.

        Args:
            max_length: Longest sequence in tokens.
            seed: Seed of A, head and order of the rows.

        Returns:
            Settings of `foretune tune`.
        """
        return TuneSettings(
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            train_batch_size=self.train_batch_size,
            weight_decay=self.weight_decay,
            warmup_ratio=self.warmup_ratio,
            scheduler=self.scheduler,
            max_length=max_length,
            seed=seed,
        )


@dataclass(frozen=True)
class CurveWanted:
    """A forecast of a run's course that was asked for.

    Attributes:
        training: The run.
        calibration: Calibration of the forecast; None for the one that comes with foretune.
    """

    training: Training
    calibration: Path | None = None
