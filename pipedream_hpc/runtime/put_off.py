"""Put off: gradients of weights are computed after the gradient of the stage's input has gone upstream.

A backward through y = x Wᵀ computes two things, neither of which needs the other::

    whole    │ gx = gy W │ gW = gyᵀ x │ gx ... │ gW ... │ send gx                       from the last layer to the first
    split    │ gx = gy W │ gx ... │ send gx    │ gW = gyᵀ x │ gW ... │

Linear layers and convolutions put theirs off; the others, whose weights take little, do not, but what is found of
them is kept until all is there: a unit's gradients are added to the round's as a whole. They are those of a whole
backward, to the bit; but of a weight that is used three times in a unit, whose gradients add up in another order.

How. The forward of such a layer is a graph of its own, which the stage's graph knows as one function of x alone::

    stage     ... ──► x, W ──► [ function ] ──► y ──► ...     its backward asks the inner graph for gx, and keeps gy
    inner             x' ─┐
                      W  ─┴► product ──► y'                   asked for gW with that gy, when there is time

Whatever else uses the weight, or writes over y, is in the stage's graph and treated as ever. A layer whose weight is
no parameter of its own is whole, and so is one within activation checkpointing, which would run its forward again for
every such graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from pipedream_hpc.planning.profile import PRODUCTS

#: Exactly these: a class derived from one may do anything.
_PRODUCTS = frozenset(getattr(nn, kind) for kind in PRODUCTS)
#: What they compute with, when nobody has put anything else in the place of these parameters.
_KEYS = {"weight", "bias"}


class Call:
    """One call of a layer in the forward of a unit, until the gradients of its weights are there."""

    __slots__ = ("forward", "gradient", "leaves", "unit", "x", "y")

    def __init__(
        self, unit: _Unit, forward: Callable[[torch.Tensor], torch.Tensor], leaves: list[nn.Parameter]
    ) -> None:
        self.unit, self.forward, self.leaves = unit, forward, leaves
        self.x: torch.Tensor | None = None
        self.y: GradientEdge | None = None
        self.gradient: torch.Tensor | None = None  # of y, once backward has brought it

    def finish(self) -> dict[nn.Parameter, torch.Tensor]:
        """Compute what was put off: weights and their gradients; empty if backward has not come to this call."""
        if self.gradient is None:
            return {}
        assert self.y is not None
        found = torch.autograd.grad(self.y, self.leaves, self.gradient)
        self.x = self.y = self.gradient = None
        return dict(zip(self.leaves, found, strict=True))


class _Product(torch.autograd.Function):
    """The layer of a call as a function of its input and its weights."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: Call, *leaves: nn.Parameter) -> torch.Tensor:
        ctx.call = call
        with torch.enable_grad():
            call.x = x.detach().requires_grad_()
            y = call.forward(call.x)
        call.y = get_gradient_edge(y)
        return y.data  # no view of y', or nobody could write over it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call: Call = ctx.call
        assert call.x is not None
        assert call.y is not None
        if not call.unit.splitting:  # somebody differentiates within the forward
            to_input, *to_leaves = torch.autograd.grad(call.y, [call.x, *call.leaves], gradient, retain_graph=True)
            return (to_input, None, *to_leaves)
        call.gradient = gradient
        (to_input,) = torch.autograd.grad(call.y, call.x, gradient, retain_graph=True)
        return (to_input, None, *[None] * len(call.leaves))


@dataclass
class _Unit:
    """What one unit has put off."""

    calls: list[Call] = field(default_factory=list)
    leaves: set[nn.Parameter] = field(default_factory=set)  # that take part in them
    # What the first part of its backward has found of any weight's gradient, from uses outside those calls.
    early: dict[nn.Parameter, torch.Tensor] = field(default_factory=dict)
    splitting: bool = False  # whether its backward runs its first part


class PutOff:
    """The layers of a stage that put the gradients of their weights off, and what its units have put off.

    Args:
        module: the stage.
        trained: whether a parameter is one of the stage's own, of which there is one version. One that is borrowed
            from another stage is not: its gradient goes there with that of the stage's input.
    """

    def __init__(self, module: nn.Module, trained: Callable[[nn.Parameter], bool]) -> None:
        self._trained = trained
        self._leaves = [leaf for leaf in module.parameters() if trained(leaf)]
        self._units: dict[int, _Unit] = {}
        self._noting: _Unit | None = None  # whose forward runs
        self._splitting: _Unit | None = None  # whose backward runs
        for layer in module.modules():
            if type(layer) in _PRODUCTS:
                layer.forward = _Forward(self, layer, layer.forward)

    @contextmanager
    def noting(self, unit: int) -> Iterator[None]:
        """Put off what the forward within computes with."""
        self._noting = self._units[unit] = _Unit()
        try:
            yield
        finally:
            self._noting = None

    def first_part(self, unit: int, backward: Callable[[], None]) -> None:
        """Run `backward` of `unit` to the stage's entries; what it finds of weights is kept here."""
        own = self._splitting = self._units[unit]
        own.splitting = True
        sums = [(leaf, leaf.grad) for leaf in self._leaves]
        for leaf in self._leaves:
            leaf.grad = None
        backward()
        own.splitting, self._splitting = False, None
        for leaf, before in sums:
            if leaf.grad is not None:
                own.early[leaf] = leaf.grad
            leaf.grad = before

    def keeps(self, leaf: nn.Parameter, gradient: torch.Tensor) -> bool:
        """Whether `gradient`, which the backward that runs has found of `leaf`, is kept here for the second part."""
        if self._splitting is None:
            return False
        self._splitting.early[leaf] = gradient
        return True

    def second_part(self, unit: int) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Compute what `unit` has put off: weights and their gradients, each to be used while it is in the caches."""
        own = self._units.pop(unit)
        while own.calls:  # from the last layer to the first, as in backward
            call = own.calls.pop()
            late = call.finish()
            for leaf in call.leaves:
                # Added up within the unit first, as a whole backward would have it.
                both = [
                    gradient for gradient in (late.pop(leaf, None), own.early.pop(leaf, None)) if gradient is not None
                ]
                if both:
                    yield leaf, both[0] if len(both) == 1 else both[0] + both[1]
        yield from own.early.items()

    def kept(self, unit: int) -> list[torch.Tensor]:
        """Gradients of layers' outputs that wait for the second part."""
        return [call.gradient for call in self._units[unit].calls if call.gradient is not None]

    def early(self, unit: int) -> list[torch.Tensor]:
        """Gradients of weights that nobody puts off, and that wait for those of the others."""
        return list(self._units[unit].early.values())

    def graphs(self, unit: int) -> list[Node]:
        """What autograd keeps for `unit` beside the stage's graph."""
        return [call.y.node for call in self._units[unit].calls if call.y is not None]

    def call(self, layer: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Call | None:
        """A call of `layer`; None where its backward is to be whole."""
        if self._noting is None or not torch.is_grad_enabled() or not x.requires_grad:
            return None
        if (
            torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
            or not layer._parameters.keys() >= _KEYS
        ):
            return None
        leaves = [leaf for leaf in layer._parameters.values() if leaf is not None and leaf.requires_grad]
        # A second call with the same weights is whole: what a unit adds to a weight later is one gradient.
        if not leaves or not all(map(self._trained, leaves)) or not self._noting.leaves.isdisjoint(leaves):
            return None
        made = Call(self._noting, forward, leaves)
        self._noting.calls.append(made)
        self._noting.leaves.update(leaves)
        return made


class _Forward:
    """In the place of a layer's forward."""

    def __init__(self, owner: PutOff, layer: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
        self._owner, self._layer, self._forward = owner, layer, forward

    def __call__(self, *arguments: Any, **named: Any) -> torch.Tensor:
        if len(arguments) == 1 and not named:
            call = self._owner.call(self._layer, self._forward, arguments[0])
            if call is not None:
                made: torch.Tensor = _Product.apply(arguments[0], call, *call.leaves)  # type: ignore[no-untyped-call]
                return made
        return self._forward(*arguments, **named)
