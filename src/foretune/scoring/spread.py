"""How numbers spread over draws of A and of the samples."""

from collections.abc import Iterable

import numpy as np


def summarise_values(values: Iterable[float | None]) -> dict[str, float | int] | None:
    """Summarise one number over several draws.

    Args:
        values: Of each draw; None where it is not defined.

    Returns:
        Mean, standard deviation (with n − 1), extremes and count; None with fewer than two.
    """
    numbers = np.array([value for value in values if value is not None])
    if numbers.size < 2:
        return None
    return {
        "mean": float(numbers.mean()),
        "standard_deviation": float(numbers.std(ddof=1)),
        "minimum": float(numbers.min()),
        "maximum": float(numbers.max()),
        "count": int(numbers.size),
    }
