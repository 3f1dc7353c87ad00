"""Whether examples may share a batch, and how a model lays them out: looked up once, on two examples.

A kernel must not depend on the batches. It does where padding reaches the outputs (FNet mixes all positions, ConvBERT
and Nyströmformer some) or where a classifier reads the last position, padding or not (XLNet). And a gradient of one
example can only be read off a batch where a module has the examples on its first axis.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from foretune.errors import KernelError
from foretune.models import Classifier, Encoded, batches
from foretune.premises import check_eval_mode, frozen
from foretune.tangent import AdaptedModel, Batch, Layout, run_logits

TOLERANCE = 1e-4  # rounding of float32 stays below, what padding changes above
COARSE = 5e-2  # of half precision


def find_layout(
    adapted: AdaptedModel, classifier: Classifier, encoded: Sequence[Encoded], *, batch_size: int
) -> Layout:
    """Run a short example alone and beside a longer one, and compare.

    Args:
        adapted: Model in eval mode with its adapters.
        classifier: Whose tokenizer pads.
        encoded: Texts of the passes to come; of one of them, the shortest and the longest text are taken.
        batch_size: Texts in a batch of these passes; with 1 nothing is compared.

    Returns:
        The layout.

    Raises:
        KernelError: If the short example's outputs depend on the batch and batches have more than one example.
    """
    check_eval_mode(adapted.model)
    part = max(encoded, key=lambda part: int(part.lengths.max() - part.lengths.min()))
    short, long = int(part.lengths.argmin()), int(part.lengths.argmax())
    (one,) = batches(part, classifier, batch_size=1, rows=[short])
    alone, outputs, shapes = _look(adapted, one)
    idle = _idle(alone, outputs)
    tokens = max(1, int(part.lengths[short]))
    # of a table that all examples share, such as relative positions, a text reads twice its length at most
    positions = {
        name: sum(min(shape[:-1].numel(), 2 * tokens) for shape in held) / tokens for name, held in shapes.items()
    }
    if batch_size == 1:
        return Layout((), idle, positions)
    other = long if long != short else next((row for row in range(len(part.features)) if row != short), None)
    if other is None:
        return Layout((), idle, positions)
    (both,) = batches(part, classifier, batch_size=2, rows=[short, other])
    together, _, beside = _look(adapted, both)
    place = both.rows.tolist().index(short)
    _check_same(alone[0], together[place], classifier)
    singly = [
        name
        for name, held in shapes.items()
        if any(shape[0] != 1 for shape in held) or any(len(shape) < 2 or shape[0] != 2 for shape in beside[name])
    ]
    return Layout(tuple(singly), idle, positions)


def _look(adapted: AdaptedModel, batch: Batch) -> tuple[Tensor, dict[str, list[Tensor]], dict[str, list[torch.Size]]]:
    """Logits, and for each module the outputs and the shapes of the inputs of each of its uses."""
    outputs: dict[str, list[Tensor]] = {}
    shapes: dict[str, list[torch.Size]] = {}

    def hook(name: str) -> Callable[..., Tensor]:
        outputs[name], shapes[name] = [], []

        def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            shapes[name].append(args[0].shape)
            outputs[name].append(output if output.requires_grad else output.detach().requires_grad_())
            return outputs[name][-1]

        return note

    modules = {adapter.site.name: adapter.module for adapter in adapted.adapters} | dict(adapted.head)
    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        with frozen(adapted.model), torch.enable_grad():
            logits = run_logits(adapted, batch)
    finally:
        for handle in handles:
            handle.remove()
    return logits, outputs, shapes


def _idle(logits: Tensor, outputs: dict[str, list[Tensor]]) -> tuple[str, ...]:
    every = [(name, output) for name, held in outputs.items() for output in held]
    if not every or not logits.requires_grad:
        return tuple(outputs)
    found = torch.autograd.grad(logits.sum(), [output for _, output in every], allow_unused=True)
    reached = {name for (name, _), gradient in zip(every, found, strict=True) if gradient is not None}
    return tuple(name for name in outputs if name not in reached)


def _check_same(alone: Tensor, together: Tensor, classifier: Classifier) -> None:
    alone, together = alone.detach().double(), together.detach().double()
    if not (torch.isfinite(alone).all() and torch.isfinite(together).all()):
        return  # the pass says which module it comes from
    size = float(alone.norm())
    change = float((together - alone).norm()) / size if size > 0 else 0.0
    if change <= (TOLERANCE if torch.finfo(next(iter(classifier.model.parameters())).dtype).eps < 1e-5 else COARSE):
        return
    raise KernelError(
        f"the outputs of {type(classifier.model).__name__} depend on the batch: a text alone and padded beside another "
        f"differ by {change:.1%}, so would the kernel: use --batch-size 1"
    )
