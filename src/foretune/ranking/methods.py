"""Adapter methods beside LoRA in a ranking: which placements of each are priced, and peft's configuration of them.

The sizes are those that peft starts from, but where `ranks` sets them.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd

from peft import (
    AdaLoraConfig,
    BeftConfig,
    BOFTConfig,
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VBLoRAConfig,
    VeraConfig,
)
from torch import nn

from foretune.errors import PlacementError
from foretune.models.head_parts import head_parts, in_head
from foretune.models.sites import Site
from foretune.ranking.adapter import spell_targets
from foretune.ranking.candidates import Candidate, label
from foretune.ranking.finalists import RANKED_METHODS
from foretune.settings.groups import MethodName
from foretune.settings.spend import parse_spend

VIRTUAL_TOKENS = 20  # of the methods that put some before the text
BLOCK = 32  # numbers that OFT turns together, peft's own
BUTTERFLY = 4  # and BOFT, peft's own
VECTOR = 256  # numbers of a vector of VB-LoRA's bank, peft's own


@dataclass(frozen=True)
class Method:
    """An adapter method.

    Attributes:
        name: As in `--methods`.
        on: What it sits on: linear modules, norms, or the whole model.
        adds: Whether its features of one module are the same in every placement, so that one pass prices all of them.
        simulated: Whether its run is simulated.
    """

    name: MethodName
    on: str = "linear"
    adds: bool = False
    simulated: bool = False

    @property
    def ranked(self) -> bool:
        """Whether `ranks` sets its size."""
        return self.name in RANKED_METHODS


METHODS: Mapping[MethodName, Method] = {
    method.name: method
    for method in (
        Method("lora", adds=True, simulated=True),
        Method("dora", adds=True, simulated=True),
        Method("ia3", adds=True, simulated=True),
        Method("bitfit", adds=True, simulated=True),
        Method("ln", on="norms", simulated=True),
        Method("vera", simulated=True),
        Method("adalora", simulated=True),
        Method("loha"),
        Method("lokr"),
        Method("oft"),
        Method("boft"),
        Method("fourierft"),
        Method("vblora"),
        Method("prompt", on="model"),
        Method("prefix", on="model"),
        Method("ptuning", on="model"),
    )
}


@dataclass(frozen=True)
class Placement:
    """A placement of a method that is no LoRA.

    Attributes:
        method: The method.
        name: For people.
        config: peft's configuration.
        candidate: Its linear modules, and its rank or 1; None where it sits on others.
        modules: Names of the modules that it sits on; empty for the whole model.
    """

    method: Method
    name: str
    config: PeftConfig
    candidate: Candidate | None
    modules: tuple[str, ...]


def placements_of(
    method: Method, candidates: Sequence[Candidate], sites: Sequence[Site], template: LoraConfig, model: nn.Module
) -> tuple[Placement, ...]:
    """List the placements of a method that are priced.

    Args:
        method: The method.
        candidates: LoRA placements that the user leaves to choose from.
        sites: Every linear module that can be adapted.
        template: peft's configuration of LoRA on all of them: task, α, rank stabilisation and head.
        model: The model without adapters.

    Returns:
        Of methods on linear modules those groups of several module kinds over all layers that are among the candidates
        (all, attention, query and value, feed-forward), or every single kind where there is no group; of others one.

    Raises:
        PlacementError: If the model has nothing that the method sits on.
    """
    if method.on == "model":
        return (Placement(method, _named(method, "whole model"), _of_model(method, template, model), None, ()),)
    names = tuple(name for name, _ in model.named_modules() if name)
    if method.on == "norms":
        norms = _norms(model)
        if not norms:
            raise PlacementError(f"methods = {method.name}: {type(model).__name__} has no norms to train, leave it out")
        config = LNTuningConfig(task_type=template.task_type, target_modules=list(norms))
        return (Placement(method, _named(method, f"{len(norms)} norms"), config, None, norms),)
    whole = _whole(candidates, sites)
    if not method.ranked:
        whole = list(dict.fromkeys(Candidate(candidate.sites, 1) for candidate in whole))
    listed = []
    for candidate in whole:
        members = [sites[position] for position in candidate.sites]
        config = spell_targets(_CONFIGS[method.name](members, candidate.rank, template), members, sites, names)
        if isinstance(config, IA3Config):
            config = _with_feedforward(config, members)
        words = label(candidate, sites)
        words = words if method.ranked else words.removesuffix(f" · r {candidate.rank}")
        modules = tuple(site.name for site in members)
        listed.append(Placement(method, _named(method, words), config, candidate, modules))
    return tuple(listed)


def _named(method: Method, words: str) -> str:
    return f"{method.name}: {words}"


def _whole(candidates: Sequence[Candidate], sites: Sequence[Site]) -> list[Candidate]:
    """Whole module kinds: groups of several, or single ones where there is no group."""
    counts: dict[str, int] = {}
    for site in sites:
        counts[site.kind] = counts.get(site.kind, 0) + 1
    whole = [
        candidate
        for candidate in candidates
        if len(candidate.sites) == sum(counts[kind] for kind in {sites[at].kind for at in candidate.sites})
    ]
    several = [candidate for candidate in whole if len({sites[at].kind for at in candidate.sites}) > 1]
    return several or whole or list(candidates)


def _norms(model: nn.Module) -> tuple[str, ...]:
    parts = head_parts(model)
    return tuple(
        name
        for name, module in model.named_modules()
        if type(module).__name__.endswith(("LayerNorm", "RMSNorm")) and not in_head(name, parts)
    )


def is_attention(kind: str) -> bool:
    """Tell the modules of attention by their path.

    Args:
        kind: Path below the layer.

    Returns:
        Whether `attention` or `attn` is in it.
    """
    return "attention" in kind.lower() or "attn" in kind.lower()


def _with_feedforward(config: IA3Config, members: Sequence[Site]) -> IA3Config:
    """(IA)³ scales the inputs of feed-forward modules, and the outputs of others."""
    outside = [site.name for site in members if not is_attention(site.kind)]
    targets = [str(target) for target in config.target_modules or ()]
    meant = [target for target in targets if any(f".{name}".endswith(f".{target}") for name in outside)]
    config.feedforward_modules = set(meant)
    return config


def _widths(members: Sequence[Site]) -> int:
    """Largest number that divides all widths."""
    divisor = 0
    for site in members:
        divisor = gcd(divisor, site.d_in, site.d_out)
    return divisor


def _dividing(width: int, most: int) -> int:
    """Largest divisor of a width that is not above some number."""
    return next(size for size in range(min(most, width), 0, -1) if width % size == 0)


def _dora(_: Sequence[Site], rank: int, template: LoraConfig) -> PeftConfig:
    config = copy.deepcopy(template)
    config.r, config.use_dora = rank, True
    config.rank_pattern, config.alpha_pattern, config.exclude_modules = {}, {}, None
    return config


def _adalora(_: Sequence[Site], rank: int, template: LoraConfig) -> PeftConfig:
    # half as many singular values again as are left at the end, as peft's own 12 and 8
    return AdaLoraConfig(
        task_type=template.task_type,
        init_r=max(rank + 1, 3 * rank // 2),
        target_r=rank,
        lora_alpha=int(template.lora_alpha),
        total_step=1,  # that of a run, once it is known
    )


def _loha(_: Sequence[Site], rank: int, template: LoraConfig) -> PeftConfig:
    return LoHaConfig(task_type=template.task_type, r=rank, alpha=int(template.lora_alpha))


def _lokr(_: Sequence[Site], rank: int, template: LoraConfig) -> PeftConfig:
    return LoKrConfig(task_type=template.task_type, r=rank, alpha=int(template.lora_alpha))


_CONFIGS: Mapping[str, Callable[[Sequence[Site], int, LoraConfig], PeftConfig]] = {
    "dora": _dora,
    "ia3": lambda _, __, template: IA3Config(task_type=template.task_type),
    "bitfit": lambda _, __, template: BeftConfig(task_type=template.task_type),
    "vera": lambda _, __, template: VeraConfig(task_type=template.task_type),
    "adalora": _adalora,
    "loha": _loha,
    "lokr": _lokr,
    "oft": lambda members, _, template: OFTConfig(
        task_type=template.task_type, r=0, oft_block_size=_dividing(_widths(members), BLOCK)
    ),
    "boft": lambda members, _, template: BOFTConfig(
        task_type=template.task_type, boft_block_size=_dividing(_widths(members), BUTTERFLY)
    ),
    "fourierft": lambda _, __, template: FourierFTConfig(task_type=template.task_type),
    "vblora": lambda members, _, template: VBLoRAConfig(
        task_type=template.task_type, vector_length=_dividing(_widths(members), VECTOR)
    ),
}


def _of_model(method: Method, template: LoraConfig, model: nn.Module) -> PeftConfig:
    task = template.task_type
    if method.name == "prompt":
        return PromptTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL_TOKENS)
    if method.name == "prefix":
        return PrefixTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL_TOKENS)
    hidden = int(getattr(model.config, "hidden_size", 0) or 0) or None
    return PromptEncoderConfig(task_type=task, num_virtual_tokens=VIRTUAL_TOKENS, encoder_hidden_size=hidden)


def with_steps(config: PeftConfig | None, steps: int) -> PeftConfig | None:
    """Tell a configuration how long its run is, where it depends on it.

    Args:
        config: peft's configuration; not changed.
        steps: Steps of the run.

    Returns:
        The same, or of AdaLoRA one whose ranks fall over the middle of the run: its first tenth trains all of them, and
        its last third those that are left.
    """
    if not isinstance(config, AdaLoraConfig):
        return config
    changed = copy.deepcopy(config)
    changed.total_step = max(1, steps)
    changed.tinit, changed.tfinal = steps // 10, steps // 3
    return changed


def in_proportion(config: PeftConfig | None, steps: int, whole: int) -> PeftConfig | None:
    """Give a short run the course of a whole one, where a configuration depends on how long its run is.

    Args:
        config: peft's configuration of the whole run; not changed.
        steps: Steps of the short run.
        whole: Steps of the whole run.

    Returns:
        The same, or of AdaLoRA one whose ranks fall over the same shares of the steps.
    """
    if not isinstance(config, AdaLoraConfig) or steps == whole:
        return config
    changed = copy.deepcopy(config)
    changed.total_step = max(1, int(config.total_step or whole) * steps // whole)
    changed.tinit, changed.tfinal = config.tinit * steps // whole, config.tfinal * steps // whole
    return changed


def told_by_trials(spend: str) -> str:
    """Say where rows without a simulated run stand.

    Args:
        spend: What may be spent on trials.

    Returns:
        The end of a sentence.
    """
    if parse_spend(spend) > 0:
        return "trials tell their order, what has none stands last"
    return "they stand last; trials (--spend) tell more"
