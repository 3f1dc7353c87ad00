"""Passes over the samples for adapter methods beside LoRA: kernels of their placements, and what a simulated run needs.

Methods whose features of a module hang on that module alone, (IA)³ say, take one pass over all modules: kernels of
placements are sums. Others, and those that change the forward pass at their start, take one for each placement.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor, nn

from foretune.arrays import Array
from foretune.errors import ForetuneError, PlacementError
from foretune.forecasting.linear_model import FirstOrder, Start
from foretune.forecasting.linearise import Linearised, first_examples
from foretune.models.adapted import Layout
from foretune.models.classifier import Classifier
from foretune.models.head import installed
from foretune.models.placement import head_modules, place
from foretune.models.sites import Site
from foretune.ntk.features import TangentFeatures, first_rows, join_features
from foretune.ntk.jacobian import batch_features
from foretune.ntk.kernel import tangent_kernel
from foretune.ntk.probe import CrossFitted
from foretune.problem import OnBatch, Plan, prepare
from foretune.ranking.candidates import Candidate
from foretune.ranking.finalists import Quick, best_of_method
from foretune.ranking.methods import METHODS, Method, Placement, placements_of, told_by_trials
from foretune.ranking.module_kernels import SAMPLES
from foretune.ranking.quick_score import kernel_scores
from foretune.settings.commands import METHOD_ROWS, RankSettings
from foretune.settings.groups import MethodName
from foretune.stream import stream_batches, stream_groups
from foretune.tasks.load import Task

OnProgress = Callable[[str, int, int], None]

FEW = 64  # samples of methods that automatic differentiation takes one by one


@dataclass(frozen=True)
class Priced:
    """A placement of a method beside LoRA.

    Attributes:
        quick: Its quick score, and peft's configuration.
        start: Where its simulated run begins; None where none is simulated.
        kernel: n × n kernel of the samples.
    """

    quick: Quick
    start: Start | None
    kernel: Array


@dataclass(frozen=True)
class Scene:
    """What all passes of a ranking have in common.

    Attributes:
        classifier: Model and tokenizer, without an adapter.
        task: Data.
        settings: Settings of the ranking.
        plan: Plan of LoRA's pass.
        linearised: What came of it.
        placements: Placements of each method beside LoRA, by positions in `linearised.sites`.
    """

    classifier: Classifier
    task: Task
    settings: RankSettings
    plan: Plan
    linearised: Linearised
    placements: tuple[tuple[Placement, ...], ...]


@dataclass(frozen=True)
class Others:
    """All that is priced beside LoRA.

    Attributes:
        priced: The best placements of each method, methods in the order that they were asked for.
        linearised: The linearised model with the features of those that are simulated.
        notes: How they were priced.
    """

    priced: tuple[Priced, ...]
    linearised: Linearised
    notes: tuple[str, ...]


def list_placements(
    methods: Sequence[MethodName],
    candidates: Sequence[Candidate],
    sites: Sequence[Site],
    template: LoraConfig,
    model: nn.Module,
) -> tuple[tuple[Placement, ...], ...]:
    """List what is priced beside LoRA, and try one placement of each method: all that can go wrong before the work.

    Args:
        methods: Methods, LoRA among them or not.
        candidates: LoRA placements that the user leaves to choose from.
        sites: Every linear module that can be adapted.
        template: peft's configuration of LoRA on all of them.
        model: The model without adapters; left as it is.

    Returns:
        The placements of each method beside LoRA.

    Raises:
        PlacementError: If peft cannot put a method on this model, naming the method.
    """
    listed = []
    for name in methods:
        if name == "lora":
            continue
        placements = placements_of(METHODS[name], candidates, sites, template, model)
        try:
            place(model, placements[0].config, seed=0)
        except ForetuneError as error:
            raise PlacementError(f"methods = {name}: {error}") from error
        listed.append(placements)
    return tuple(listed)


def price_methods(scene: Scene, on_progress: OnProgress) -> Others:
    """Run the passes of all methods beside LoRA and score their placements.

    Args:
        scene: What they have in common.
        on_progress: Called with what is done now, how much of it is done and how much there is.

    Returns:
        The best placements of each, with what their simulated runs need.

    Raises:
        ConfigError: If a budget fits none of a method's placements.
    """
    priced: list[Priced] = []
    train, evaluation = list(scene.linearised.train.first_order), list(scene.linearised.evaluation.first_order)
    for placements in scene.placements:
        groups = _groups(placements)
        on_batch = _counter(on_progress, placements[0].method, len(groups), scene)
        # where there are more passes than rows, those that drop out need no evaluation rows, and the others go again
        passes = [_Pass(scene, group, on_batch, evaluates=len(groups) <= METHOD_ROWS) for group in groups]
        scored = _score(passes)
        for one, placement, quick, kernel in _best(scored, scene.settings):
            start = None
            if one.method.simulated:
                start = one.start(placement, len(train))
                train += one.vectors(placement, one.train)
                evaluation += one.vectors(placement, one.evaluated())
            priced.append(Priced(quick, start, kernel))
    linearised = replace(
        scene.linearised,
        train=replace(scene.linearised.train, first_order=tuple(train)),
        evaluation=replace(scene.linearised.evaluation, first_order=tuple(evaluation)),
    )
    return Others(tuple(priced), linearised, _notes(scene))


_Scored = tuple["_Pass", Placement, Quick, Array]


def _groups(placements: Sequence[Placement]) -> list[list[Placement]]:
    """Placements that share a pass, the one that holds the modules of the others first."""
    if not placements[0].method.adds:
        return [[placement] for placement in placements]
    groups: list[list[Placement]] = []
    by_size = sorted(placements, key=lambda placement: -len(placement.modules))
    for placement in by_size:
        for group in groups:
            alike = placement.candidate is not None and group[0].candidate is not None
            alike = alike and placement.candidate.rank == group[0].candidate.rank  # type: ignore[union-attr]
            if alike and set(placement.modules) <= set(group[0].modules):
                group.append(placement)
                break
        else:
            groups.append([placement])
    return groups


def _counter(on_progress: OnProgress, method: Method, count: int, scene: Scene) -> OnBatch:
    n, n_eval = scene.linearised.train.factors.n, scene.linearised.evaluation.factors.n
    total = count * n + min(count, METHOD_ROWS) * n_eval if method.simulated else count * min(n, FEW)
    done = 0

    def count_texts(more: int) -> None:
        nonlocal done
        done += more
        on_progress(f"texts through the model, {method.name}", done, total)

    return count_texts


class _Pass:
    """One pass: the features of every placement of a group, under the probe heads that the LoRA pass had."""

    def __init__(self, scene: Scene, group: Sequence[Placement], on_batch: OnBatch, *, evaluates: bool) -> None:
        self.scene, self.group, self.method, self.on_batch = scene, group, group[0].method, on_batch
        plan = self._plan(None)
        self.layout = plan.adapted.layout
        n = scene.linearised.train.factors.n
        self.n = n if self.method.simulated else min(n, FEW)
        self.train = join_features(_train_batches(plan, self._probes(), self.n, on_batch), self.n)
        self.evaluation = self._evaluate(plan) if evaluates and self.method.simulated else None
        self.sites = plan.adapted.sites
        self.device = plan.classifier.device

    def evaluated(self) -> TangentFeatures:
        """Features of the evaluation rows; taken now where they were not before, on the same adapter put on again."""
        if self.evaluation is None:
            self.evaluation = self._evaluate(self._plan(self.layout))
        return self.evaluation

    def _plan(self, layout: Layout | None) -> Plan:
        scene, config = self.scene, self.group[0].config
        plan = prepare(scene.classifier, scene.task, config, scene.plan.settings, layout=layout)
        return replace(plan, adapted=replace(plan.adapted, head={}))

    def _probes(self) -> CrossFitted:
        probes = self.scene.linearised.probes
        assert probes is not None
        return probes

    def _evaluate(self, plan: Plan) -> TangentFeatures:
        assert plan.evaluation is not None
        with installed(head_modules(plan.placed), self._probes().whole):
            stream = stream_batches(plan, plan.evaluation, on_batch=self.on_batch)
            parts = ((batch.rows, batch_features(plan.adapted, batch, plan.reduction)) for batch in stream)
            return join_features(parts, len(plan.evaluation.features))

    def members(self, placement: Placement) -> list[int]:
        """Positions of a placement's modules among the sites of the pass; all, where it has a pass of its own."""
        if len(self.group) == 1:
            return list(range(len(self.sites)))
        wanted = set(placement.modules)
        return [index for index, site in enumerate(self.sites) if site.name in wanted]

    def kernels(self) -> list[Array]:
        """Kernels of the placements between the first samples."""
        features = first_rows(self.train, min(SAMPLES, self.n))
        features = replace(features, reduction=features.reduction.summed())
        blocks = tangent_kernel(features, average=True).blocks[:, 0, 0]
        return [blocks[self.members(placement)].sum(axis=0) for placement in self.group]

    def quick(self, placement: Placement, score: float) -> Quick:
        """What is listed of a placement."""
        everything = Candidate(tuple(range(len(self.scene.linearised.sites))), 1)
        return Quick(
            placement.candidate or everything,
            placement.name,
            sum(self.sites[index].n_parameters for index in self.members(placement)),
            score,
            method=self.method.name,
            config=placement.config,
            modules=placement.modules,
        )

    def start(self, placement: Placement, position: int) -> Start:
        """The adapter before training; its features will stand at `position` and after."""
        begin = Start((), (), ())
        if self.method.name == "dora" and placement.candidate is not None:
            begin = self.scene.linearised.start(placement.candidate.sites, placement.candidate.rank)
        widths = [int(v.shape[2]) for v in self.vectors(placement, self.train)]
        parts = (
            # from zero: weight decay, if there is any, pulls towards the start
            FirstOrder(position + index, torch.zeros(width, device=self.device))
            for index, width in enumerate(widths)
        )
        return replace(begin, first_order=tuple(parts))

    def vectors(self, placement: Placement, features: TangentFeatures) -> list[Tensor]:
        """Features of what a placement trains beside A and B, module by module."""
        of_sites = [features.v[index] for index in self.members(placement)]
        return [v for v in of_sites if v is not None]


def _train_batches(
    plan: Plan, probes: CrossFitted, n: int, on_batch: OnBatch
) -> Iterator[tuple[Tensor, TangentFeatures]]:
    """Features of the first n training rows, each under the probe that has not seen it."""
    modules, folds = head_modules(plan.placed), [fold[fold < n] for fold in probes.folds]
    for number, batch in stream_groups(plan, plan.train, folds, on_batch=on_batch):
        with installed(modules, probes.heads[number]):
            yield batch.rows, batch_features(plan.adapted, batch, plan.reduction)


def _score(passes: Sequence[_Pass]) -> list[_Scored]:
    """Score all placements of one method, of which the passes have as many samples."""
    first, kernels = passes[0], [kernel for one in passes for kernel in one.kernels()]
    sample = first_examples(first.scene.linearised.train, min(SAMPLES, first.n))
    outputs, targets = sample.factors.logits.double().cpu().numpy(), sample.targets.cpu().numpy()
    scores = kernel_scores(np.stack(kernels), sample.objective.residual(outputs, targets))
    placements = [(one, placement) for one in passes for placement in one.group]
    return [
        (one, placement, one.quick(placement, float(score)), kernel)
        for (one, placement), score, kernel in zip(placements, scores, kernels, strict=True)
    ]


def _best(scored: Sequence[_Scored], settings: RankSettings) -> list[_Scored]:
    """The best placements of one method within the budget."""
    return [scored[at] for at in best_of_method([entry[2] for entry in scored], settings.budget)]


def _notes(scene: Scene) -> tuple[str, ...]:
    methods = [placements[0].method for placements in scene.placements]
    simulated = [method.name for method in methods if method.simulated]
    others = [method.name for method in methods if not method.simulated]
    notes = []
    if simulated:
        notes.append(
            f"{', '.join(simulated)}: simulated to first order, at the learning rate that is given; two finished runs "
            "of each were checked, too few for a level: read the order."
        )
    if others:
        notes.append(
            f"{', '.join(others)}: each placement priced by a pass of its own on {FEW} samples, by the quick score "
            f"alone; {told_by_trials(scene.settings.spend)}."
        )
    return tuple(notes)
