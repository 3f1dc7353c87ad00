"""Candidates: sets of modules with a rank, their names for people, and the budgets that they must fit."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from foretune.errors import PlacementError
from foretune.models.sites import Site

_QUERY = frozenset({"query", "q", "q_proj", "q_lin", "query_proj", "wq", "to_q"})
_VALUE = frozenset({"value", "v", "v_proj", "v_lin", "value_proj", "wv", "to_v"})


@dataclass(frozen=True)
class Candidate:
    """An adapter placement: which modules carry an adapter, all of one rank.

    Attributes:
        sites: Positions in the tuple of sites, ascending, each once.
        rank: Rank r of every adapter.
    """

    sites: tuple[int, ...]
    rank: int

    def __post_init__(self) -> None:
        """Sort the positions, drop repeated ones and check the ranges.

        Raises:
            PlacementError: If there is no position, one is negative, or the rank is below 1.
        """
        sites = tuple(sorted({int(position) for position in self.sites}))
        object.__setattr__(self, "sites", sites)
        object.__setattr__(self, "rank", int(self.rank))
        if not sites:
            raise PlacementError("candidate without modules: name at least one")
        if sites[0] < 0:
            raise PlacementError(f"candidate with site {sites[0]}: positions count from 0")
        if self.rank < 1:
            raise PlacementError(f"candidate of rank {self.rank}: must be at least 1")


def short_kinds(sites: Iterable[Site]) -> dict[str, str]:
    """Find for every module kind the shortest end of its path that no other kind ends in.

    Args:
        sites: Modules.

    Returns:
        Short name by kind, in the order of the sites; the kind itself where another kind ends in it.

    Example:
        >>> kinds = ("attention.self.query", "attention.output.dense", "output.dense")
        >>> list(short_kinds(Site(kind, 0, kind, 4, 4, 1, 1.0) for kind in kinds).values())
        ['query', 'attention.output.dense', 'output.dense']
    """
    kinds = list(dict.fromkeys(site.kind for site in sites))
    counts: dict[str, int] = {}
    for kind in kinds:
        for end in _ends(kind):
            counts[end] = counts.get(end, 0) + 1
    return {kind: next((end for end in _ends(kind) if counts[end] == 1), kind) for kind in kinds}


def _ends(kind: str) -> list[str]:
    # shortest first
    parts = kind.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


def label(candidate: Candidate, sites: Sequence[Site]) -> str:
    """Name a candidate for people: kinds, layers and rank, or every kind with its layers where that is no grid.

    Two candidates of the same sites have two names.

    Args:
        candidate: Placement.
        sites: Every module that can be adapted.

    Returns:
        For example `query, value · layers 0–5 · r 8`, `all modules · all layers · r 4` or
        `query 0, value 0 2 5 · r 8`.
    """
    members = [sites[position] for position in candidate.sites]
    rank = f"r {candidate.rank}"
    if len(members) == len(sites):
        return f"all modules · all layers · {rank}"
    short = short_kinds(sites)
    if all(site.layer is None for site in members):
        return f"{', '.join(_outside(members, short))} · {rank}"
    kinds = list(dict.fromkeys(site.kind for site in members))
    layers = sorted({site.layer for site in members if site.layer is not None})
    if any(site.layer is None for site in members) or len(members) < _grid_size(kinds, layers, sites):
        return f"{', '.join(_list_parts(members, sites, short))} · {rank}"
    every = len(members) == sum(site.layer in layers for site in sites)
    modules = "all modules" if every and len(kinds) > 1 else ", ".join(short[kind] for kind in kinds)
    all_layers = sorted({site.layer for site in sites if site.layer is not None})
    whole = layers == all_layers and modules != "all modules"  # "all modules · all layers" is every site
    return f"{modules} · {'all layers' if whole else _layers_in_words(layers)} · {rank}"


def _grid_size(kinds: Sequence[str], layers: Sequence[int], sites: Sequence[Site]) -> int:
    return sum(site.kind in kinds and site.layer in layers for site in sites)


def _layers_in_words(layers: Sequence[int]) -> str:
    return f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(_runs(layers))}"


def _runs(layers: Sequence[int]) -> list[str]:
    # 0 1 2 5 → 0–2, 5
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return [f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]


def _list_parts(members: Sequence[Site], sites: Sequence[Site], short: Mapping[str, str]) -> list[str]:
    # encoder and decoder can share a layer's number and a kind: such modules go by their names
    shared: dict[tuple[int | None, str], int] = {}
    for site in sites:
        shared[site.layer, site.kind] = shared.get((site.layer, site.kind), 0) + 1
    inside = [site for site in members if site.layer is not None]
    parts = []
    for kind in dict.fromkeys(site.kind for site in inside):
        of_kind = [site for site in inside if site.kind == kind]
        layers = sorted({site.layer for site in of_kind if site.layer is not None and shared[site.layer, kind] == 1})
        if layers:
            parts.append(f"{short[kind]} {' '.join(_runs(layers))}")
        parts += [site.name for site in of_kind if shared[site.layer, kind] > 1]
    return parts + _outside(members, short)


def _outside(members: Sequence[Site], short: Mapping[str, str]) -> list[str]:
    # outside the layers the kind is the whole name
    return [short[site.kind] for site in members if site.layer is None]


def enumerate_candidates(
    sites: Sequence[Site],
    *,
    kinds: Sequence[str | Sequence[str]] | None = None,
    layers: Sequence[int] | None = None,
    ranks: Sequence[int],
) -> tuple[Candidate, ...]:
    """List the placements that people choose from, at every rank.

    These are every single module; every module kind and every usual group of kinds (all, query with value, all of
    attention, all of the feed-forward block, and the groups that the user listed) over every contiguous range of
    layers; and all modules. Attention are the kinds with `attention` or `attn` in their path. Modules outside the
    layers (a pooler, say) come alone, in a listed group over all layers, and in all modules.

    Args:
        sites: Every module that can be adapted.
        kinds: Groups of module kinds, a name alone being a group of one; only their modules are taken, by the end
            of the kind, or all with `all-linear`. A whole kind and a short name as `label` writes it mean that
            kind only. None for all.
        layers: Numbers of the layers whose modules are taken; a range is then one of neighbours in this list.
            None for all layers and what lies outside them.
        ranks: Ranks.

    Returns:
        Candidates, each once: by rank, then in the order above.

    Raises:
        PlacementError: If a name or layer matches nothing, no module is left, or a rank is below 1 or above the
            width of a module.
    """
    groups = None if kinds is None else [_named(group, sites) for group in kinds]
    allowed = _allowed(sites, groups, layers)
    wanted = check_ranks(ranks, [sites[position] for position in allowed])
    placements: dict[tuple[int, ...], None] = {(position,): None for position in allowed}
    for kind_set in _kind_sets(sites, allowed, groups or []):
        placements.update(dict.fromkeys(_ranges(sites, allowed, kind_set)))
    for group in groups or []:
        whole = tuple(position for position in allowed if sites[position].kind in group)
        placements.update({whole: None} if whole else {})
    placements[tuple(allowed)] = None
    return tuple(Candidate(positions, rank) for rank in wanted for positions in placements)


def check_ranks(ranks: Sequence[int], sites: Sequence[Site]) -> list[int]:
    """Refuse ranks that a module cannot carry.

    Args:
        ranks: Ranks.
        sites: Modules that may carry them.

    Returns:
        The ranks, ascending, each once.

    Raises:
        PlacementError: If there is none, one is below 1, or one is above a module's min(d_in, d_out).
    """
    if not ranks:
        raise PlacementError("no rank to rank candidates of: name at least one, such as 8")
    wanted = sorted(set(ranks))
    if wanted[0] < 1:
        raise PlacementError(f"rank {wanted[0]}: must be at least 1")
    for site in sites:
        width = min(site.d_in, site.d_out)
        if wanted[-1] > width:
            raise PlacementError(
                f"rank {wanted[-1]} is above the width {width} of module {site.name!r} ({site.d_in} × {site.d_out}): "
                f"use {width} at most, or leave the module out"
            )
    return wanted


def _named(group: str | Sequence[str], sites: Sequence[Site]) -> set[str]:
    # kinds that the names of a group mean
    short = short_kinds(sites)
    by_name = {name: kind for kind, name in short.items()} | {kind: kind for kind in short}
    chosen: set[str] = set()
    for name in [group] if isinstance(group, str) else group:
        if name == "all-linear":
            chosen |= short.keys()
            continue
        one = by_name.get(name)
        meant = {kind for kind in short if kind.endswith("." + name)} if one is None else {one}
        if not meant:
            near = get_close_matches(name, list(by_name), n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise PlacementError(
                f"module kind {name!r} matches nothing{hint}: the model has {', '.join(short.values())}"
            )
        chosen |= meant
    return chosen


def _allowed(sites: Sequence[Site], groups: Sequence[set[str]] | None, layers: Sequence[int] | None) -> list[int]:
    existing = sorted({site.layer for site in sites if site.layer is not None})
    for layer in layers or []:
        if layer not in existing:
            span = f", {existing[0]} to {existing[-1]}" if existing else ""
            raise PlacementError(f"layer {layer} is out of range: the model has {len(existing)} layers{span}")
    taken = None if groups is None else {kind for group in groups for kind in group}
    allowed = [
        position
        for position, site in enumerate(sites)
        if (taken is None or site.kind in taken) and (layers is None or site.layer in layers)
    ]
    if not allowed:
        raise PlacementError(
            f"no module is left to place adapters on: {len(sites)} modules, module kinds "
            f"{'all' if taken is None else sorted(taken)}, layers {'all' if layers is None else list(layers)}: "
            "name others or leave the restriction out"
        )
    return allowed


def _kind_sets(sites: Sequence[Site], allowed: Sequence[int], groups: Sequence[set[str]]) -> list[frozenset[str]]:
    kinds = list(dict.fromkeys(sites[position].kind for position in allowed if sites[position].layer is not None))
    attention = [kind for kind in kinds if "attention" in kind.lower() or "attn" in kind.lower()]
    query = [kind for kind in attention if kind.rsplit(".", 1)[-1].lower() in _QUERY]
    value = [kind for kind in attention if kind.rsplit(".", 1)[-1].lower() in _VALUE]
    sets = [[kind] for kind in kinds]
    sets += [[*query, *value]] if query and value else []
    sets += [attention, [kind for kind in kinds if kind not in attention], kinds]
    sets += [[kind for kind in kinds if kind in group] for group in groups]
    return list(dict.fromkeys(frozenset(kinds) for kinds in sets if kinds))


def _ranges(sites: Sequence[Site], allowed: Sequence[int], group: frozenset[str]) -> list[tuple[int, ...]]:
    by_layer: dict[int, list[int]] = {}
    for position in allowed:
        layer = sites[position].layer
        if layer is not None:
            by_layer.setdefault(layer, [])
            if sites[position].kind in group:
                by_layer[layer].append(position)
    layers = sorted(by_layer)
    ranges = []
    for start in range(len(layers)):
        positions: list[int] = []
        for layer in layers[start:]:
            positions += by_layer[layer]
            if positions:
                ranges.append(tuple(sorted(positions)))
    return ranges
