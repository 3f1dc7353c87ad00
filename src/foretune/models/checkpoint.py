"""A checkpoint against its architecture: which weights may be new, and whose order its outputs have.

New may be what the architecture puts on top of its backbone, the task's head, and a pooler that the checkpoint never
had. A weight of the backbone that is missing or of another shape would be drawn at random, so it is refused.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from foretune.errors import ModelError, shown
from foretune.tasks.objective import Objective

_FEW, _FIRST = 3, 2
_WORDS = {"classification": "classes", "regression": "outputs", "multi-label": "labels"}
_WRAPPERS = ("base_layer.", "_orig_mod.", "module.", "base_model.model.")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class CheckpointNames:
    """What transformers says of a load.

    Attributes:
        missing: Parameters that the checkpoint does not give.
        mismatched: Parameters of another shape, with the checkpoint's shape and the model's.
        unexpected: The checkpoint's weights that the model has no place for.
    """

    missing: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    unexpected: tuple[str, ...]


def backbone_prefix(model: nn.Module) -> str:
    """Find where the backbone's parameters are, all others belonging to the task's head.

    Args:
        model: transformers sequence classifier.

    Returns:
        Beginning of their names, with the point.
    """
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    if isinstance(getattr(model, prefix, None) if prefix else None, nn.Module):
        return f"{prefix}."
    # an architecture of the user's own may not name it: it is the child with the most weights
    sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    return f"{max(sizes, key=lambda name: sizes[name])}." if sizes else ""


def head_layer(model: nn.Module, n_outputs: int) -> tuple[str, nn.Linear] | None:
    """Find the layer that gives the outputs.

    Args:
        model: transformers sequence classifier.
        n_outputs: How many it has.

    Returns:
        Name and layer, the last linear layer of the head that has as many; None without one.
    """
    prefix = backbone_prefix(model)
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == n_outputs and not f"{name}.".startswith(prefix)
    ]
    return layers[-1] if layers else None


def check_backbone(model: nn.Module, names: CheckpointNames, source: str, *, whole: bool = False) -> tuple[str, ...]:
    """Refuse a checkpoint that does not give the whole backbone, or more of it than the model takes.

    Args:
        model: The loaded model.
        names: What was said of the load.
        source: Name of the model, quoted, for the message.
        whole: Whether what is on top of the backbone has to be given too, as in a language model.

    Returns:
        Modules that are new, in the order of the model: of the head, and a pooler.

    Raises:
        ModelError: Naming the first parameters, how many there are, and what they look like.
    """
    prefix = backbone_prefix(model)
    order = {name: place for place, name in enumerate(model.state_dict())}
    other = {name: (theirs, ours) for name, theirs, ours in names.mismatched}
    new = sorted({*names.missing, *other}, key=lambda name: (order.get(name, len(order)), name))
    given = [name for name in order if name not in set(new)]
    pooled = any(_is_pooler(name) for name in (*names.unexpected, *given, *other))
    wrong = [name for name in new if whole or (name.startswith(prefix) and (pooled or not _is_pooler(name)))]
    if wrong:
        first = [
            f"{name} ({_shape(other[name][0])} instead of {_shape(other[name][1])})" if name in other else name
            for name in wrong[:_FIRST]
        ]
        many = f" and {len(wrong) - _FIRST} more" if len(wrong) > _FIRST else ""
        what = "weight" if len(wrong) == 1 else "weights"
        raise ModelError(
            f"the checkpoint of model {source} does not give {len(wrong)} {what} of the architecture in config.json: "
            f"{', '.join(first)}{many}; {_hint(wrong, other, names.unexpected, prefix)}"
        )
    _check_layers(model, names.unexpected, prefix, source)
    return tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in new))


def _is_pooler(name: str) -> bool:
    return any("pooler" in part for part in name.split("."))


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "one number"


def _hint(wrong: Sequence[str], other: Iterable[str], unexpected: Sequence[str], prefix: str) -> str:
    """What the faults look like, and what to do."""
    other = set(other)
    for wrapper in _WRAPPERS:
        if any(wrapper in name for name in unexpected):
            whose = "merge the adapter first (merge_and_unload)" if wrapper == "base_layer." else "unwrap the model"
            return f"its keys hold {wrapper!r}: {whose} and save it again"
    if other.issuperset(wrong):
        return "sizes are not those of config.json: take the config.json that belongs to these weights"
    for name in wrong:
        inner = name.removeprefix(prefix)
        for key in sorted(unexpected):
            if key.endswith(f".{inner}"):
                begin = key.removesuffix(inner)
                return (
                    f"its keys begin with {begin!r}: save it without that, or take the config.json that belongs to it"
                )
    numbers = [_NUMBER.search(name) for name in wrong]
    if all(numbers) and not unexpected:
        return "it has fewer layers than config.json says, or lacks a file: take the whole checkpoint"
    if unexpected:
        return f"it holds {min(unexpected)!r} instead: config.json is of another architecture than the weights"
    return "take the whole checkpoint"


def _check_layers(model: nn.Module, unexpected: Sequence[str], prefix: str, source: str) -> None:
    """Layers of the checkpoint that config.json leaves out."""
    patterns = {_NUMBER.sub("#", name) for name in model.state_dict() if name.startswith(prefix)}
    cut = [
        name
        for name in sorted(unexpected)
        if _NUMBER.search(name) and {_NUMBER.sub("#", name), _NUMBER.sub("#", f"{prefix}{name}")} & patterns
    ]
    if cut:
        raise ModelError(
            f"the checkpoint of model {source} has more layers than config.json says: {cut[0]} and {len(cut) - 1} "
            "more weights would be left out; set num_hidden_layers right, or save the shorter model"
        )


@dataclass(frozen=True)
class ClassNames:
    """The names that a checkpoint's config.json gives its classes, labels or numbers.

    Attributes:
        id2label: Names by number.
        label2id: Numbers by name.
        problem_type: What it was trained for, in transformers' words; None if it does not say.
    """

    id2label: Mapping[Any, Any]
    label2id: Mapping[Any, Any]
    problem_type: str | None = None


def own_names(given: ClassNames) -> tuple[str, ...] | None:
    """Read the names of a checkpoint's outputs, in their order.

    Args:
        given: What config.json says.

    Returns:
        Names; None where it has none but `LABEL_0`, `LABEL_1`, ….

    Raises:
        ModelError: If id2label and label2id contradict each other.
    """
    by_id = _in_order(given.id2label.items())
    by_label = _in_order((number, name) for name, number in given.label2id.items())
    if by_id and by_label and by_id != by_label and sorted(by_id) == sorted(by_label):
        raise ModelError(
            f"id2label has the classes {_listed(by_id)}, label2id has {_listed(by_label)}: make them agree"
        )
    return by_id or by_label


def _in_order(pairs: Iterable[tuple[Any, Any]]) -> tuple[str, ...] | None:
    by_number = {int(number): str(name) for number, name in pairs}
    names = [by_number.get(number) for number in range(len(by_number))]
    named = tuple(name for name in names if name is not None)
    generic = all(name == f"LABEL_{number}" for number, name in enumerate(named))
    return None if generic or len(named) < len(names) or len(set(named)) < len(named) else named


def _listed(names: Sequence[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > _FEW else ""
    return ", ".join(repr(name[:30]) for name in names[:_FEW]) + more


def follow_names(model: nn.Module, given: ClassNames, objective: Objective, new: Sequence[str]) -> tuple[str, ...]:
    """Give the checkpoint's own head the order of the data's classes or labels, by their names.

    Args:
        model: The loaded classifier; its last layer is changed in place where the order differs.
        given: Names of the checkpoint's outputs.
        objective: The task, with the names of the data's outputs in their order.
        new: Modules that the checkpoint did not give.

    Returns:
        What to say of it: nothing where the head is new, or is for the same task with the same names.

    Raises:
        ModelError: If the checkpoint's names contradict each other.
    """
    last = head_layer(model, len(objective.names))
    if last is None or last[0] in new:
        return ()
    notes = _named_alike(last[1], given, objective) if len(objective.names) > 1 else ()
    if given.problem_type in (None, objective.problem_type):
        return notes
    trained = shown(given.problem_type, 40)
    return (*notes, f"the checkpoint's head was trained for {trained}, and is taken on for {objective.kind}")


def _named_alike(layer: nn.Linear, given: ClassNames, objective: Objective) -> tuple[str, ...]:
    ours, word = objective.names, _WORDS[objective.kind]
    theirs = own_names(given)
    order = None if theirs is None else _order(theirs, ours)
    if theirs is None or order is None:
        if tuple(map(str, range(len(ours)))) == ours:
            return ()
        said = f"has no names of {word}" if theirs is None else f"has other names of {word}, {_listed(theirs)}"
        return (f"the checkpoint's head {said}: they are taken in its order as {_listed(ours)}",)
    if order == list(range(len(ours))):
        return ()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(parameter[order].clone())
    return (f"the checkpoint's head has the {word} in the order {_listed(theirs)}: put in the order of the data",)


def _order(theirs: Sequence[str], ours: Sequence[str]) -> list[int] | None:
    """Where each class of the data is among the checkpoint's; None where the names are others."""
    for spell in (str, lambda name: name.strip().casefold()):
        places = {spell(name): place for place, name in enumerate(theirs)}
        wanted = [spell(name) for name in ours]
        if len(places) == len(theirs) and len(set(wanted)) == len(wanted) and set(places) == set(wanted):
            return [places[name] for name in wanted]
    return None
