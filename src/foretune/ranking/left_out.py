"""What a ranking leaves out: by itself what cannot be adapted, saying so, and what the user excludes."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from foretune.errors import PlacementError
from foretune.models.adapted import AdaptedModel
from foretune.models.linear_modules import beside_experts, fused_experts, linear_names
from foretune.models.sites import Site, kinds_in_words
from foretune.problem import Plan
from foretune.ranking.candidates import Candidate, enumerate_candidates
from foretune.settings.commands import Search


def leave_out(plan: Plan, wanted: Search) -> tuple[Plan, tuple[str, ...]]:
    """Take modules out of a plan that no adapter can be put on.

    Args:
        plan: Plan over all linear modules.
        wanted: Which adapters to choose from.

    Returns:
        The plan without modules that no output depends on, and without those too narrow for the ranks where few are
        and none was asked for (a mixture's gates); and what to say of what was left out.

    Raises:
        PlacementError: If none is left.
    """
    adapted, notes = leave_out_modules(plan.adapted, plan.classifier.model, wanted)
    return replace(plan, adapted=adapted), notes


def leave_out_modules(adapted: AdaptedModel, base: nn.Module, wanted: Search) -> tuple[AdaptedModel, tuple[str, ...]]:
    """Take modules out of a placed model that no adapter can be put on.

    Args:
        adapted: Adapters on all linear modules.
        base: The model that they were read from.
        wanted: Which adapters to choose from.

    Returns:
        The same without modules that no output depends on, where that is known, and without those too narrow for the
        ranks where few are and none was asked for; and what to say of what was left out.

    Raises:
        PlacementError: If none is left.
    """
    layout = adapted.layout
    rank = max(wanted.ranks) if wanted.equal_size is None else 1  # each placement gets a rank that its modules carry
    names = linear_names(base)
    idle = [] if layout is None else [name for name in layout.idle if name in names]
    rest = [site for site in adapted.sites if site.name not in idle]
    narrow = [site.name for site in rest if min(site.d_in, site.d_out) < rank]
    if 2 * len(narrow) >= len(rest) or wanted.target_modules is not None:
        narrow = []
    adapters = tuple(adapter for adapter in adapted.adapters if adapter.site.name not in {*idle, *narrow})
    if not adapters:
        raise PlacementError("the outputs depend on no linear module: there is nothing to adapt")
    return replace(adapted, adapters=adapters), _notes(adapted, base, idle, narrow)


def list_candidates(sites: Sequence[Site], wanted: Search) -> tuple[Candidate, ...]:
    """List the placements of the modules that are not excluded.

    Args:
        sites: Every module that can be adapted.
        wanted: Which of them, and at which ranks.

    Returns:
        Candidates, by the positions of their modules among all; of equal sizes all of rank 1, which is not their own.

    Raises:
        PlacementError: If an excluded module does not exist, or none is left.
    """
    left = list(range(len(sites)))
    for name in wanted.exclude_modules or ():
        out = [index for index in left if f".{sites[index].name}".endswith(f".{name}")]
        if not any(f".{site.name}".endswith(f".{name}") for site in sites):
            kinds = ", ".join(sorted({site.kind.rsplit(".", 1)[-1] for site in sites}))
            raise PlacementError(f"excluded module {name!r} matches nothing: the model has {kinds}")
        left = [index for index in left if index not in out]
    if not left:
        raise PlacementError("exclude_modules leaves no module to adapt: exclude fewer")
    kinds_wanted = None if wanted.target_modules is None else [wanted.target_modules]
    listed = enumerate_candidates(
        [sites[index] for index in left],
        kinds=kinds_wanted,
        layers=wanted.layers,
        ranks=wanted.ranks if wanted.equal_size is None else (1,),
    )
    return tuple(Candidate(tuple(left[at] for at in entry.sites), entry.rank) for entry in listed)


def _notes(adapted: AdaptedModel, base: nn.Module, idle: Sequence[str], narrow: Sequence[str]) -> tuple[str, ...]:
    """What was left out by itself, and what makes the pass slow."""
    layout, experts = adapted.layout, fused_experts(base)
    beside = [name for name in linear_names(base) if name not in beside_experts(base)]
    singly = () if layout is None else layout.singly
    reasons = [
        ("no output depends on it", idle),
        ("narrower than the rank", narrow),
        ("experts in one tensor are no linear modules", experts),
        ("peft takes it for a part of the experts", beside),
    ]
    notes = [f"Left out: {kinds_in_words(names)} ({why})." for why, names in reasons if names]
    if singly:
        notes.append(
            f"Texts went through the model one at a time, which is slower: {kinds_in_words(singly)} sees several texts "
            "mixed, or what all texts share."
        )
    return tuple(notes)
