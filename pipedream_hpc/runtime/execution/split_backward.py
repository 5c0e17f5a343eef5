"""Split backward: the gradient of a stage's input first, the gradients of its weights later.

A backward through y = x Wᵀ computes two things, and neither needs the other (Qi et al., Zero Bubble Pipeline
Parallelism, ICLR 2024)::

    whole    │ gx = gy W │ gW = gyᵀ x │ gx ... │ gW ... │ send gx                     from the last layer to the first
    split    │ gx = gy W │ gx ... │ send gx    │ gW = gyᵀ x │ gW ... │
             └── BackwardInput ──┘             └── BackwardWeight ──┘

Linear layers and convolutions defer the gradients of their weights. Other layers have small weights and do not; their
gradients are kept until BackwardWeight adds all gradients of the microbatch to the round's. The gradients are those of
a whole backward, bit for bit, unless one microbatch uses a weight three or more times: then they are summed in another
order.

The forward of a deferring layer is a graph of its own. The stage's graph sees it as one function of x::

    stage     ... ──► x, W ──► [ function ] ──► y ──► ...     its backward asks the inner graph for gx and keeps gy
    inner             x' ─┐
                      W  ─┴► product ──► y'                   BackwardWeight asks it for gW with that gy

Everything else that uses the weight, or writes into y, is in the stage's graph and is treated as usual. A layer whose
weight is computed (not a parameter of its own) does not defer, nor does one whose weights have hooks, which autograd
would call without a gradient, nor one inside activation checkpointing, which would run its forward again for each such
graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from pipedream_hpc.planning.profile import SPLITTABLE_KINDS

#: Exactly these classes: a derived class may do anything.
_PRODUCTS = frozenset(getattr(nn, kind) for kind in SPLITTABLE_KINDS)
#: The parameters they compute with, unless somebody has replaced them.
_KEYS = {"weight", "bias"}


class DeferredCall:
    """One call of a layer in the forward of a microbatch, until the gradients of its weights are computed.

    Attributes:
        x: the input as a leaf of the inner graph.
        y: the output in the inner graph.
        gradient: the gradient of y, once backward has reached the call.
    """

    __slots__ = ("forward", "gradient", "leaves", "microbatch", "x", "y")

    def __init__(
        self, microbatch: _Microbatch, forward: Callable[[torch.Tensor], torch.Tensor], leaves: list[nn.Parameter]
    ) -> None:
        self.microbatch, self.forward, self.leaves = microbatch, forward, leaves
        self.x: torch.Tensor | None = None
        self.y: GradientEdge | None = None
        self.gradient: torch.Tensor | None = None

    def weight_gradients(self) -> dict[nn.Parameter, torch.Tensor]:
        """Compute the deferred gradients; empty if backward has not reached this call."""
        if self.gradient is None:
            return {}
        assert self.y is not None
        gradients = torch.autograd.grad(self.y, self.leaves, self.gradient)
        self.x = self.y = self.gradient = None
        return dict(zip(self.leaves, gradients, strict=True))


class _Product(torch.autograd.Function):
    """The layer of a call as a function of its input and its weights."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: DeferredCall, *leaves: nn.Parameter) -> torch.Tensor:
        ctx.call = call
        with torch.enable_grad():
            call.x = x.detach().requires_grad_()
            y = call.forward(call.x)
        call.y = get_gradient_edge(y)
        return y.data  # not a view of y', which nobody could write into

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call: DeferredCall = ctx.call
        assert call.x is not None
        assert call.y is not None
        if not call.microbatch.in_backward_input:  # the model differentiates within its forward
            of_input, *of_leaves = torch.autograd.grad(call.y, [call.x, *call.leaves], gradient, retain_graph=True)
            return (of_input, None, *of_leaves)
        call.gradient = gradient
        (of_input,) = torch.autograd.grad(call.y, call.x, gradient, retain_graph=True)
        return (of_input, None, *[None] * len(call.leaves))


@dataclass
class _Microbatch:
    """What is kept of one microbatch between the two parts of its backward.

    Attributes:
        calls: the deferred calls, in the order of the forward.
        leaves: the weights of these calls.
        early: gradients of weights that BackwardInput has computed, outside the deferred calls.
        in_backward_input: its BackwardInput is running.
    """

    calls: list[DeferredCall] = field(default_factory=list)
    leaves: set[nn.Parameter] = field(default_factory=set)
    early: dict[nn.Parameter, torch.Tensor] = field(default_factory=dict)
    in_backward_input: bool = False


class SplitBackward:
    """The deferring layers of a stage, and what its microbatches have deferred.

    Args:
        modules: those of the stage; the forwards of linear layers and convolutions among them are replaced.
        trained: tells whether a parameter is trained in this stage, in any version. A weight borrowed from another
            stage is not: its gradient is sent there with the gradient of the stage's input.
    """

    def __init__(self, modules: Iterable[nn.Module], trained: Callable[[nn.Parameter], bool]) -> None:
        self._trained = trained
        modules = list(modules)
        parameters = {leaf: None for layer in modules for leaf in layer._parameters.values() if leaf is not None}
        self._leaves = [leaf for leaf in parameters if trained(leaf)]
        self._microbatches: dict[int, _Microbatch] = {}
        self._recording: _Microbatch | None = None  # its forward is running
        self._in_backward_input: _Microbatch | None = None
        for layer in modules:
            if type(layer) in _PRODUCTS:
                layer.forward = _Forward(self, layer, layer.forward)

    @contextmanager
    def recording(self, microbatch: int) -> Iterator[None]:
        """Defer the weights' gradients of the forward that runs in the block."""
        self._recording = self._microbatches[microbatch] = _Microbatch()
        try:
            yield
        finally:
            self._recording = None

    def backward_input(self, microbatch: int, backward: Callable[[], None]) -> None:
        """Run `backward`, which stops at the stage's inputs; keep the weights' gradients that it computes."""
        kept = self._in_backward_input = self._microbatches[microbatch]
        kept.in_backward_input = True
        sums = [(leaf, leaf.grad) for leaf in self._leaves]
        for leaf in self._leaves:
            leaf.grad = None
        backward()
        kept.in_backward_input, self._in_backward_input = False, None
        for leaf, before in sums:
            if leaf.grad is not None:
                kept.early[leaf] = leaf.grad
            leaf.grad = before

    def keeps(self, leaf: nn.Parameter, gradient: torch.Tensor) -> bool:
        """Keep `gradient` of `leaf` if a BackwardInput is running; return whether it was kept."""
        if self._in_backward_input is None:
            return False
        self._in_backward_input.early[leaf] = gradient
        return True

    def backward_weight(self, microbatch: int) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Compute the deferred gradients; yield (weight, gradient), each while it is still in the caches."""
        kept = self._microbatches.pop(microbatch)
        while kept.calls:  # from the last layer to the first, as in backward
            call = kept.calls.pop()
            late = call.weight_gradients()
            for leaf in call.leaves:
                # Summed within the microbatch first, as a whole backward does.
                found = [each for each in (late.pop(leaf, None), kept.early.pop(leaf, None)) if each is not None]
                if found:
                    yield leaf, found[0] if len(found) == 1 else found[0] + found[1]
        yield from kept.early.items()

    def output_gradients(self, microbatch: int) -> list[torch.Tensor]:
        """Return the gradients of layers' outputs that BackwardWeight needs."""
        return [call.gradient for call in self._microbatches[microbatch].calls if call.gradient is not None]

    def early_gradients(self, microbatch: int) -> list[torch.Tensor]:
        """Return the weights' gradients that BackwardInput has computed and that wait for BackwardWeight."""
        return list(self._microbatches[microbatch].early.values())

    def graphs(self, microbatch: int) -> list[Node]:
        """Return the inner graphs of `microbatch`, which autograd keeps besides the stage's graph."""
        return [call.y.node for call in self._microbatches[microbatch].calls if call.y is not None]

    def deferred(
        self, layer: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
    ) -> DeferredCall | None:
        """Return a new deferred call of `layer`; None if its backward must be whole."""
        if self._recording is None or not torch.is_grad_enabled() or not x.requires_grad:
            return None
        if (
            torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
            or not layer._parameters.keys() >= _KEYS
        ):
            return None
        leaves = [leaf for leaf in layer._parameters.values() if leaf is not None and leaf.requires_grad]
        if any(leaf._backward_hooks for leaf in leaves):
            return None
        # A second call with the same weights is whole: a microbatch defers one gradient per weight.
        if not leaves or not all(map(self._trained, leaves)) or not self._recording.leaves.isdisjoint(leaves):
            return None
        call = DeferredCall(self._recording, forward, leaves)
        self._recording.calls.append(call)
        self._recording.leaves.update(leaves)
        return call


class _Forward:
    """Replaces the forward of a layer."""

    def __init__(self, owner: SplitBackward, layer: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
        self._owner, self._layer, self._forward = owner, layer, forward

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(args) == 1 and not kwargs:
            call = self._owner.deferred(self._layer, self._forward, args[0])
            if call is not None:
                y: torch.Tensor = _Product.apply(args[0], call, *call.leaves)  # type: ignore[no-untyped-call, unused-ignore]
                return y
        return self._forward(*args, **kwargs)
