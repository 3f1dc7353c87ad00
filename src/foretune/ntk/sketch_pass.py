"""Sketches of the features of a batch, made as its gradients come: wide features of all examples are nowhere at once.

A linear module whose weight trains whole is sketched from its inputs and output gradients
(`foretune.ntk.product_sketch`) where that is cheaper than to form the gradient of the weight. All else is formed, one
batch at a time, and sketched then (`foretune.ntk.feature_sketch`): of an adapter A h_t is r numbers, its features are
about as many as a sketch, and projecting each side first only adds variance.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foretune.models.adapted import AdaptedModel, Batch, Group
from foretune.ntk.capture import Receive, capture_in_turn
from foretune.ntk.feature_sketch import generator_of, sketch_sites, sketched
from foretune.ntk.feature_store import Tile, join_tiles, site_traces
from foretune.ntk.general import ReduceGroups
from foretune.ntk.jacobian import batch_features
from foretune.ntk.product_sketch import ProductSketch, draw_product_sketch, products
from foretune.tasks.outputs import OutputReduction

WORTH = 32  # numbers of a weight for each of the sketch, from which on a convolution beats forming the gradient
_PRODUCT = 3  # kind of part, beside those of `feature_sketch`


def by_products(adapted: AdaptedModel, width: int) -> tuple[str, ...]:
    """Name the groups that are sketched from inputs and output gradients.

    It follows from the model and the width alone: an example has one sketch, in whatever batch it is.

    Args:
        adapted: The model.
        width: Numbers k of the sketch.

    Returns:
        Sites that are the weight, or weight and bias, of one linear module, and have WORTH · k numbers or more.
    """
    if adapted.layout is not None and adapted.layout.looped:
        return ()
    wide = (group for group in adapted.groups if group.site.others >= WORTH * width)
    return tuple(group.site.name for group in wide if _is_linear(group))


def _is_linear(group: Group) -> bool:
    if len(group.modules) != 1:
        return False
    (module,) = group.modules.values()
    if type(module) is not nn.Linear:
        return False
    own, trained = {id(p) for p in module.parameters()}, {id(p) for p in group.parameters.values()}
    return id(module.weight) in trained and trained <= own


class _Weight:
    """Sketch of the gradients of one linear module, added up as they come."""

    def __init__(self, group: Group, sketches: list[list[ProductSketch]], n: int, n_outputs: int) -> None:
        ((self.module, linear),) = group.modules.items()
        self.name = group.site.name
        self._bias = len(group.parameters) > 1
        assert isinstance(linear, nn.Linear)
        self._dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        self._sketches = sketches
        self._uses = 0
        self._before: dict[int, list[tuple[Tensor, Tensor]]] = {}
        half = sketches[0][0].width
        self.halves = torch.zeros(2, n_outputs, n, half, dtype=self._dtype, device=linear.weight.device)
        self.squares = torch.zeros(n, dtype=torch.float64)

    def use(self, h: Float[Tensor, "n t d_in"]) -> Receive:
        self._uses += 1

        def receive(output: int, g: Float[Tensor, "n t d_out"]) -> None:
            pair = (g.to(self._dtype), self._inputs(h))
            self.squares += products(pair, pair).double().cpu()
            if self._uses > 1:  # a module that runs several times has a sum for gradient
                before = self._before.setdefault(output, [])
                for other in before:
                    self.squares += 2.0 * products(pair, other).double().cpu()
                before.append(pair)
            for half, of_outputs in zip(self.halves, self._sketches, strict=True):
                half[output] += of_outputs[output].of(*pair)

        return receive

    def _inputs(self, h: Tensor) -> Tensor:
        h = h.to(self._dtype)
        return torch.nn.functional.pad(h, (0, 1), value=1.0) if self._bias else h


class SketchGroups:
    """Sink of a pass that sketches the gradients of groups of parameters.

    Args:
        adapted: The model; every group has its modules.
        n: Examples of the batch.
        reduction: Scalar outputs that are differentiated.
        width: Numbers k of the sketch, even.
        seed: Of the sketch.
    """

    def __init__(self, adapted: AdaptedModel, n: int, reduction: OutputReduction, width: int, seed: int) -> None:
        self._adapted, self._reduction = adapted, reduction
        self._width, self._seed = width, seed
        chosen = by_products(adapted, width)
        self._formed = [index for index, group in enumerate(adapted.groups) if group.site.name not in chosen]
        rest = replace(adapted, groups=tuple(adapted.groups[index] for index in self._formed))
        self._rest, self._kept = ReduceGroups(rest, n, reduction), set(rest.modules)
        self._weights: dict[str, tuple[int, _Weight]] = {}
        for index, group in enumerate(adapted.groups):
            if group.site.name in chosen:
                weight = _Weight(group, self._draw(index, group), n, reduction.n_outputs)
                self._weights[weight.module] = (index, weight)

    def _draw(self, index: int, group: Group) -> list[list[ProductSketch]]:
        """Sketches of both halves and all outputs: one for all where each output keeps its row, else one for each."""
        (linear,) = group.modules.values()
        assert isinstance(linear, nn.Linear)
        d_out, d_in, k = linear.out_features, linear.in_features + len(group.parameters) - 1, self._reduction.n_outputs
        halves = []
        for half in (0, 1):
            generator = generator_of(self._seed, half, index, _PRODUCT)
            drawn = [
                draw_product_sketch(generator, self._width // 2, d_out, d_in)
                for _ in range(1 if self._reduction.block else k)
            ]
            halves.append(drawn * k if self._reduction.block else drawn)
        return halves

    def use(self, module: str, h: Float[Tensor, "n positions d_in"], y: Float[Tensor, "n positions d_out"]) -> Receive:
        """As `foretune.ntk.capture.Sink.use`.

        Args:
            module: Name.
            h: Inputs.
            y: Outputs.

        Returns:
            What takes the gradients.
        """
        receivers = [self._weights[module][1].use(h)] if module in self._weights else []
        if module in self._kept:  # a bias of its own, say, where several modules share the weight
            receivers.append(self._rest.use(module, h, y))

        def receive(output: int, g: Tensor) -> None:
            for one in receivers:
                one(output, g)

        return receive

    def finish(self) -> Iterator[tuple[str, Tensor]]:
        """As `foretune.ntk.capture.Sink.finish`.

        Yields:
            Name of a group or module, and its sketch or gradients.
        """
        yield from self._rest.finish()
        yield from ((weight.name, weight.halves) for _, weight in self._weights.values())

    def tile(self, logits: Float[Tensor, "n classes"]) -> Tile:
        """Give out what has come.

        Args:
            logits: Outputs of the pass.

        Returns:
            Sketch of the batch, examples in its order, and the exact traces of the sites.
        """
        features = self._rest.features(logits)
        traces = torch.zeros(len(self._adapted.groups), 1, dtype=torch.float64)
        traces[self._formed] = site_traces(features)
        made = sketched(features, self._width, seed=self._seed)
        halves = list(made.b)
        for index, weight in self._weights.values():
            traces[index] = self._reduction.scale * weight.squares.sum()
            for half, of_weight in enumerate(weight.halves):
                halves[half] = halves[half] + _rows(of_weight, self._reduction).to(halves[half]) / 2**0.5
        sites = sketch_sites(self._adapted.sites, self._width)
        return Tile(replace(made, sites=sites, b=tuple(halves)), traces)


def _rows(sketch: Float[Tensor, "k n width"], reduction: OutputReduction) -> Float[Tensor, "k n 1 width"]:
    """Lay a sketch out as features of one draw of A; the outputs of a row are joined in the first of them."""
    if not reduction.block:
        sketch = torch.cat([sketch.sum(0, keepdim=True), sketch.new_zeros(len(sketch) - 1, *sketch.shape[1:])])
    return sketch.unsqueeze(2)


def batch_sketch(adapted: AdaptedModel, batch: Batch, reduction: OutputReduction, *, width: int, seed: int) -> Tile:
    """Compute the sketch of the tangent features of one batch.

    Args:
        adapted: Model in eval mode.
        batch: Inputs of n examples.
        reduction: Scalar outputs to differentiate.
        width: Numbers k of the sketch, even.
        seed: Of the sketch: with it an example's sketch is the same in every batch, to rounding.

    Returns:
        Features with two sites, the halves of the sketch, and the exact traces of the model's sites.

    Raises:
        KernelError: As `foretune.ntk.jacobian.batch_features`.
    """
    if not by_products(adapted, width):
        features = batch_features(adapted, batch, reduction)
        return Tile(sketched(features, width, seed=seed), site_traces(features))
    passes = capture_in_turn(
        adapted, batch, reduction.directions, lambda n: SketchGroups(adapted, n, reduction, width, seed)
    )
    return join_tiles(((places, sink.tile(logits)) for places, sink, logits in passes), len(batch.rows))
