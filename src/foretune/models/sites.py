"""Adapter sites: the modules that carry an adapter, as plain numbers."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One adapted module: y = W h + scaling · B A h, and whatever else it trains.

    Attributes:
        name: Module path in the base model, e.g. `bert.encoder.layer.0.attention.self.query`.
        layer: Number of the layer in the path, None outside the layers (a pooler, say).
        kind: Path below the layer, e.g. `attention.self.query`.
        d_in: Columns of A.
        d_out: Rows of B.
        rank: Rows of A; 0 where the module has no A and B.
        scaling: s = α/r, or α/√r for rank-stabilised LoRA.
        rank_exponent: e such that keeping the first r' rows of A as an adapter of rank r' multiplies the
            kernel of these rows by (r/r')^e: 2 for s = α/r, 1 for α/√r, and 2 more for the `gaussian`
            initialisation, whose standard deviation is 1/r.
        others: Trained numbers beside A and B: the magnitudes of DoRA, the scales of (IA)³, all of another method.
    """

    name: str
    layer: int | None
    kind: str
    d_in: int
    d_out: int
    rank: int
    scaling: float
    rank_exponent: float = 2.0
    others: int = 0

    @property
    def n_parameters(self) -> int:
        """Trained parameters together."""
        return self.rank * (self.d_in + self.d_out) + self.others


def split_name(name: str) -> tuple[int | None, str]:
    """Split a module path into the number of its layer and the path below it.

    Args:
        name: Module path with dots.

    Returns:
        The first component that is a number, and what follows it; None and the whole path if there is none.

    Example:
        >>> split_name("bert.encoder.layer.3.attention.self.query")
        (3, 'attention.self.query')
        >>> split_name("bert.pooler.dense")
        (None, 'bert.pooler.dense')
    """
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdecimal():
            return int(part), ".".join(parts[position + 1 :])
    return None, name


def kinds_in_words(names: Sequence[str]) -> str:
    """Name kinds of modules instead of every layer's own.

    Args:
        names: Module paths.

    Returns:
        Up to four kinds, and how many there are beside.

    Example:
        >>> kinds_in_words(["layer.0.query", "layer.1.query", "pooler"])
        'query, pooler'
    """
    kinds = list(dict.fromkeys(split_name(name)[1] for name in names))
    return ", ".join(kinds[:4]) + (f" and {len(kinds) - 4} more kinds" if len(kinds) > 4 else "")
