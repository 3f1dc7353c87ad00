"""The score of one adapter configuration: kernel, spectrum, bounds and kernel regression, before any training.

`prepare` (plan) says what will be done, `measure` runs the passes, `assess` does the numbers; `score` is the
three in a row. Nothing here loads or writes a file.
"""

import dataclasses
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from peft import PeftConfig

from foretune.arrays import Array
from foretune.errors import ConfigError
from foretune.language.rows import LanguageTask
from foretune.models.adapted import describe_placement
from foretune.models.classifier import own_classifier
from foretune.models.language_model import own_language_model
from foretune.ntk.clock import KernelSeconds
from foretune.ntk.spectrum import Spectrum
from foretune.problem import OnBatch, Plan, describe, prepare
from foretune.processes.group import HandedOver
from foretune.report.provenance import versions
from foretune.scoring.assess import Assessment, assess, head_features, spectrum_alone
from foretune.scoring.passes import Measurement, measure
from foretune.scoring.sequence_plan import prepare_sequence_score
from foretune.scoring.sequence_score import SequenceScore, run_sequence_score
from foretune.scoring.spread import summarise_values
from foretune.scoring.tiling import Tiling, new_array, plan_tiles, scratch_of
from foretune.settings.commands import ScoreSettings
from foretune.tasks.load import Task

SCHEMA = 1


@dataclass(frozen=True)
class ScoreResult:
    """All that a score found.

    Attributes:
        plan: What was done.
        measurement: Kernels and outputs of the first draw of samples.
        draws: Assessments of the first draw of samples, one for each draw of A; the first is the adapter's own.
        mean: Spectrum of the mean kernel over the draws of A.
        repeats: Assessments of the adapter's own A, one for each draw of samples.
        head: Assessment of the trained head's kernel alone, None where no head trains.
        seconds: Of `load`, `kernel`, its parts `passes`, `products` and `files`, `spectrum`, `kernel_regression` and
            `total`, summed over repeats.
    """

    plan: Plan
    measurement: Measurement
    draws: tuple[Assessment, ...]
    mean: Spectrum
    repeats: tuple[Assessment, ...]
    head: Assessment | None
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Lay the result out as in `result.json` (docs/result.md).

        Returns:
            JSON-ready values.
        """
        return _to_dict(self)


def _draw_assessments(plan: Plan, measurement: Measurement, draws: Iterable[int]) -> tuple[Assessment, ...]:
    k_eval = measurement.k_eval_train
    return tuple(
        assess(
            measurement.k_train_train[draw],
            None if k_eval is None else k_eval[draw],
            measurement,
            plan,
        )
        for draw in draws
    )


def run_score(
    plan: Plan, *, seconds_load: float = 0.0, on_batch: OnBatch | None = None, output: Path | None = None
) -> ScoreResult:
    """Carry out a plan, in tiles of samples where they do not fit into the memory.

    Args:
        plan: From `prepare`.
        seconds_load: Time that loading took, for the record.
        on_batch: Called with the number of examples after each batch.
        output: Folder of the run, beside which a score by tiles keeps its files unless its settings name a folder.

    Returns:
        The result.

    Raises:
        ConfigError: If the memory is too little for a tile, or for several processes, or a sketch too wide.
        StoreError: If the files of a score by tiles cannot be kept.
        HandedOver: In all processes but the first.
    """
    tiling = plan_tiles(plan, output)
    if tiling is not None and plan.processes.world > 1:
        if plan.settings.sketch is not None:
            raise ConfigError(
                f"sketch = {plan.settings.sketch:,}: several processes keep their features whole; leave it out, or "
                "start one process"
            )
        raise ConfigError(
            f"{plan.settings.samples:,} samples do not fit into the memory at once, and several processes keep all of "
            "theirs: raise --memory, or start one process"
        )
    with scratch_of(tiling):
        return _run_score(plan, tiling, seconds_load, on_batch)


def _run_score(plan: Plan, tiling: Tiling | None, seconds_load: float, on_batch: OnBatch | None) -> ScoreResult:
    start = time.perf_counter()
    if not plan.processes.is_main:
        for repeat in range(plan.settings.repeats):
            with plan.processes.until_handed_over():
                measure(plan, repeat=repeat)
        raise HandedOver
    first = measure(plan, on_batch=on_batch, tiling=tiling)
    measured = [first]
    draws = _draw_assessments(plan, first, range(plan.adapted.draws))
    repeats = [draws[0]]
    for repeat in range(1, plan.settings.repeats):
        measured.append(measure(plan, repeat=repeat, on_batch=on_batch, tiling=tiling))
        repeats.extend(_draw_assessments(plan, measured[-1], [0]))
    mean = spectrum_alone(_mean_kernel(first.k_train_train, tiling), first, plan)
    head = None
    if first.head_train_train is not None:
        head = assess(first.head_train_train, first.head_eval_train, first, plan, head_features(plan))
    assessed = [*draws, *repeats[1:], *([] if head is None else [head])]
    seconds = {
        "load": seconds_load,
        "kernel": sum(m.seconds_kernel for m in measured),
        **dataclasses.asdict(sum((m.parts for m in measured), KernelSeconds())),
        "spectrum": sum(a.seconds_spectrum for a in assessed),
        "kernel_regression": sum(m.seconds_evaluation for m in measured) + sum(a.seconds_regression for a in assessed),
        "total": seconds_load + time.perf_counter() - start,
    }
    return ScoreResult(plan, first, draws, mean, tuple(repeats), head, seconds)


def _mean_kernel(kernels: Array, tiling: Tiling | None) -> Array:
    """The mean over the draws of A, where the kernels themselves are."""
    if tiling is None:
        return np.asarray(kernels.mean(axis=0))
    if len(kernels) == 1:
        return np.asanyarray(kernels[0])
    return np.asarray(np.mean(kernels, axis=0, out=new_array(tiling, "mean", kernels.shape[1:])))


@overload
def score(
    model: Any, tokenizer: Any, config: PeftConfig | None, task: Task, *, settings: ScoreSettings | None = None
) -> ScoreResult: ...


@overload
def score(
    model: Any, tokenizer: Any, config: PeftConfig | None, task: LanguageTask, *, settings: ScoreSettings | None = None
) -> SequenceScore: ...


def score(
    model: Any,
    tokenizer: Any,
    config: PeftConfig | None,
    task: Task | LanguageTask,
    *,
    settings: ScoreSettings | None = None,
) -> ScoreResult | SequenceScore:
    """Score an adapter of any method of peft's on the user's own model and data; the model is left as it is.

    Args:
        model: transformers sequence classifier in eval mode, or for language a language model; or a peft model of
            one with its adapter.
        tokenizer: Its tokenizer.
        config: peft's configuration; None if the model is a peft model already, or a plain one whose layers train whole
            (`requires_grad`).
        task: Data, from `load_task` or `task_from_datasets`, or `load_language_task` or `language_task_from_datasets`.
        settings: Settings; None takes the defaults.

    Returns:
        The result: of language a `SequenceScore`, which has kernels and spectra alone.
    """
    if isinstance(task, LanguageTask):
        language = own_language_model(model, tokenizer, bare=config is not None)
        return run_sequence_score(prepare_sequence_score(language, task, config, settings or ScoreSettings()))
    classifier = own_classifier(model, tokenizer, task.objective, bare=config is not None)
    return run_score(prepare(classifier, task, config, settings or ScoreSettings()))


def _spread(assessments: tuple[Assessment, ...]) -> dict[str, Any] | None:
    if len(assessments) < 2:
        return None
    kernel = ("lambda_max", "lambda_min", "condition_number", "trace", "effective_dimension", "alignment")
    metric = assessments[0].kernel_regression.metric
    predicted = [a.kernel_regression.to_dict() for a in assessments]
    names = ("train_loss", "eval_loss", f"eval_{metric}", "loo_loss", f"loo_{metric}")
    spread = {name: summarise_values(getattr(a.kernel, name) for a in assessments) for name in kernel}
    spread["empirical_risk"] = summarise_values(a.bounds.empirical_risk for a in assessments)
    return spread | {name: summarise_values(content[name] for content in predicted) for name in names}


def _sketch(result: ScoreResult) -> dict[str, Any] | None:
    if result.measurement.sketch_error is None:
        return None
    return {"width": result.plan.settings.sketch, "relative_error": result.measurement.sketch_error[0]}


def _to_dict(result: ScoreResult) -> dict[str, Any]:
    plan, own = result.plan, result.draws[0]
    settings, sites = plan.settings, plan.adapted.sites
    facts = describe(plan)
    head = None
    if result.head is not None:
        head = {
            "kernel": dataclasses.asdict(result.head.kernel),
            "kernel_regression": result.head.kernel_regression.to_dict(),
        }
    return {
        "schema": SCHEMA,
        "model": plan.classifier.source,
        "dataset": plan.task.source,
        "placement": {
            **describe_placement(getattr(plan.placed, "active_peft_config", None), sites),
            "trainable_parameters": sum(site.n_parameters for site in sites),
            "head_parameters": facts["head"]["parameters"],
            "sites": [
                {"name": site.name, "rank": site.rank, "scaling": site.scaling, "trace": trace}
                for site, trace in zip(sites, result.measurement.site_traces, strict=True)
            ],
        },
        "n": settings.samples,
        "output": plan.reduction.name,
        "seed": settings.seed,
        "details": facts,
        "kernel": dataclasses.asdict(own.kernel),
        "kernel_centred": dataclasses.asdict(own.centred),
        "kernel_mean_over_a": dataclasses.asdict(result.mean),
        "spread": {
            "draws_of_a": _spread(result.draws),
            "repeats": _spread(result.repeats),
            "heads": {"trace": summarise_values(result.measurement.head_traces)},
        },
        "head_kernel": head,
        "bounds": dataclasses.asdict(own.bounds),
        "kernel_regression": own.kernel_regression.to_dict(),
        "sketch": _sketch(result),
        "seconds": dict(result.seconds),
        "versions": versions(),
        "settings": dataclasses.asdict(settings),
    }
