"""What metrics are computed from: one pass over a data set's samples, and the placements that are to be judged."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from foretune.arrays import Array
from foretune.evaluation.weights import kappa_tune_scores, plop_scores
from foretune.forecasting.linear_model import Start
from foretune.forecasting.linearise import Linearised
from foretune.forecasting.simulated_runs import Ending
from foretune.models.classifier import batches
from foretune.problem import Plan
from foretune.ranking.candidates import Candidate
from foretune.ranking.module_kernels import module_kernels
from foretune.ranking.quick_score import Blocks, quick_scores

TEXTS = 64  # that PLoP looks at


@dataclass(frozen=True)
class MetricInputs:
    """One pass over the samples of a data set, and placements.

    Attributes:
        plan: Plan of the pass.
        survey: The pass.
        placements: Adapters before training, each a placement at a rank.
        head_alone: End of the simulated run of the head without an adapter.
        seed: Seed of metrics that draw.
    """

    plan: Plan
    survey: Linearised
    placements: Sequence[Start]
    head_alone: Ending
    seed: int

    @property
    def features(self) -> Array:
        """Inputs φ of the head's output layer on the n training samples, n × D."""
        return np.asarray(self.survey.train.factors.inputs.double().cpu().numpy())

    @property
    def labels(self) -> NDArray[np.int64]:
        """Classes of the n training samples."""
        return np.asarray(self.survey.train.labels)

    @property
    def n_classes(self) -> int:
        """Classes C."""
        return self.plan.task.objective.n_outputs

    @property
    def candidates(self) -> list[Candidate]:
        """The placements as a ranking writes them."""
        return [Candidate(start.sites, len(start.a[0])) for start in self.placements]

    @cached_property
    def blocks(self) -> Blocks:
        """Kernels of every module between the samples."""
        return module_kernels(self.survey, sorted({candidate.rank for candidate in self.candidates}))

    @cached_property
    def kernels(self) -> Array:
        """Kernel of each placement, (placements) × n × n."""
        return self.blocks.kernels(self.candidates)

    @property
    def slopes(self) -> Array:
        """Slopes of the loss in the outputs at the probe head, up to a factor; of two classes of their difference."""
        residual = self.blocks.residual
        return -residual[:, 1:] if self.plan.reduction.name == "margin" else -residual

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Base layers that peft wraps, by name."""
        return {adapter.site.name: _base_layer(adapter.module) for adapter in self.plan.adapted.adapters}


Compute = Callable[[MetricInputs], Sequence[float]]  # a value for each placement


def of_features(metric: Callable[..., float], *, seeded: bool = False) -> Compute:
    """Make a metric of a data set's features one of its placements, which share its value.

    Args:
        metric: Takes n × D features, n labels and the number of classes.
        seeded: Whether it takes a `seed` too.

    Returns:
        Computes it once for all placements.
    """

    def compute(inputs: MetricInputs) -> Sequence[float]:
        options = {"seed": inputs.seed} if seeded else {}
        return [metric(inputs.features, inputs.labels, inputs.n_classes, **options)] * len(inputs.placements)

    return compute


def of_kernel(metric: Callable[[Array, Array], float]) -> Compute:
    """Make a metric of a kernel one of placements.

    Args:
        metric: Takes the n × n kernel of a placement and the slopes of the loss, n × t.

    Returns:
        Computes it for the kernel of each placement.
    """

    def compute(inputs: MetricInputs) -> Sequence[float]:
        return [metric(kernel, inputs.slopes) for kernel in inputs.kernels]

    return compute


def quick_score(inputs: MetricInputs) -> Sequence[float]:
    """Score the placements as `foretune rank` does.

    Args:
        inputs: Pass and placements.

    Returns:
        Quick scores.
    """
    return [float(score) for score in quick_scores(inputs.blocks, inputs.candidates)]


def plop(inputs: MetricInputs) -> Sequence[float]:
    """Average PLoP over the modules of each placement.

    It looks at the first texts, without the positions that pad the shorter ones of a batch.

    Args:
        inputs: Pass and placements.

    Returns:
        Means.
    """
    plan = inputs.plan
    rows = list(range(min(TEXTS, len(plan.train.features))))
    latest: dict[str, Tensor] = {}

    def forward_all() -> None:
        with plan.adapted.forward():
            for batch in batches(plan.train, plan.classifier, batch_size=plan.settings.batch_size, rows=rows):
                latest.update(batch.inputs)
                plan.adapted.model(**batch.inputs)

    return _module_means(inputs, plop_scores(inputs.modules, forward_all, kept=lambda: latest.get("attention_mask")))


def kappa_tune(inputs: MetricInputs) -> Sequence[float]:
    """Average KappaTune's condition number over the modules of each placement.

    Args:
        inputs: Pass and placements.

    Returns:
        Means.
    """
    return _module_means(inputs, kappa_tune_scores(inputs.modules))


def head_alone_metric(inputs: MetricInputs) -> Sequence[float]:
    """Take the main metric of the simulated run of the head alone.

    Args:
        inputs: Pass and placements.

    Returns:
        The same for all placements.
    """
    return [inputs.head_alone.eval_metric] * len(inputs.placements)


def initial_metric(inputs: MetricInputs) -> Sequence[float]:
    """Take the main metric of the model as it is, under its own head.

    Args:
        inputs: Pass and placements.

    Returns:
        The same for all placements.
    """
    head, evaluation = inputs.survey.head, inputs.survey.evaluation
    logits = evaluation.factors.inputs.float() @ head.weight.float().T
    if head.bias is not None:
        logits = logits + head.bias.float()
    value = evaluation.objective.main(logits.cpu().numpy(), evaluation.targets.cpu().numpy())
    return [value] * len(inputs.placements)


def _module_means(inputs: MetricInputs, scores: Mapping[str, float]) -> list[float]:
    names = [site.name for site in inputs.survey.sites]
    return [float(np.mean([scores[names[site]] for site in start.sites])) for start in inputs.placements]


def _base_layer(module: Any) -> nn.Linear:
    base: nn.Linear = module.base_layer
    return base
