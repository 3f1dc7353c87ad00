"""Tangent features of parameters of any form: exact gradients of every example, without a formula for the method.

For a scalar output z of one example and a trained parameter θ that modules y = m(h; θ) use, with g = ∂z/∂y,

    ∂z/∂θ = Σ_m (∂m(h; θ)/∂θ)ᵀ g

so one pass over a batch (`foretune.ntk.capture`) gives h and g of every such module, and `torch.func` the product, over
the examples at once and of this module alone: transformers' models as a whole do not run under `torch.func.vmap`, for
their masks depend on the data. A module that does not run under it either is gone through example by example. Where it
takes more than one input, or the gradients are not the sums of its uses', a loop takes them with as many backward
passes of the whole model as there are examples and outputs. `runs_by_module` looks which it is: it compares the two on
the examples that it is given.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from foretune.errors import KernelError
from foretune.models.adapted import AdaptedModel, Batch, Group, Layout
from foretune.ntk.capture import Receive, Uses, capture, capture_in_turn, run_logits
from foretune.ntk.features import HeadFactor, TangentFeatures, batch_in_turn
from foretune.ntk.head_factors import has_bias, head_factor
from foretune.ntk.premises import check_eval_mode, check_finite, check_logits
from foretune.tasks.outputs import OutputReduction

ENTRIES = 32_000_000  # numbers of one example's gradients times examples that are taken at once
EXACT, HALF = 1e-4, 1e-1  # relative differences that rounding explains, in single precision and in half


def group_features(adapted: AdaptedModel, batch: Batch, reduction: OutputReduction) -> TangentFeatures:
    """Compute the tangent features of one batch of a model whose parameters lie in groups.

    Args:
        adapted: Model in eval mode; no adapters beside the groups. Unless its layout says that the gradients can be
            taken of the modules, every example has passes of its own.
        batch: Inputs of n examples.
        reduction: Scalar outputs to differentiate.

    Returns:
        Features of the batch, examples in its order: k × n × w gradients of each group, its parameters one after the
        other.

    Raises:
        KernelError: If the model is not in eval mode, the outputs do not depend on a group, or a gradient or output is
            not finite (the group or module is named).
    """
    n = len(batch.rows)
    check_eval_mode(adapted.model)
    if adapted.layout is None or adapted.layout.looped:
        singles = (looped_features(adapted, one, reduction) for one in batch.singles())
        parts = ((torch.tensor([place]), features) for place, features in enumerate(singles))
    else:
        parts = (
            (places, sink.features(logits))
            for places, sink, logits in capture_in_turn(
                adapted, batch, reduction.directions, lambda m: ReduceGroups(adapted, m, reduction)
            )
        )
    return batch_in_turn(parts, n)


def runs_by_module(adapted: AdaptedModel, batch: Batch, reduction: OutputReduction) -> bool:
    """Tell whether the gradients taken of the modules are those of the loop.

    Args:
        adapted: Model in eval mode with groups.
        batch: Two examples, or one where there are no two.
        reduction: Scalar outputs to differentiate.

    Returns:
        Whether they agree to rounding; not where a module does not run by itself.

    Raises:
        KernelError: As `looped_features`.
    """
    layout = adapted.layout or Layout()
    exact = looped_features(replace(adapted, layout=replace(layout, looped=True)), batch, reduction)
    by_module = replace(adapted, layout=replace(layout, looped=False))
    sink = ReduceGroups(by_module, len(batch.rows), reduction)
    try:
        logits = capture(by_module, batch, reduction.directions, sink)
    except Exception:  # whatever a module, torch.func or the capture raises: the loop runs
        return False
    return agree(sink.features(logits), exact)


def agree(found: TangentFeatures, exact: TangentFeatures) -> bool:
    """Tell whether every group's gradients are the same; where they cancel, rounding of the whole is all there is.

    Args:
        found: Features of some examples.
        exact: The same, taken in another way.

    Returns:
        Whether they agree to rounding.
    """
    pairs = [(one.double(), other.double()) for one, other in zip(found.gradients, exact.gradients, strict=True)]
    epsilon = max(torch.finfo(gradient.dtype).eps for gradient in (*found.gradients, exact.logits))
    relative = HALF if epsilon > 1e-6 else EXACT
    whole = sum(float(other.norm()) ** 2 for _, other in pairs) ** 0.5
    return all(
        float((one - other).norm()) <= relative * float(other.norm()) + 100.0 * epsilon * whole for one, other in pairs
    )


class _Bare(nn.Module):
    """A module without the hooks that stand on it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, h: Tensor) -> Tensor:
        result: Tensor = self.inner.forward(h)
        return result


class _Local:
    """The trained parameters of one module, and their gradients given its inputs and output gradients."""

    def __init__(self, module: nn.Module, groups: Sequence[Group]) -> None:
        wanted = {id(p) for group in groups for p in group.parameters.values()}
        self.bare = _Bare(module)
        named = {name: p for name, p in self.bare.named_parameters() if id(p) in wanted}
        self.ids = {name: id(p) for name, p in named.items()}
        self.values = {name: p.detach() for name, p in named.items()}
        size = sum(p.numel() for p in named.values()) + max((p.numel() for p in module.parameters()), default=0)
        self.chunk = max(1, ENTRIES // max(1, size))
        self.one_by_one = False

    def pull(self, h: Shaped[Tensor, "n s d_in"], g: Float[Tensor, "n t d_out"]) -> dict[str, Tensor]:
        """Gradients by the name of the parameter, the n examples first."""
        if not self.one_by_one:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="There is a performance drop")  # no rule of one operator
                    taken: dict[str, Tensor] = vmap(self._of_one, chunk_size=self.chunk)(h, g)
                return taken
            except (RuntimeError, NotImplementedError):  # autograd functions of peft's own, sparse tensors
                self.one_by_one = True
        of_rows = [self._by_autograd(h[row], g[row]) for row in range(len(h))]
        return {name: torch.stack([of_row[name] for of_row in of_rows]) for name in self.values}

    def _of_one(self, h: Shaped[Tensor, "s d_in"], g: Float[Tensor, "t d_out"]) -> dict[str, Tensor]:
        pulled: dict[str, Tensor] = vjp(lambda values: self._run(values, h).reshape(g.shape), self.values)[1](g)[0]
        return pulled

    def _by_autograd(self, h: Shaped[Tensor, "s d_in"], g: Float[Tensor, "t d_out"]) -> dict[str, Tensor]:
        with torch.enable_grad():
            values = {name: value.detach().requires_grad_() for name, value in self.values.items()}
            y = self._run(values, h).reshape(g.shape)
            taken = torch.autograd.grad(y, list(values.values()), g, allow_unused=True)
        return {
            name: torch.zeros_like(value) if gradient is None else gradient
            for (name, value), gradient in zip(values.items(), taken, strict=True)
        }

    def _run(self, values: dict[str, Tensor], h: Tensor) -> Tensor:
        y: Tensor = functional_call(self.bare, values, (h[None],))
        return y


class ReduceGroups:
    """Sink of a pass that reduces inputs and output gradients of modules to gradients of groups of parameters.

    Args:
        adapted: The model; every group has its modules.
        n: Examples of the batch.
        reduction: Scalar outputs that are differentiated.
    """

    def __init__(self, adapted: AdaptedModel, n: int, reduction: OutputReduction) -> None:
        self._adapted, self._n, self._reduction = adapted, n, reduction
        used: dict[str, list[Group]] = {}
        for group in adapted.groups:
            for name in group.modules:
                used.setdefault(name, []).append(group)
        self._locals = {name: _Local(groups[0].modules[name], groups) for name, groups in used.items()}
        self._uses = {name: Uses(module, n) for name, module in adapted.head.items()}
        self._totals: dict[int, Tensor] = {}
        self._v: list[Tensor] = []
        self._head: list[HeadFactor] = []

    def use(self, module: str, h: Shaped[Tensor, "n s d_in"], y: Float[Tensor, "n positions d_out"]) -> Receive:
        """As `foretune.ntk.capture.Sink.use`.

        Args:
            module: Name.
            h: Inputs, which may be numbers of tokens.
            y: Outputs.

        Returns:
            What takes the gradients.
        """
        local = self._locals.get(module)
        if local is None:
            return self._uses[module].use(h)

        def receive(output: int, g: Tensor) -> None:
            for name, gradient in local.pull(h, g).items():
                total = self._totals.get(local.ids[name])
                if total is None:
                    total = gradient.new_zeros(self._reduction.n_outputs, self._n, gradient[0].numel())
                    self._totals[local.ids[name]] = total
                total[output] += gradient.flatten(1)

        return receive

    def finish(self) -> Iterator[tuple[str, Tensor]]:
        """As `foretune.ntk.capture.Sink.finish`.

        Yields:
            Name of a group or module and gradients.
        """
        k = self._reduction.n_outputs
        for group in self._adapted.groups:
            self._v.append(
                side_by_side(group, [self._totals.get(id(p)) for p in group.parameters.values()], k, self._n)
            )
            yield group.site.name, self._v[-1]
        self._totals.clear()
        for name, uses in self._uses.items():
            factor = head_factor(uses, k, bias=has_bias(self._adapted.head[name]))
            self._head.append(factor)
            yield from ((name, tensor) for tensor in (factor.g, factor.h, factor.dense) if tensor is not None)
        self._uses.clear()

    def features(self, logits: Float[Tensor, "n classes"]) -> TangentFeatures:
        """Give out what has come.

        Args:
            logits: Outputs of the pass.

        Returns:
            Features of the batch, examples in its order.
        """
        return grouped(self._adapted, self._reduction, self._v, self._head, logits)


def side_by_side(group: Group, parts: Sequence[Tensor | None], k: int, n: int) -> Float[Tensor, "k n w"]:
    """Put the gradients of a group's parameters side by side.

    Args:
        group: The group.
        parts: k × n × numbers of each parameter; None, for zeros, of what no output of these examples depends on.
        k: Outputs.
        n: Examples.

    Returns:
        k × n × w.
    """
    pairs = zip(group.parameters.values(), parts, strict=True)
    return torch.cat([p.new_zeros(k, n, p.numel()) if part is None else part for p, part in pairs], dim=2)


def grouped(
    adapted: AdaptedModel, reduction: OutputReduction, v: Sequence[Tensor], head: Sequence[HeadFactor], logits: Tensor
) -> TangentFeatures:
    """Make features of the gradients of groups.

    Args:
        adapted: The model.
        reduction: Scalar outputs that were differentiated.
        v: k × n × w gradients of each group.
        head: Of the head's modules.
        logits: n × C outputs.

    Returns:
        The features.
    """
    none = logits.new_zeros(reduction.n_outputs, len(logits), 0, 0)
    return TangentFeatures(
        sites=adapted.sites,
        reduction=reduction,
        draws=1,
        b=tuple(none for _ in v),
        a=tuple(None for _ in v),
        v=tuple(v),
        head=tuple(head),
        logits=logits,
    )


def looped_features(adapted: AdaptedModel, batch: Batch, reduction: OutputReduction) -> TangentFeatures:
    """Compute the tangent features of one batch with one forward pass, and a backward pass for each row and output.

    Args:
        adapted: Model in eval mode with groups.
        batch: Inputs of n examples, padded or not: the gradients are those in this batch.
        reduction: Scalar outputs to differentiate.

    Returns:
        Features of the batch, examples in its order.

    Raises:
        KernelError: As `group_features`.
    """
    n, k = len(batch.rows), reduction.n_outputs
    of_head = {name: list(module.parameters()) for name, module in adapted.head.items()}
    members = [list(group.parameters.values()) for group in adapted.groups]
    every = list({id(p): p for p in chain(*members, *of_head.values())}.values())
    gradients: list[list[Tensor | None]] = [[None] * (k * n) for _ in every]
    with training_alone(adapted.model, every), torch.enable_grad():
        logits = run_logits(adapted, batch)
        check_logits(logits, n, len(reduction.directions))
        outputs = logits @ torch.as_tensor(reduction.directions, dtype=logits.dtype, device=logits.device)
        for row in range(n) if outputs.requires_grad else ():
            for output in range(k):
                retain = row + 1 < n or output + 1 < k
                taken = torch.autograd.grad(outputs[row, output], every, retain_graph=retain, allow_unused=True)
                for place, gradient in enumerate(taken):
                    gradients[place][output * n + row] = gradient
    met = {id(p) for p, of_rows in zip(every, gradients, strict=True) if any(one is not None for one in of_rows)}
    by_id = {id(p): _stacked(p, of_rows, k, n) for p, of_rows in zip(every, gradients, strict=True) if id(p) in met}
    v = []
    for group, parameters in zip(adapted.groups, members, strict=True):
        if not met & {id(p) for p in parameters}:
            _check_reached(adapted, group)
        v.append(side_by_side(group, [by_id.get(id(p)) for p in parameters], k, n))
        check_finite(f"the gradients of {group.site.name!r}", v[-1])
    head = []
    for name, parameters in of_head.items():
        parts = [by_id.get(id(p), p.new_zeros(k, n, p.numel())) for p in parameters]
        dense = torch.cat(parts, dim=2)
        head.append(HeadFactor(g=None, h=None, dense=dense, bias=has_bias(adapted.head[name])))
        check_finite(f"the gradients of module {name!r}", dense)
    check_finite("the model's outputs", logits)
    return grouped(adapted, reduction, v, head, logits.detach())


def _stacked(parameter: Tensor, of_rows: Sequence[Tensor | None], k: int, n: int) -> Float[Tensor, "k n w"]:
    rows = [parameter.new_zeros(parameter.numel()) if one is None else one.flatten() for one in of_rows]
    return torch.stack(rows).detach().reshape(k, n, -1)


def _check_reached(adapted: AdaptedModel, group: Group) -> None:
    """Refuse a group that nothing depends on; one that other examples meet, but not these, is none."""
    if adapted.layout is None or group.site.name in adapted.layout.idle:
        raise KernelError(f"the outputs do not depend on {group.site.name!r}: leave it out")


@contextmanager
def training_alone(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Let some parameters alone have gradients for a pass, and restore the flags after it.

    Args:
        model: Any model.
        parameters: Of it.

    Yields:
        Nothing.
    """
    flags = {id(p): (p, p.requires_grad) for p in (*model.parameters(), *parameters)}
    chosen = {id(p) for p in parameters}
    try:
        for key, (parameter, flag) in flags.items():
            if flag != (key in chosen):
                parameter.requires_grad_(key in chosen)
        yield
    finally:
        for parameter, flag in flags.values():
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


def idle_groups(adapted: AdaptedModel, batch: Batch) -> tuple[str, ...]:
    """Name the groups that no output of a batch depends on.

    Args:
        adapted: Model in eval mode with groups.
        batch: Inputs.

    Returns:
        Names of sites.
    """
    members = [list(group.parameters.values()) for group in adapted.groups]
    every = list(chain(*members))
    with training_alone(adapted.model, every), torch.enable_grad():
        logits = run_logits(adapted, batch)
        total = logits.sum()
        taken = torch.autograd.grad(total, every, allow_unused=True) if total.requires_grad else [None] * len(every)
    met = {id(p) for p, gradient in zip(every, taken, strict=True) if gradient is not None}
    pairs = zip(adapted.groups, members, strict=True)
    return tuple(group.site.name for group, parameters in pairs if not met & {id(p) for p in parameters})
