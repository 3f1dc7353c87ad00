"""The one engine: a pass over a batch that hands out each linear module's inputs and output gradients as they come.

For a module y_t = W h_t and a scalar output z_a of one example, h comes from a hook in the forward pass and
g_at = ∂z_a/∂y_t from a hook in the backward pass, one for each output. No gradient of a weight is ever formed. The
lowest outputs of the modules become leaves of the graph: nothing is propagated below them. What is kept of h until g
comes, and what becomes of the two, is the business of a sink: LoRA blocks (`foretune.ntk.jacobian`) or token factors
(`foretune.ntk.factors`). What must hold for either is checked here.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foretune.arrays import Array
from foretune.errors import KernelError, reason
from foretune.models.adapted import AdaptedModel, Batch
from foretune.models.packed import computing_dtype
from foretune.ntk.premises import (
    check_eval_mode,
    check_finite,
    check_logits,
    frozen,
    leaves_of,
    named_outputs,
    on_gradient,
    passing_gradients,
)

HALF_PRECISION = 2e-2  # relative error that half precision explains
Receive = Callable[[int, Tensor], None]
Directions = Float[Array, "classes k"]


@runtime_checkable
class Sink(Protocol):
    """What becomes of inputs and gradients."""

    def use(self, module: str, h: Float[Tensor, "n positions d_in"], y: Float[Tensor, "n positions d_out"]) -> Receive:
        """Take the inputs and outputs of one use of a module; one that runs several times in a pass has as many.

        Args:
            module: Its name.
            h: n × positions × d_in inputs.
            y: n × positions × d_out outputs; the model may change them in place after this call.

        Returns:
            What takes, for each output a that depends on this use, a and its n × positions × d_out gradients g_a.
        """
        ...

    def finish(self) -> Iterable[tuple[str, Tensor]]:
        """Bring what came into its final form; called once, when every gradient is there.

        Returns:
            Name of a module and a tensor that is kept of it, for all of them; all must be finite.
        """
        ...


class SharedError(KernelError):
    """A module does not have the examples of a batch on its first axis."""


@dataclass(frozen=True)
class Observation:
    """What a pass has shown.

    Attributes:
        logits: n × C outputs, or n × T × V.
        used: Modules that ran.
        reached: Modules that an output depends on.
    """

    logits: Float[Tensor, "n ..."]
    used: frozenset[str]
    reached: frozenset[str]


def run_logits(adapted: AdaptedModel, batch: Batch) -> Tensor:
    """Run the model.

    Args:
        adapted: The model.
        batch: Inputs.

    Returns:
        Its logits, whether it gives an object with names or a tuple.

    Raises:
        KernelError: If the model refuses the inputs, as BART does texts with ends in their midst.
    """
    with adapted.forward():
        return _logits(adapted.model, batch)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    with named_outputs(model):
        try:
            output = model(**batch.inputs)
        except ValueError as error:
            raise KernelError(f"{type(model).__name__} refuses the texts: {reason(error)}") from error
    logits: Tensor = output[0] if isinstance(output, tuple) else output.logits
    return logits


def observe(
    adapted: AdaptedModel, batch: Batch, directions: Directions, on_use: Callable[[str, Tensor, Tensor], Receive]
) -> Observation:
    """Run one forward pass and one backward pass for each output, with hooks on all adapted and head modules.

    Args:
        adapted: Model in eval mode.
        batch: Inputs of n examples.
        directions: C × k: output a of an example is `logits @ directions[:, a]`; with k = 0 there is no backward pass.
        on_use: Called in the forward pass with a module's name, its inputs and its outputs as they are; what it returns
            is called in the backward pass of each output that depends on this use.

    Returns:
        Logits, and which modules ran and matter.
    """

    def totals(logits: Tensor) -> Tensor:
        check_logits(logits, len(batch.rows), len(directions))
        return (logits @ torch.as_tensor(directions, dtype=logits.dtype, device=logits.device)).sum(0)

    return observe_totals(adapted, batch, totals, on_use)


def observe_totals(
    adapted: AdaptedModel,
    batch: Batch,
    totals: Callable[[Tensor], Float[Tensor, " k"]],
    on_use: Callable[[str, Tensor, Tensor], Receive],
) -> Observation:
    """Run one forward pass and one backward pass for each of some numbers, with hooks on all adapted and head modules.

    Args:
        adapted: Model in eval mode.
        batch: Inputs of n examples.
        totals: Makes k numbers of the logits, each summed over the examples: the gradients of one example do not meet
            those of another. There are as many backward passes.
        on_use: As in `observe`.

    Returns:
        Logits, and which modules ran and matter.
    """
    used, reached = set[str](), set[str]()
    output = 0
    going_back = False

    def hook(name: str) -> Callable[..., Tensor]:
        def forward(_: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
            if going_back:  # a checkpoint runs its part again for the tensors that it saves: this is no other use
                return on_gradient(result, lambda _: None)
            if not torch.is_grad_enabled():
                raise KernelError(
                    f"module {name!r} runs without gradients, as in a checkpoint with use_reentrant=True: switch "
                    "checkpointing off, or use use_reentrant=False"
                )
            used.add(name)
            with torch.no_grad():
                receive = on_use(name, args[0].detach(), result.detach())

            def backward(gradient: Tensor) -> None:
                reached.add(name)
                with torch.no_grad():
                    receive(output, gradient)

            return on_gradient(result, backward)

        return forward

    handles = [module.register_forward_hook(hook(name)) for name, module in adapted.modules.items()]
    try:
        # the adapters stay as in the forward pass until the last backward pass: a checkpoint runs its part again
        with frozen(adapted.model), passing_gradients(adapted.model), torch.enable_grad(), adapted.forward():
            logits = _logits(adapted.model, batch)
            going_back = True
            with torch.autocast(logits.device.type, enabled=False):  # mixed precision ends with the forward pass
                numbers = totals(logits)
                ends = leaves_of(logits)
                for output in range(len(numbers) if ends else 0):
                    retain = output + 1 < len(numbers)
                    torch.autograd.grad(numbers[output], ends, retain_graph=retain, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return Observation(logits.detach(), frozenset(used), frozenset(reached))


def capture(adapted: AdaptedModel, batch: Batch, directions: Directions, sink: Sink) -> Float[Tensor, "n classes"]:
    """Run the passes of one batch and let a sink have what comes.

    Args:
        adapted: Model in eval mode with its adapters.
        batch: Inputs of n examples.
        directions: C × k: output a of an example is `logits @ directions[:, a]`.
        sink: Takes the inputs and gradients of all adapted and head modules.

    Returns:
        n × C logits.

    Raises:
        SharedError: If the examples are not on the first axis of a module for certain.
        KernelError: If the logits are not n × C, a module is not reached by the outputs, or what the sink keeps, or
            an output, is not finite (the module is named).
    """
    n, looked = len(batch.rows), adapted.layout is not None

    def by_example(name: str, tensor: Tensor) -> Tensor:
        """View as n × positions × width; all that a single example's pass holds is the example's."""
        # unless the layout is known, a tensor n × n × … might have the examples on either axis
        on_first = tensor.ndim > 1 and tensor.shape[0] == n and (looked or tensor.shape[:2] != (n, n))
        if n > 1 and not on_first:
            raise SharedError(f"module {name!r} does not have the examples on its first axis: use --batch-size 1")
        return tensor.reshape(n, -1, tensor.shape[-1])

    def on_use(name: str, h: Tensor, y: Tensor) -> Receive:
        receive = sink.use(name, by_example(name, h), by_example(name, y))
        return lambda output, gradient: receive(output, by_example(name, gradient))

    observed = observe(adapted, batch, directions, on_use)
    for name in adapted.modules:
        _check_reached(adapted, name, observed)
    for name, tensor in sink.finish():
        check_finite(f"the gradients of module {name!r}", tensor)
    check_finite("the model's outputs", observed.logits)
    return observed.logits


def _check_reached(adapted: AdaptedModel, name: str, observed: Observation) -> None:
    """Refuse a module that nothing depends on; an expert that other examples meet, but not these, is none."""
    if name in observed.reached or (adapted.layout is not None and name not in adapted.layout.idle):
        return
    if any(name in group.modules and observed.reached & set(group.modules) for group in adapted.groups):
        return  # others use its parameters, such as a tied table
    if name not in observed.used:
        raise KernelError(f"module {name!r} is not used in the forward pass: leave it out")
    if name not in adapted.head:  # a part of the head may run and not be read, as BigBird's pooler: its gradient is 0
        raise KernelError(f"the outputs do not depend on module {name!r}: leave it out")


AnySink = TypeVar("AnySink", bound=Sink)


def capture_in_turn(
    adapted: AdaptedModel, batch: Batch, directions: Directions, make_sink: Callable[[int], AnySink]
) -> Iterator[tuple[Int[Tensor, " n"], AnySink, Float[Tensor, "n classes"]]]:
    """Capture a batch whatever the layout of the model: at once, or example by example where it must be.

    Args:
        adapted: Model with its adapters.
        batch: Inputs of some examples.
        directions: C × k, as in `capture`.
        make_sink: Makes a sink for a number of examples.

    Yields:
        Places of examples in the batch, the sink that has them, and their logits.

    Raises:
        KernelError: As `capture`, or if the model is not in eval mode.
    """
    check_eval_mode(adapted.model)
    n = len(batch.rows)
    singly = n > 1 and adapted.layout is not None and bool(adapted.layout.singly)
    if not singly:
        sink = make_sink(n)
        try:
            logits = capture(adapted, batch, directions, sink)
        except SharedError:
            pass
        else:
            yield torch.arange(n), sink, logits
            return
    for place, one in enumerate(batch.singles()):
        sink = make_sink(1)
        yield torch.tensor([place]), sink, capture(adapted, one, directions, sink)


class Uses:
    """All uses of one module in a pass, side by side: its gradient is a sum over uses and positions.

    Args:
        module: Linear module, for its widths where it is not used.
        n: Examples.
    """

    def __init__(self, module: nn.Module, n: int) -> None:
        self._module, self._n = module, n
        self._inputs: list[Tensor] = []
        self._gradients: list[dict[int, Tensor]] = []

    def use(self, h: Float[Tensor, "n positions d_in"]) -> Receive:
        """Note a use, as `Sink.use`.

        Args:
            h: Its inputs.

        Returns:
            What notes its gradients.
        """
        gradients: dict[int, Tensor] = {}
        self._inputs.append(h)
        self._gradients.append(gradients)
        return gradients.__setitem__

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for modules that read the same tensors in the same order."""
        return tuple((h.data_ptr(), h.shape, h.stride()) for h in self._inputs) or (id(self),)

    @property
    def h(self) -> Float[Tensor, "n positions d_in"]:
        """Inputs, use after use."""
        return self._joined(self._inputs, "in_features")

    def g(self, output: int) -> Float[Tensor, "n positions d_out"]:
        """Gradients, use after use.

        Args:
            output: Which output's.

        Returns:
            The gradients; zeros where the output does not depend on a use.
        """
        width = int(getattr(self._module, "out_features"))  # noqa: B009  # mypy takes every attribute for a tensor
        return self._joined(
            [
                gradients[output] if output in gradients else h.new_zeros(*h.shape[:2], width)
                for h, gradients in zip(self._inputs, self._gradients, strict=True)
            ],
            "out_features",
        )

    def read_inputs(self, direction: Float[Array, " classes"]) -> Float[Tensor, "n d_in"]:
        """Inputs φ of an output layer, logits = V φ + b, whatever the model does to get there.

        An output z = d · logits has ∂z/∂V = Σ_t g_t h_tᵀ = d φᵀ, so that φ = Σ_t (d · g_t) h_t / ‖d‖². Of a model that
        runs the layer over all positions and reads one, this is h there; of one that averages their logits, the mean.

        Args:
            direction: The C numbers d of output 0.

        Returns:
            The inputs.

        Raises:
            KernelError: If the layer's outputs are added up or scaled, and with them its bias.
        """
        h, g = self.h, self.g(0)
        weights = torch.as_tensor(direction / (direction @ direction), dtype=g.dtype, device=g.device)
        share = (g @ weights).to(h.dtype)
        times = share.sum(1)
        if getattr(self._module, "bias", None) is not None and bool((times - 1.0).abs().max() > HALF_PRECISION):
            raise KernelError(
                f"the logits hold the bias of the output layer {float(times[0]):.3g} times: forecasts and probes know "
                "logits = V φ + b only, use the head policy 'random' or a layer without bias"
            )
        read = share != 0
        if bool((read.sum(1) == 1).all()):
            return h[torch.arange(len(h), device=h.device), read.long().argmax(1)]
        return torch.einsum("nt,ntp->np", share, h)

    def _joined(self, tensors: list[Tensor], width: str) -> Tensor:
        if not tensors:  # an expert that none of these examples meets
            device, size = next(self._module.parameters()).device, int(getattr(self._module, width))
            return torch.zeros(self._n, 0, size, dtype=computing_dtype(self._module), device=device)
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)
