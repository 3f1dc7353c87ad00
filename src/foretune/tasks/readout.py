"""What the fits of an output layer have in common."""

from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize_scalar

from foretune.arrays import Array

TEMPERATURES = np.geomspace(1e-3, 1e3, 61)


def standardised(inputs: Array, *, intercept: bool) -> tuple[Array, Array]:
    """Centre and scale that give inputs unit total variance; a constant input counts for nothing.

    Args:
        inputs: n × p.
        intercept: Whether a bias takes up the centre; else it is left at 0.

    Returns:
        p centres and p scales (infinite for a constant input).
    """
    centre = inputs.mean(0) if intercept else np.zeros(inputs.shape[1])
    spread = inputs.std(0)
    scale = np.where(spread > 1e-12 * max(1.0, float(np.abs(inputs).max())), spread, np.inf) * np.sqrt(inputs.shape[1])
    return centre, scale


def best_temperature(loss: Callable[[float], float]) -> float:
    """Factor between 1e-3 and 1e3 with the least loss.

    Args:
        loss: Loss of a factor.

    Returns:
        The factor.
    """
    return minimise_over(loss, TEMPERATURES)


def minimise_over(objective: Callable[[float], float], grid: Array) -> float:
    """Minimise a function of one positive number: the best of a grid, refined between its neighbours.

    Args:
        objective: Function to minimise.
        grid: Positive numbers in order, rising or falling; of equal values the first is taken.

    Returns:
        Where the least value was found.
    """
    values = np.array([objective(float(point)) for point in grid])
    best = int(np.argmin(values))
    ends = sorted((float(np.log(grid[max(best - 1, 0)])), float(np.log(grid[min(best + 1, len(grid) - 1)]))))
    refined = minimize_scalar(lambda log: objective(float(np.exp(log))), bounds=ends, method="bounded")
    return float(np.exp(refined.x)) if refined.fun < values[best] else float(grid[best])
