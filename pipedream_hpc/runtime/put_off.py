"""Put off: gradients of weights are computed after the gradient of the stage's input has gone upstream.

A backward through y = x Wᵀ computes two things, neither of which needs the other::

    whole    │ gx = gy W │ gW = gyᵀ x │ gx ... │ gW ... │ send gx                       from the last layer to the first
    split    │ gx = gy W │ gx ... │ send gx    │ gW = gyᵀ x │ gW ... │

Layers with a product (linear, convolution) put theirs off; the others, whose weights take little, do not. Nothing is
computed otherwise than before, so the bits are the same; but of a weight that is used three times in a unit, whose
gradients are added up in another order.

How. Within its own forward such a layer has *twins* in the place of its weights: other leaves over the same
memory. A first backward goes to the stage's inputs and to all leaves but the twins, and a hook notes down the
gradient that comes to each layer's output. The second one goes from there to the twins, layer by layer. Whatever
uses a weight outside its layer's forward, as a tied output layer does, uses the leaf and not the twin,
so nothing is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge

#: Their weights' gradients take as long as their input's.
_HEAVY = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class Call:
    """One call of a layer in the forward of a unit, until the gradients of its weights are there."""

    __slots__ = ("_came", "_hook", "edge", "layer", "leaves", "twins")

    def __init__(
        self, layer: nn.Module, leaves: list[nn.Parameter], twins: list[nn.Parameter], output: torch.Tensor
    ) -> None:
        assert output.grad_fn is not None
        self.layer, self.leaves, self.twins = layer, leaves, twins
        self.edge = GradientEdge(output.grad_fn, output.output_nr)
        self._came: tuple[torch.Tensor | None, ...] = ()
        self._hook = output.grad_fn.register_prehook(self._note)

    @property
    def reached(self) -> bool:
        """Whether backward has brought the gradient of its output."""
        return bool(self._came)

    def _note(self, gradients: tuple[torch.Tensor | None, ...]) -> None:
        self._came = gradients

    def finish(self) -> dict[nn.Parameter, torch.Tensor]:
        """Compute what was put off: weights and their gradients."""
        self._hook.remove()  # the graph and this hold each other, and nothing collects that
        came = [
            (GradientEdge(self.edge.node, index), each) for index, each in enumerate(self._came) if each is not None
        ]
        edges, gradients = zip(*came, strict=True)
        run_backward(edges, gradients, inputs=self.twins)
        return self.taken()

    def taken(self) -> dict[nn.Parameter, torch.Tensor]:
        """Weights and the gradients that have come to their twins, which have none then."""
        self._hook.remove()
        found = {}
        for leaf, twin in zip(self.leaves, self.twins, strict=True):
            if twin.grad is not None:
                found[leaf], twin.grad = twin.grad, None
        return found


class PutOff:
    """The layers of a stage that put the gradients of their weights off.

    Args:
        module: the stage. Its weights are re-pointed at other leaves from version to version.
    """

    def __init__(self, module: nn.Module) -> None:
        self._calls: list[Call] | None = None  # of the forward that runs
        self._used: set[nn.Parameter] = set()  # weights that have a twin in it
        self._twins: dict[nn.Parameter, nn.Parameter] = {}
        self._whole: set[nn.Module] = set()  # layers that were found not to be fit for it
        for layer in module.modules():
            if isinstance(layer, _HEAVY):
                _Swap(self, layer)

    def note(self, calls: list[Call] | None) -> None:
        """Put off what the forward that comes computes with, and note it down in `calls`; None: nothing."""
        self._calls = calls
        self._used.clear()

    def swap(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        """Give `layer` twins for its weights, if it takes part in the forward that runs; returns the weights."""
        if self._calls is None or layer in self._whole or not torch.is_grad_enabled():
            return {}
        held = layer._parameters
        leaves = {key: leaf for key, leaf in held.items() if leaf is not None and leaf.requires_grad}
        if "weight" not in leaves:
            return {}
        if not self._used.isdisjoint(leaves.values()):
            # Called twice, or it shares weights with another layer: a second backward from one call would go
            # through the other, too. From now on nothing of them is put off.
            self._whole.add(layer)
            self._whole.update(call.layer for call in self._calls if not set(call.leaves).isdisjoint(leaves.values()))
            return {}
        self._used.update(leaves.values())
        for key, leaf in leaves.items():
            if leaf not in self._twins:
                self._twins[leaf] = nn.Parameter(leaf.detach())
            held[key] = self._twins[leaf]
        return leaves

    def ran(self, layer: nn.Module, leaves: dict[str, nn.Parameter], output: Any) -> None:
        """`layer` has run on twins of `leaves`: gives it these back."""
        held = layer._parameters
        twins = [self._twins[leaf] for leaf in leaves.values()]
        held.update(leaves)
        if self._calls is not None and isinstance(output, torch.Tensor) and output.grad_fn is not None:
            self._calls.append(Call(layer, list(leaves.values()), twins, output))

    def backward(
        self,
        tensors: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
        leaves: Sequence[torch.Tensor],
        calls: list[Call],
    ) -> dict[nn.Parameter, torch.Tensor]:
        """Backward from `tensors` to `leaves`, but for what `calls` put off.

        Returns weights and gradients that could not be put off; takes their calls out of `calls`.
        """
        run_backward(tensors, gradients, [*leaves, *(call.edge for call in calls)], keep_graph=True)
        missed = [call for call in calls if not call.reached]
        if not missed:
            return {}
        # The output was written over, which gave it another place in the graph; or nothing depends on it.
        run_backward(tensors, gradients, [twin for call in missed for twin in call.twins], keep_graph=True)
        self._whole.update(call.layer for call in missed)
        calls[:] = [call for call in calls if call.reached]
        return {leaf: gradient for call in missed for leaf, gradient in call.taken().items()}


class _Swap:
    """The hooks of one layer."""

    def __init__(self, owner: PutOff, layer: nn.Module) -> None:
        self._owner, self._leaves = owner, dict[str, nn.Parameter]()
        layer.register_forward_pre_hook(self._enter)
        layer.register_forward_hook(self._leave, always_call=True)

    def _enter(self, layer: nn.Module, arguments: Any) -> None:
        self._leaves = self._owner.swap(layer)

    def _leave(self, layer: nn.Module, arguments: Any, output: Any) -> None:
        if self._leaves:
            leaves, self._leaves = self._leaves, {}
            self._owner.ran(layer, leaves, output)


def run_backward(
    tensors: Sequence[torch.Tensor | GradientEdge],
    gradients: Sequence[torch.Tensor | None],
    inputs: Sequence[torch.Tensor | GradientEdge] = (),
    *,
    keep_graph: bool = False,
) -> None:
    """torch.autograd.backward, but for what it looks at before, which takes 5 µs; the engine checks shapes itself."""
    torch.autograd.Variable._execution_engine.run_backward(
        tuple(tensors), tuple(gradients), keep_graph, False, tuple(inputs), allow_unreachable=True, accumulate_grad=True
    )
