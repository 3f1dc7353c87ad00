"""Shapes in types are checked under test: what has another shape or type of number is refused."""

import pytest
import torch
from jaxtyping import TypeCheckError

from foretune.models.sites import Site
from foretune.ntk.capture import Uses
from foretune.ntk.factors import ModuleTokens, TokenFactors
from foretune.ntk.features import HeadFactor, TangentFeatures
from foretune.ntk.kernel import TangentKernel
from foretune.tasks.outputs import output_reduction

MARGIN = output_reduction("margin", 2)
SITE = Site("m", None, "m", 3, 2, 4, 1.0)


def features(b, logits):
    return TangentFeatures((SITE,), MARGIN, 1, (b,), (None,), (None,), (), logits)


def test_features_of_one_shape_are_taken():
    assert features(torch.zeros(1, 5, 4, 2), torch.zeros(5, 2)).n == 5


@pytest.mark.parametrize(
    "make",
    [
        lambda: features(torch.zeros(5, 4, 2), torch.zeros(5, 2)),  # no axis of outputs
        lambda: features(torch.zeros(1, 5, 4, 2), torch.zeros(6, 2)),  # other examples
        lambda: features(torch.zeros(1, 5, 4, 2, dtype=torch.long), torch.zeros(5, 2)),
        lambda: HeadFactor(torch.zeros(1, 5, 2), torch.zeros(4, 3), None, bias=True),
        lambda: ModuleTokens(torch.tensor([0, 2]), torch.zeros(2, 3), torch.zeros(1, 3, 2)),  # a gradient too many
        lambda: ModuleTokens(torch.tensor([0.0, 2.0]), torch.zeros(2, 3), torch.zeros(1, 2, 2)),
        lambda: TokenFactors((), MARGIN, (), (), torch.zeros(5, 3), torch.zeros(4, 2)),
        lambda: TangentKernel((SITE,), (4,), torch.zeros(1, 1, 1, 5, 5).numpy(), None, MARGIN, 1e-7),  # float32
        lambda: Uses(torch.nn.Linear(3, 2), 5).use(torch.zeros(5, 3)),  # no axis of positions
    ],
)
def test_another_shape_is_refused(make):
    with pytest.raises(TypeCheckError):
        make()


def test_shapes_are_checked_where_a_function_is_called():
    tokens = ModuleTokens(torch.tensor([0, 2]), torch.zeros(2, 3), torch.zeros(1, 2, 2))
    with pytest.raises(TypeCheckError):
        tokens.of(torch.tensor([[0]]), torch.float32)
