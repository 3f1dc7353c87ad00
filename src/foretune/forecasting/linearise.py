"""One pass over the samples that prices every adapter: token factors under a probe head, fitted without training.

The gradients of the adapters pass through the head, and a new head is random: after a few steps of training it
points elsewhere. So the factors are taken under a linear probe, each training example under one fitted without it,
while a simulated run starts from the model's own head.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foretune.errors import DataError
from foretune.forecasting.factor_room import check_room, files_of
from foretune.forecasting.head_layer import HeadLayer, find_activation
from foretune.forecasting.linear_model import Head, Sample, Start, lift
from foretune.models.adapted import Batch
from foretune.models.classifier import batches
from foretune.models.head import HeadWeights, installed
from foretune.models.head_parts import head_parts, in_head, trained_head
from foretune.models.placement import head_modules
from foretune.models.sites import Site
from foretune.ntk.capture import run_logits
from foretune.ntk.factors import TokenFactors, join_tokens, token_parts
from foretune.ntk.premises import check_new_adapters
from foretune.ntk.probe import CrossFitted, probe_folds
from foretune.problem import OnBatch, Plan
from foretune.stream import fit_probe, stream_batches, stream_groups
from foretune.tasks.objective import Targets


@dataclass(frozen=True)
class Linearised:
    """What one pass over the samples gives.

    Attributes:
        train: Training examples, each under a probe head fitted without it.
        evaluation: Evaluation examples under a probe head fitted on all training examples.
        head: The model's own head, from which training starts.
        rows: For each site the (draws · r) × d_in rows of A at the largest rank, draw-major; the first r are its own.
        draws: Draws of A.
        seconds: The pass and the probe.
        probes: The probe heads of the pass; None where it had none.
    """

    train: Sample
    evaluation: Sample
    head: Head
    rows: tuple[Tensor, ...]
    draws: int
    seconds: float
    probes: CrossFitted | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """Adapted modules at the largest rank."""
        return self.train.factors.sites

    def start(self, sites: Sequence[int], rank: int | None = None) -> Start:
        """Take one adapter out of the linearised model.

        Args:
            sites: Positions of its modules.
            rank: Its rank, at most the largest; None takes that.

        Returns:
            The adapter before training: the first rows of each A, rescaled as peft would draw them.
        """
        return start_of(self.sites, self.rows, sites, rank)


def start_of(all_sites: Sequence[Site], rows: Sequence[Tensor], sites: Sequence[int], rank: int | None) -> Start:
    """Take one adapter out of all that a pass has seen.

    Args:
        all_sites: Every adapted module, at the largest rank.
        rows: For each the rows of A at that rank, of which the first are the adapter's own.
        sites: Positions of the adapter's modules.
        rank: Its rank, at most the largest; None takes that.

    Returns:
        The adapter before training: the first rows of each A, rescaled as peft would draw them.
    """
    positions = tuple(sorted(sites))
    a, scaling = [], []
    for index in positions:
        site = all_sites[index]
        own_rank = site.rank if rank is None else rank
        # K grows by (r/r')^exponent: s = α/r or α/√r is 2 or 1 of it, the 1/r of gaussian entries of A is 2 more
        of_a = 2.0 if site.rank_exponent > 2.0 else 0.0
        ratio = site.rank / own_rank
        a.append(rows[index][:own_rank] * ratio ** (of_a / 2.0))
        scaling.append(site.scaling * ratio ** ((site.rank_exponent - of_a) / 2.0))
    return Start(positions, tuple(a), tuple(scaling))


def linearise(
    plan: Plan, *, probe: bool = True, autocast: torch.dtype | None = None, on_batch: OnBatch | None = None
) -> Linearised:
    """Run the pass.

    Args:
        plan: A score's plan over all modules of interest, with the reduction that a run needs and evaluation rows.
        probe: Whether to take the factors under probe heads; else under the model's own head.
        autocast: Type of mixed precision, such as that of the run that is forecast; None for none.
        on_batch: Called with the number of examples after each batch.

    Returns:
        What it gave; several processes share the pass, and the first one has it.

    Raises:
        HandedOver: In all processes but the first.
    """
    start = time.perf_counter()
    y_train = check_linearisable(plan, probe=probe)
    if autocast is not None:
        mixed = partial(_mixed, plan.adapted.forward, plan.classifier.device.type, autocast)
        plan = replace(plan, adapted=replace(plan.adapted, forward=mixed))
    to_predict = plan.evaluation
    assert to_predict is not None
    y_eval = plan.evaluation_split.labels[plan.sample.eval_indices]
    plan, modules = _with_head(plan)
    *below, (name, layer) = modules.items()
    head = _own_head(plan, [module for _, module in below], layer)
    folds = [np.arange(len(y_train))]
    of_train = of_evaluation = HeadWeights({})
    heads, weights = [of_train], [head.weight]
    weight_of_all, fitted = head.weight, None
    if probe:
        fitted = fit_probe(plan, name, layer, y_train, train=plan.train, on_batch=on_batch)
        folds, heads, of_evaluation = list(fitted.folds), list(fitted.heads), fitted.whole
        weights, weight_of_all = [one.weights[name][0] for one in heads], of_evaluation.weights[name][0]

    def each_fold() -> Iterator[Batch]:
        for number, batch in stream_groups(plan, plan.train, folds, on_batch=on_batch):
            with installed(modules, heads[number]):
                yield batch

    spool, mapped = files_of(plan)
    known = token_parts(plan.adapted, each_fold(), plan.reduction, mapped=spool)
    with installed(modules, of_evaluation):
        stream = stream_batches(plan, to_predict, on_batch=on_batch)
        predicted = token_parts(plan.adapted, stream, plan.reduction, mapped=spool)
    of_all = plan.processes.hand_over((known, predicted), plan.classifier.device)
    del known, predicted
    of_known, of_predicted = (list(chain.from_iterable(parts)) for parts in zip(*of_all, strict=True))
    del of_all
    train = join_tokens(plan.adapted, plan.reduction, of_known, n=len(y_train), mapped=mapped)
    evaluation = join_tokens(plan.adapted, plan.reduction, of_predicted, n=len(y_eval), mapped=mapped)
    if mapped is not None:
        mapped.alone()
    del spool, of_known, of_predicted
    fold = np.empty(len(y_train), dtype=np.int64)
    for index, rows in enumerate(folds):
        fold[rows] = index
    rows_of_a = tuple(adapter.rows.detach() for adapter in plan.adapted.adapters)
    return Linearised(
        _sample(plan, train, y_train, weights, fold),
        _sample(plan, evaluation, y_eval, [weight_of_all], np.zeros(len(y_eval), dtype=np.int64)),
        head,
        rows_of_a,
        plan.adapted.draws,
        time.perf_counter() - start,
        fitted,
    )


def check_linearisable(plan: Plan, *, probe: bool = True) -> Targets:
    """Refuse what cannot be linearised, before any work.

    Args:
        plan: Plan of the pass; that of a score may have any reduction.
        probe: As in `linearise`.

    Returns:
        Targets of the training samples.

    Raises:
        DataError: If an output layer cannot be fitted on the samples, or there are no evaluation rows.
        ConfigError: If the memory is too little for the token factors of a batch, or of all where they must be in it.
        StoreError: If the disk has not the room for those that do not fit into the memory.
        KernelError: If the adapter is no plain LoRA with B = 0.
    """
    check_new_adapters(plan.adapted)
    if plan.evaluation is None:
        raise DataError("eval_samples = 0: a forecast predicts evaluation rows, ask for some")
    y_train = plan.task.train.labels[plan.sample.train_indices]
    objective = plan.task.objective
    objective.check_rows(plan.task.train.labels)
    objective.check_sample(y_train, plan.task.train.labels[plan.sample.training])
    folds = probe_folds(len(y_train), seed=plan.settings.seed) if probe else ()
    if any(len(np.unique(np.delete(y_train, fold, axis=0), axis=0)) < 2 for fold in folds):
        raise DataError(
            "each fifth of the samples left out must leave samples that differ in their labels: raise --samples, or "
            "change --seed"
        )
    _with_head(plan)
    check_room(plan)
    return y_train


def _with_head(plan: Plan) -> tuple[Plan, dict[str, nn.Linear]]:
    """The head's linear modules, for the pass too: a norm between them trains as well, but is taken as it is."""
    idle = () if plan.adapted.layout is None else plan.adapted.layout.idle
    modules = {name: module for name, module in head_modules(plan.placed).items() if name not in idle}
    _, others = trained_head(plan.placed, str(plan.placed.active_adapter))
    parts = head_parts(plan.placed.get_base_model())
    if others and all(in_head(name, parts) for name in others):
        plan = replace(plan, adapted=replace(plan.adapted, head=modules))
    return plan, modules


def _own_head(plan: Plan, below: Sequence[nn.Linear], output: nn.Linear) -> Head:
    """The head as it is, with the hidden layer's activation if it has one such layer."""
    copies = [module.weight.detach().clone() for module in below]
    bias = None if output.bias is None else output.bias.detach().clone()
    weight = output.weight.detach().clone()
    if len(below) == 1:
        few = range(min(8, len(plan.train.features)))
        (batch,) = batches(plan.train, plan.classifier, batch_size=len(few), rows=few)

        def run() -> None:
            run_logits(plan.adapted, batch)

        (module,) = below
        activation = find_activation(run, module, output)
        if activation is not None:
            hidden_bias = weight.new_zeros(len(copies[0])) if module.bias is None else module.bias.detach().clone()
            return Head(weight, bias, layer=HeadLayer(copies[0], hidden_bias, activation))
    return Head(weight, bias, tuple(copies))


@contextmanager
def _mixed(forward: Callable[[], AbstractContextManager[None]], device: str, dtype: torch.dtype) -> Iterator[None]:
    with forward(), torch.autocast(device, dtype=dtype):
        yield


def _sample(
    plan: Plan,
    factors: TokenFactors,
    targets: Targets,
    weights: Sequence[Tensor],
    fold: NDArray[np.int64],
) -> Sample:
    """Examples under one probe or, cross-fitted, under the probe of their fold."""
    device = factors.logits.device
    lifts = torch.stack([lift(weight.to(device), factors.reduction.directions) for weight in weights])
    objective = plan.task.objective
    wanted = objective.tensor(targets, torch.float64).to(device)
    return Sample(factors, wanted, lifts, torch.as_tensor(fold, device=device), objective)


def first_examples(sample: Sample, n: int) -> Sample:
    """Keep the first examples of a sample.

    Args:
        sample: Sample.
        n: How many.

    Returns:
        The same factors, of which only the first n examples are used.
    """
    f = sample.factors
    factors = replace(f, inputs=f.inputs[:n], logits=f.logits[:n])
    return replace(sample, factors=factors, targets=sample.targets[:n], fold=sample.fold[:n])


def probe_scores(sample: Sample) -> tuple[float, float]:
    """Loss and metric of the probe on a sample.

    Args:
        sample: Sample under probe heads.

    Returns:
        Mean loss and main metric of the sample's objective: for classes cross-entropy in nats, accuracy as a fraction.
    """
    outputs, targets = sample.factors.logits.double().cpu().numpy(), sample.targets.cpu().numpy()
    return sample.objective.mean_loss(outputs, targets), sample.objective.main(outputs, targets)
