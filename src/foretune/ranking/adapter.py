"""peft's `adapter_config.json` of a candidate."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from foretune.errors import PlacementError
from foretune.models.adapter_file import save_adapter
from foretune.models.output_layer import CLASSIFIER, TASK_TYPES
from foretune.models.sites import Site
from foretune.ranking.candidates import Candidate, short_kinds
from foretune.report.store import make_folder, write_whole
from foretune.settings.commands import ADAPTER_FILE


def candidate_config(
    candidate: Candidate,
    sites: Sequence[Site],
    template: LoraConfig,
    model: nn.Module | Sequence[str],
    *,
    alpha: float | None = None,
) -> LoraConfig:
    """Make peft's configuration of a candidate.

    `target_modules` are module kinds, with `layers_to_transform` where they are not in all layers, if peft then
    matches the candidate's modules and no others of this model (`output.dense` alone would match BERT's
    `attention.output.dense` too); else the full paths of the modules; else, if one path ends in another, a regular
    expression of the paths.

    Args:
        candidate: Placement.
        sites: Every module that can be adapted, as the candidate counts them.
        template: What else the adapters have: task, α, initialisation, rank stabilisation, dropout, …; not changed.
        model: The model that it is for, with adapters or without, not changed; or the names of its modules.
        alpha: α instead of the template's, which stays whatever the rank.

    Returns:
        peft's configuration of a sequence classifier, or of a language model where the template is one's; every module
        has the candidate's rank.

    Raises:
        PlacementError: If the model lacks one of the modules.
    """
    modules = module_names(model) if isinstance(model, nn.Module) else model
    members = [sites[position] for position in candidate.sites]
    names = {site.name for site in members}
    missing = sorted(names.difference(modules))
    if missing:
        raise PlacementError(f"the model has no module {missing[0]!r}: give the model that the sites were read from")
    config = copy.deepcopy(template)
    of_language = next((name for name in TASK_TYPES.values() if name == template.task_type), CLASSIFIER)
    config.task_type, config.r = of_language, candidate.rank
    config.lora_alpha = config.lora_alpha if alpha is None else alpha
    config.rank_pattern, config.alpha_pattern = {}, {}
    config.exclude_modules = config.layers_pattern = None
    config.base_model_name_or_path, config.inference_mode = None, False
    return spell_targets(config, members, sites, modules)


AnyConfig = TypeVar("AnyConfig", bound=PeftConfig)


def spell_targets(
    config: AnyConfig, members: Sequence[Site], sites: Sequence[Site], modules: Sequence[str]
) -> AnyConfig:
    """Let a configuration mean certain modules and no others.

    Args:
        config: peft's configuration of a method with target modules; changed.
        members: The modules.
        sites: Every module that can be adapted.
        modules: Names of all modules of the model.

    Returns:
        The configuration, with the shortest of the spellings that `candidate_config` lists.
    """
    names, layered = {site.name for site in members}, hasattr(config, "layers_to_transform")
    for targets, layers in _spellings(members, sites):
        if layers is not None and not layered:
            continue
        config.target_modules = targets
        if layered:
            config.layers_to_transform = layers
        if {name for name in modules if check_target_module_exists(config, name)} == names:
            return config
    # a path that another one ends in
    config.target_modules = "|".join(map(re.escape, sorted(names)))
    if layered:
        config.layers_to_transform = None
    return config


def module_names(model: nn.Module) -> tuple[str, ...]:
    """List the modules of a model, all that a candidate's configuration depends on.

    Args:
        model: The model, with adapters or without.

    Returns:
        Paths in the model without adapters.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return tuple(name for name, _ in base.named_modules() if name)


def _spellings(members: Sequence[Site], sites: Sequence[Site]) -> list[tuple[list[str], list[int] | None]]:
    # target modules and layers that may mean these modules, the shortest first; lists keep their order in the file
    kinds = list(dict.fromkeys(site.kind for site in members))
    layers = sorted({site.layer for site in members if site.layer is not None})
    short = short_kinds(sites)
    patterns: list[tuple[list[str], list[int] | None]] = []
    if not any(part.isdecimal() for kind in kinds for part in kind.split(".")):  # versions of peft differ on these
        for targets in ([short[kind] for kind in kinds], kinds):
            patterns += [(targets, None), (targets, layers)] if layers else [(targets, None)]
    return [*patterns, ([site.name for site in members], None)]


def write_adapter_config(
    candidate: Candidate,
    sites: Sequence[Site],
    template: LoraConfig,
    model: nn.Module | Sequence[str],
    folder: Path,
    *,
    alpha: float | None = None,
) -> Path:
    """Write the `adapter_config.json` of a candidate, whole or not at all.

    `LoraConfig.from_pretrained(folder)` and `adapter_from_file(folder)` read it.

    Args:
        candidate: Placement.
        sites: Every module that can be adapted, as the candidate counts them.
        template: What else the adapters have.
        model: The model that it is for, or the names of its modules.
        folder: Folder, made unless it is there.
        alpha: α instead of the template's.

    Returns:
        The file.
    """
    return write_config(candidate_config(candidate, sites, template, model, alpha=alpha), folder)


def write_config(config: PeftConfig, folder: Path) -> Path:
    """Write an `adapter_config.json`, whole or not at all.

    Args:
        config: peft's configuration.
        folder: Folder, made unless it is there.

    Returns:
        The file.
    """
    make_folder(folder)
    path = folder / ADAPTER_FILE
    write_whole(path, lambda temporary: save_adapter(config, temporary))
    return path
