"""Time every layer of a model within whole minibatches, in the order in which a stage runs them.

::

    forward    layer 0 │ layer 1 │ layer 2 + loss │
                       ◦         ◦                ◦     time stamp after each layer
    backward   layer 0 │ layer 1 │ layer 2 + loss │
                       ◦         ◦                      time stamp when the gradient of a layer's output is complete

A layer that is timed by itself finds its input in the cache, reuses the memory that the previous run has just freed,
and pays for autograd's start and end. Within a minibatch the activations of all layers are live from forward to
backward: memory comes fresh from the system, and backward reads what has left the cache since forward. On a small
model each of these errors is as large as the layers themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from pipedream_hpc.model.arguments import Arguments
from pipedream_hpc.model.clock import Clock, HostClock
from pipedream_hpc.model.graph import Call, LayerGraph
from pipedream_hpc.model.partition import Partition
from pipedream_hpc.model.precision import Precision
from pipedream_hpc.model.rerun import Step
from pipedream_hpc.model.structure import tensors_of_value


class ClockedModel:
    """All layers of a captured model as one stage, with a time stamp after each layer.

    Args:
        graph: the captured model.
        loss_fn: loss of the model's output; without it, backward starts at all outputs of the model.
        precision: context of the forward passes.
        clock: clock of the device that the model is on.

    Attributes:
        forward_s: forward seconds of every layer in the last minibatch; the last layer's include the loss.
        backward_s: backward seconds of every layer; the last layer's include the loss.
    """

    def __init__(
        self,
        graph: LayerGraph,
        loss_fn: Callable[[Any], torch.Tensor] | None = None,
        precision: Precision | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._loss_fn, self._clock, self._count = loss_fn, clock or HostClock(), len(graph.layers)
        self._precision = precision or nullcontext
        self._stage = Partition(graph, [range(self._count)]).stage_module(0, whole=False)
        self._layer_of = {call.number: index for index, layer in enumerate(graph.layers) for call in layer.calls}
        self._last_calls = {layer.calls[-1].number for layer in graph.layers}
        self._shown = {
            key
            for call in graph.training.calls
            for key in call.sources
            if self._layer_of[key[0]] != self._layer_of[call.number]
        }
        self._stage.train(True)
        self._stage.watch_calls(self._after)
        self._outputs: list[torch.Tensor] = []  # of the layer whose calls run
        self._forward: list[tuple[int, Any]] = []  # (layer, when its forward ended)
        self._backward: list[tuple[int, Any]] = []  # (layer, when its backward began)
        self._hooked: set[tuple[Any, int]] = set()
        self.forward_s = [0.0] * self._count
        self.backward_s = [0.0] * self._count

    def run(self, arguments: Arguments) -> None:
        """Run forward and backward of one minibatch; the gradients of the weights are discarded.

        Args:
            arguments: the model's arguments.
        """
        self._forward, self._backward, self._hooked = [], [], set()
        began = self._clock.mark()
        with self._precision():
            _, output = self._stage.run(arguments, [])
            if self._loss_fn is not None:
                output = self._loss_fn(output)
        self._forward.append((self._count - 1, self._clock.mark()))
        roots = [leaf for leaf in tensors_of_value(output) if leaf.requires_grad]
        del output
        ended = None
        if roots:
            ended = self._run_backward(roots)
        self._read_times(began, ended)

    def _run_backward(self, roots: list[torch.Tensor]) -> Any:
        """Run backward from `roots`; return the time stamp of its end."""
        gradients = [torch.full_like(each, 1.0 / max(each.numel(), 1)) for each in roots]
        self._backward.append((self._count - 1, self._clock.mark()))
        torch.autograd.backward(roots, gradients)
        ended = self._clock.mark()
        for parameter in self._stage.module.parameters():
            parameter.grad = None
        return ended

    def _read_times(self, began: Any, ended: Any) -> None:
        """Compute the times between the time stamps; reading these may wait for the device."""
        self.forward_s, self.backward_s = [0.0] * self._count, [0.0] * self._count
        marks = [began, *(mark for _, mark in self._forward), *(mark for _, mark in self._backward)]
        times = self._clock.read(marks if ended is None else [*marks, ended])
        count = len(self._forward)
        for (layer, _), (since_s, until_s) in zip(self._forward, itertools.pairwise(times[: count + 1]), strict=True):
            self.forward_s[layer] += until_s - since_s
        # Autograd runs in the reverse order of forward: between two time stamps only one layer is at work.
        for (layer, _), (since_s, until_s) in zip(self._backward, itertools.pairwise(times[count + 1 :]), strict=True):
            self.backward_s[layer] += until_s - since_s

    def _after(self, step: Step, outputs: Sequence[torch.Tensor | None]) -> None:
        """Mark the end of a layer after its last call."""
        assert isinstance(step.item, Call)
        number = step.item.number
        found = zip(step.found, outputs, strict=True)
        self._outputs += [value for each, value in found if value is not None and each.key in self._shown]
        if number in self._last_calls:
            self._mark(self._layer_of[number], self._outputs)
            self._outputs = []

    def _mark(self, layer: int, outputs: Sequence[torch.Tensor]) -> None:
        """Record the end of a layer's forward, and hook the gradients of its outputs to record when they complete."""
        self._forward.append((layer, self._clock.mark()))
        for value in outputs:
            if value.grad_fn is None:
                continue
            # A layer that returns its input has no backward of its own.
            place = value.grad_fn, value.output_nr
            if place not in self._hooked:
                self._hooked.add(place)
                value.register_hook(lambda _: self._backward.append((layer, self._clock.mark())))  # type: ignore[no-untyped-call]
