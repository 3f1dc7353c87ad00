"""Types of numbers that many modules share; shapes are written as jaxtyping has them: `Float[Array, "n classes"]`."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.integer]
