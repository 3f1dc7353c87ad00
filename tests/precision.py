"""Which models compute in single precision although their weights are double, and how close their results can be.

Some architectures cast to float32 on the way: softmax, norms, tables of positions. Whether two passes of one text,
alone and in a batch, then round alike depends on the processor, so that no such model is held to double precision.
"""

import functools

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# relative errors; one operation rounds to 1e-7, and the weights of the tests are large
PARTS, WHOLE = 1e-5, 1e-4  # of a model with parts in float32, and of one that has its weights in it


class Crossings(TorchDispatchMode):
    """Notes operations that take float32 into float64.

    Whole numbers, infinite ones and the lowest that there is are exact in both, as in masks; a single number, such as
    the root of a width, is the same in every pass.
    """

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if any(is_float(out) and out.dtype == torch.float64 for out in tree_leaves(result)):
            low = [t for t in tree_leaves((args, kwargs)) if is_float(t) and t.dtype != torch.float64 and t.ndim]
            if any(not bool((t == t.round()).all()) for t in low):
                self.found.add(str(operation))
        return result


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def crossings(model):
    """Names of the operations by which single precision comes into the outputs of a model."""
    ids = torch.tensor([[5, 6, 7, 8, 3], [9, 5, 6, 3, 1]])
    with torch.no_grad(), Crossings() as seen:
        model(input_ids=ids, attention_mask=(ids != 1).long())
    return seen.found


@functools.cache
def _widest(build, name):
    model = build(name)
    if any(is_float(parameter) and parameter.dtype != torch.float64 for parameter in model.parameters()):
        return WHOLE
    return PARTS if crossings(model) else 0.0


def within(exact, build, name):
    """Relative error that holds on every processor: `exact`, or more where `build(name)` has single precision in it."""
    return max(exact, _widest(build, name))
