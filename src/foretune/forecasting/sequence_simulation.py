"""A language model's simulated runs: one pass over the known sequences, and the recipe on its sketches.

The simulated run tells where A and B go; what loss they have there, the model itself tells: they are plugged into it at
some steps, and the sequences to predict go through (forward only). At rates at which LoRA works the network bends, and
the loss of the linearised model does not follow: plugged in, the same A and B are much nearer to a real run's.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foretune.forecasting.linear_model import Start
from foretune.forecasting.linearise import start_of
from foretune.forecasting.schedule import Schedule, schedule_of
from foretune.forecasting.sequence_calibration import perplexity_of
from foretune.forecasting.sequence_runs import SequenceRuns, SequenceSample
from foretune.forecasting.simulate import train_runs
from foretune.forecasting.simulated_runs import SimulatedRun, adapters_side_by_side, best_of, ending
from foretune.models.plugged import plugged_in
from foretune.models.sites import Site
from foretune.ntk.sequence_losses import sequence_losses
from foretune.ntk.sketches import find_bases, join_sketches, sketch_parts, sketch_width
from foretune.sequence_plan import OnBatch, SequencePlan, sequence_batches
from foretune.settings.commands import ForecastSettings
from foretune.tasks.metrics import PERPLEXITY

DRAWS = 2  # labels drawn for each target, for the curvature of the loss
FIRST = 16  # sequences that the directions of the sketches are found on
PLUGGED = 5  # times that a simulated adapter is plugged into the model, at most
APART = 0.05  # nats between the linearised loss and that of the model, plugged in, that are worth a note


@dataclass(frozen=True)
class Measured:
    """What a model has on the sequences to predict.

    Attributes:
        loss: Σ loss / Σ targets, in nats.
        accuracy: Share of the targets that are the likeliest token.
    """

    loss: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        """e^loss; infinite where that overflows."""
        return perplexity_of(self.loss)

    def to_dict(self) -> dict[str, float]:
        """Lay out as in `result.json`.

        Returns:
            Loss, perplexity and token accuracy.
        """
        return {
            "eval_loss": self.loss,
            f"eval_{PERPLEXITY.name}": self.perplexity,
            "eval_token_accuracy": self.accuracy,
        }


@dataclass(frozen=True)
class LinearisedSequences:
    """What one pass over the known sequences gives.

    Attributes:
        train: Known sequences that train.
        evaluation: Sequences to predict.
        rows: For each site the rows of A at the largest rank.
        seconds: Of the pass.
    """

    train: SequenceSample
    evaluation: SequenceSample
    rows: tuple[Tensor, ...]
    seconds: float

    @property
    def sites(self) -> tuple[Site, ...]:
        """Adapted modules at the largest rank."""
        return self.train.sketches.sites

    @property
    def base(self) -> Measured:
        """The model without training on the sequences to predict, as the pass has seen it."""
        known = self.evaluation.sketches
        return Measured(float(known.target_losses.double().mean()), float(known.right.double().mean()))

    def start(self, sites: Sequence[int], rank: int | None = None) -> Start:
        """Take one adapter out of the linearised model.

        Args:
            sites: Positions of its modules.
            rank: Its rank, at most the largest; None takes that.

        Returns:
            The adapter before training.
        """
        return start_of(self.sites, self.rows, sites, rank)


def n_passed(plan: SequencePlan, settings: ForecastSettings) -> int:
    """Count the sequences that go through the model, for a progress bar.

    Args:
        plan: What will be done.
        settings: The run.

    Returns:
        The first sequences, the known ones and those to predict; the latter again each time that the adapter is
        plugged in, for every number of known rows that a run is simulated on.
    """
    known, predicted = len(plan.known.features), len(plan.rows.evaluation.features)
    sizes = {min(rows, known) for rows in (plan.train_rows, *(settings.rows or ()))}
    looks = [len(plug_steps(schedule_of(settings, rows, seed=plan.settings.seed))) for rows in sizes]
    return min(FIRST, known) + known + predicted * (1 + sum(looks))


def linearise_sequences(plan: SequencePlan, memory: int, *, on_batch: OnBatch | None = None) -> LinearisedSequences:
    """Run the pass.

    Args:
        plan: The placed adapter, the known sequences and those to predict.
        memory: Bytes that the sketches may take.
        on_batch: Called with the number of sequences after each batch.

    Returns:
        What it gave; several processes share the pass, and the first one has it.

    Raises:
        HandedOver: In all processes but the first.
    """
    start = time.perf_counter()
    n, m, seed = len(plan.known.features), len(plan.rows.evaluation.features), plan.settings.seed
    q = sketch_width(plan.adapted.sites, n + m, DRAWS, memory)
    # those of a batch are summed in single precision, beside the others: a quarter of the memory at most
    of_sequence = 4 * (1 + DRAWS) * sum(min(q, site.d_in) * min(q, site.d_out) for site in plan.adapted.sites)
    most = max(1, memory // (4 * of_sequence))
    processes, samples, found = plan.processes, (plan.known, plan.rows.evaluation), None
    if processes.is_main:
        found = find_bases(
            plan.adapted, sequence_batches(plan, plan.known, rows=FIRST, on_batch=on_batch), q, seed=seed
        )
    bases = processes.spread(found, plan.language.device)
    parts = [
        sketch_parts(
            plan.adapted,
            sequence_batches(plan, tokens, most=most, shared=processes, on_batch=on_batch),
            bases,
            draws=DRAWS,
            seed=seed + number,
        )
        for number, tokens in enumerate(samples)
    ]
    of_all = processes.hand_over(parts, plan.language.device)
    train, evaluation = (
        join_sketches(plan.adapted.sites, bases, of_sample, n=len(tokens.features))
        for of_sample, tokens in zip(zip(*of_all, strict=True), samples, strict=True)
    )
    rows = tuple(adapter.rows.detach() for adapter in plan.adapted.adapters)
    return LinearisedSequences(
        SequenceSample(train, "bounded"), SequenceSample(evaluation, "quadratic"), rows, time.perf_counter() - start
    )


@dataclass(frozen=True)
class SequenceRun:
    """What is known of one adapter of a language model without training it.

    Attributes:
        run: Its simulated run; losses and perplexity on the sequences to predict are those of the model with the
            simulated A and B plugged in, the training losses those of the linearised model.
        token_accuracy: Share of the targets to predict that are the likeliest token, at the run's evaluations.
        linear_loss: Loss of the linearised model at its end.
    """

    run: SimulatedRun
    token_accuracy: tuple[float, ...]
    linear_loss: float

    @property
    def apart(self) -> bool:
        """Whether the linearised model ends elsewhere, so that the run left the ground that it was linearised on."""
        return not abs(self.linear_loss - self.run.end.eval_loss) <= APART

    def end_to_dict(self) -> dict[str, float]:
        """Lay the end out as in `result.json`.

        Returns:
            Losses, perplexity and token accuracy, and the linearised model's loss.
        """
        return {
            **self.run.end.to_dict(self.run.metric),
            "eval_token_accuracy": self.token_accuracy[-1],
            "linear_eval_loss": self.linear_loss,
        }


def plug_steps(schedule: Schedule) -> tuple[int, ...]:
    """Say after which steps A and B are plugged into the model.

    Args:
        schedule: Schedule of the run.

    Returns:
        The ends of epochs; with more than five of them, or a single one, five that are spread over the steps.
    """
    count = schedule.epochs if 1 < schedule.epochs <= PLUGGED else PLUGGED
    return tuple(sorted({max(1, round(schedule.steps * part / count)) for part in range(1, count + 1)}))


def simulate_sequences(
    plan: SequencePlan,
    linearised: LinearisedSequences,
    starts: Sequence[Start],
    schedule: Schedule,
    *,
    on_batch: OnBatch | None = None,
) -> tuple[SequenceRun, ...]:
    """Simulate the schedule for each adapter.

    What a probe is for classifiers is here the model without training. A schedule of fewer rows than are known sees the
    first so many of them.

    Args:
        plan: Whose model the simulated adapters are plugged into.
        linearised: The model after the pass over the sequences.
        starts: Adapters.
        schedule: Schedule of the run; its rows may be more than the known ones.
        on_batch: Called with the number of sequences after each batch that goes through the model.

    Returns:
        One for each adapter.
    """
    train, looks, metric = linearised.train, plug_steps(schedule), PERPLEXITY
    names = [site.name for site in linearised.sites]
    before = linearised.base
    found: list[SequenceRun] = []
    for group in adapters_side_by_side(starts):
        runs = SequenceRuns(group, train.sketches, torch.float32, train_a=True)
        seen: list[list[Measured]] = [[before] for _ in group]

        def look(_: int, runs: SequenceRuns = runs, seen: list[list[Measured]] = seen) -> None:
            for number, of_run in enumerate(seen):
                weights = {names[site]: pair for site, pair in runs.weights(number).items()}
                with plugged_in(plan.placed, weights):
                    of_run.append(measure_sequences(plan, on_batch=on_batch))

        trajectories = train_runs(
            runs,
            train,
            linearised.evaluation,
            schedule,
            n=min(train.sketches.n, schedule.train_rows),
            looks=looks,
            on_look=look,
        )
        for trajectory, measured in zip(trajectories, seen, strict=True):
            plugged = dataclasses.replace(
                trajectory,
                eval_loss=tuple(one.loss for one in measured),
                eval_metric=tuple(one.perplexity for one in measured),
            )
            run = SimulatedRun(
                plugged,
                ending(plugged, schedule),
                before.loss,
                before.perplexity,
                train.sketches.n,
                schedule.train_rows,
                metric,
                best_of(plugged, schedule, metric, looks),
            )
            found.append(SequenceRun(run, tuple(one.accuracy for one in measured), trajectory.eval_loss[-1]))
    return tuple(found)


@torch.no_grad()
def measure_sequences(plan: SequencePlan, *, on_batch: OnBatch | None = None) -> Measured:
    """Run the model as it is over the sequences to predict.

    Args:
        plan: Model and sequences.
        on_batch: Called with the number of sequences after each batch.

    Returns:
        Loss and token accuracy.
    """
    total, right, targets = 0.0, 0, 0
    for batch in sequence_batches(plan, plan.rows.evaluation, on_batch=on_batch):
        logits = plan.placed(**batch.inputs).logits
        losses = sequence_losses(logits, batch, 0, seed=0)
        total += float(losses.target_losses.double().sum())
        right += int(losses.right.sum())
        targets += len(losses.right)
    return Measured(total / targets, right / targets)
