"""Trained parameters of any form, for automatic differentiation: the general path."""

from torch import nn

from foretune.errors import PlacementError
from foretune.models.adapted import AdaptedModel


def read_groups(model: nn.Module) -> AdaptedModel:
    """Read whatever trains in a model.

    Args:
        model: Any model.

    Raises:
        PlacementError: Naming a trained parameter.
    """
    name = next((name for name, parameter in model.named_parameters() if parameter.requires_grad), "none")
    raise PlacementError(f"parameter {name!r} trains, of which no closed form is known: it is not supported")
