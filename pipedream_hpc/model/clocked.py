"""A whole minibatch with a clock between the layers, the way a stage will run them.

::

    forward    layer 0 │ layer 1 │ layer 2 + loss │
                       ◦         ◦                ◦     time noted down
    backward   layer 0 │ layer 1 │ layer 2 + loss │
                       ◦         ◦                      when the gradient of a layer's output is whole

A layer that is timed by itself finds its input in the cache, gets the memory that the layer before has
just given back, and pays autograd's way in and out. Within a minibatch the activations of all layers
are alive between forward and backward: memory comes fresh from the system, and backward fetches
from afar what forward left. On a small model both errors are as large as the layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from pipedream_hpc.model.clock import Clock, HostClock
from pipedream_hpc.model.cut import Cut
from pipedream_hpc.model.graph import LayerGraph
from pipedream_hpc.model.precision import Precision


class Clocked:
    """All layers of a captured model as one stage, each of them timed.

    Args:
        graph: the captured model.
        loss: of the model's output; without it backward begins at all that the model puts out.
        precision: what forwards run in.
        clock: of the device that the model is on.

    Attributes:
        forward_s: of every layer in the last minibatch; the last layer's with the loss.
        backward_s: likewise.
    """

    def __init__(
        self,
        graph: LayerGraph,
        loss: Callable[[Any], torch.Tensor] | None = None,
        precision: Precision | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._loss, self._clock, self._count = loss, clock or HostClock(), len(graph.layers)
        self._precision = precision or nullcontext
        self._part = Cut(graph, [range(self._count)]).part(0, isolated=False)
        self._number = {layer.name: index for index, layer in enumerate(graph.layers)}
        self._insert()
        self._forward: list[tuple[int, Any]] = []  # layer, and when its forward ended
        self._backward: list[tuple[int, Any]] = []  # layer, and when its backward began
        self._hooked: set[tuple[Any, int]] = set()
        self.forward_s = [0.0] * self._count
        self.backward_s = [0.0] * self._count

    def run(self, arguments: Sequence[Any]) -> None:
        """Forward and backward of one minibatch; gradients of the weights are dropped.

        Args:
            arguments: the model's, in the captured order.
        """
        self._forward, self._backward, self._hooked = [], [], set()
        began = self._clock.mark()
        given = [arguments[index] for index in self._part.inputs]
        for position in self._part.rewrites:
            given[position] = given[position].clone()
        with self._precision():
            output = self._part.run(given)[-1]
            if self._loss is not None:
                output = self._loss(output)
        self._forward.append((self._count - 1, self._clock.mark()))
        trained = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        del output
        ended = None
        if trained:
            ended = self._back(trained)
        self._note_times(began, ended)

    def _back(self, trained: list[torch.Tensor]) -> Any:
        """Backward from what is `trained`; when it ended."""
        gradients = [torch.full_like(each, 1.0 / max(each.numel(), 1)) for each in trained]
        self._backward.append((self._count - 1, self._clock.mark()))
        torch.autograd.backward(trained, gradients)
        ended = self._clock.mark()
        for parameter in self._part.module.parameters():
            parameter.grad = None
        return ended

    def _note_times(self, began: Any, ended: Any) -> None:
        """What is between the moments noted down; read only now, for that may wait for the device."""
        self.forward_s, self.backward_s = [0.0] * self._count, [0.0] * self._count
        marks = [began, *(mark for _, mark in self._forward), *(mark for _, mark in self._backward)]
        times = self._clock.read(marks if ended is None else [*marks, ended])
        count = len(self._forward)
        for (layer, _), (since_s, until_s) in zip(self._forward, itertools.pairwise(times[: count + 1]), strict=True):
            self.forward_s[layer] += until_s - since_s
        # Autograd goes back in the order of forward: between two marks one layer is at work.
        for (layer, _), (since_s, until_s) in zip(self._backward, itertools.pairwise(times[count + 1 :]), strict=True):
            self.backward_s[layer] += until_s - since_s

    def _insert(self) -> None:
        """Put a mark behind the last operation of every layer; it is shown what the layer puts out."""
        operations = self._part.module.graph
        last = {node.meta["layer"]: node for node in operations.nodes if "layer" in node.meta}
        for name, node in last.items():
            leaving = [
                each
                for each in operations.nodes
                if each.meta.get("layer") == name
                and any(user.meta.get("layer") != name for user in each.users if user.target != self._mark)
            ]
            with operations.inserting_after(node):
                operations.call_function(self._mark, (self._number[name], *leaving))
        self._part.module.recompile()

    def _mark(self, layer: int, *values: Any) -> None:
        """A layer's forward has ended."""
        self._forward.append((layer, self._clock.mark()))
        for value in tree_flatten(values)[0]:
            if not isinstance(value, torch.Tensor) or value.grad_fn is None:
                continue
            # A layer that hands on what it got has no backward of its own.
            place = value.grad_fn, value.output_nr
            if place not in self._hooked:
                self._hooked.add(place)
                value.register_hook(lambda _: self._backward.append((layer, self._clock.mark())))  # type: ignore[no-untyped-call]
