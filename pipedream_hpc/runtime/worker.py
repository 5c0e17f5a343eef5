"""Worker: carries out the actions of one rank, one by one.

It decides nothing. What runs when stands in the schedule, and how a tensor travels is the
transport's business; the worker knows what Forward, Backward, Send, ... mean for its stage::

    Receive activation 5   slot ──► leaf
    Forward 5 on v3        module(leaf) ──► output        holds version 3 for minibatch 5
    Send activation 5      output ──► outbox
    Receive gradient 2     slot
    Backward 2 on v0       output.backward(gradient) ──► leaf.grad, parameter gradients
    Send gradient 2        leaf.grad ──► outbox
    Update to v4           optimizer writes the next version
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.job import Loss
from pipedream_hpc.model.cut import enter
from pipedream_hpc.runtime.feed import Feed, seed_for
from pipedream_hpc.runtime.stash import WeightStash
from pipedream_hpc.runtime.transport import Inbox, Outbox
from pipedream_hpc.schedule.actions import Action, Backward, Forward, Receive, Send, Update
from pipedream_hpc.schedule.trace import Kind, Span


class ActionError(RuntimeError):
    """An action failed: says on which rank, in which stage, at which action; the cause is chained."""


@dataclass
class Ports:
    """The ends of the channels of one rank; None where the pipeline begins or ends."""

    activation_in: Inbox | None = None
    activation_out: Outbox | None = None
    gradient_in: Inbox | None = None
    gradient_out: Outbox | None = None


@dataclass
class _Live:
    """A minibatch between its first and its last action on this rank."""

    entry: torch.Tensor | None = None
    output: torch.Tensor | None = None
    gradient: torch.Tensor | None = None


@dataclass
class Tally:
    """Mean scores of the output stage's minibatches, each with its number of samples."""

    parts: list[tuple[torch.Tensor, int]] = field(default_factory=list)

    def add(self, mean: torch.Tensor, samples: int) -> None:
        # Read out only at the end of the epoch: reading a number waits for the device.
        self.parts.append((mean, samples))

    def mean(self) -> float:
        """Mean over all samples; not a number if there were none."""
        samples = sum(count for _, count in self.parts)
        return sum(mean.item() * count for mean, count in self.parts) / samples if samples else float("nan")


class Worker:
    """One rank's stage, weights and channel ends.

    Args:
        rank: number of the rank.
        stage: number of the stage it holds.
        module: the stage module.
        stash: the weights of the stage.
        ports: channel ends.
        loss: mean loss from (output, target); only used by the output stage.
        seed: of the run; random layers draw from (seed, minibatch, layer).
    """

    def __init__(
        self,
        rank: int,
        stage: int,
        module: fx.GraphModule,
        stash: WeightStash,
        ports: Ports,
        loss: Loss,
        seed: int,
    ) -> None:
        self.rank, self.stage, self.module, self.stash, self.ports = rank, stage, module, stash, ports
        self.loss, self._seed = loss, seed
        self._rewrites_input = bool(module.meta["rewrites_input"])
        self._do: dict[type, Callable[[Any], None]] = {
            Receive: self._receive,
            Send: self._send,
            Forward: self._forward,
            Backward: self._backward,
            Update: self._update,
        }
        self._live: dict[int, _Live] = {}
        self._gradients: list[torch.Tensor | None] = []
        self._spans: list[tuple[int, Kind, int, int, int, int]] | None = None
        self._minibatch_base = self._version_base = 0
        self._training = True
        self._score: Loss = loss
        self._feed: Feed | None = None
        self.tally = Tally()
        self._lookup: dict[int, int] = {}
        self._seed_random_layers()

    def begin(self, feed: Feed, minibatch_base: int, *, training: bool, score: Loss, trace: bool) -> None:
        """Make ready for one schedule.

        Args:
            feed: the minibatches.
            minibatch_base: number within the run of the schedule's minibatch 0; messages carry it,
                so that no minibatch of one epoch can be taken for one of another.
            training: whether the schedule has backwards.
            score: what the output stage computes from (output, target).
            trace: whether to note down when each action ran.
        """
        self._feed, self._minibatch_base, self._training, self._score = feed, minibatch_base, training, score
        self._version_base = self.stash.version
        self.tally = Tally()
        self._spans = [] if trace else None
        self.module.train(training)
        if not training:
            self.stash.use_newest()

    def end(self) -> None:
        """Wait for the last sends; nothing of the schedule is left behind."""
        for outbox in (self.ports.activation_out, self.ports.gradient_out):
            if outbox is not None:
                outbox.drain()
        assert not self._live, "a schedule that passed the verifier leaves no minibatch behind"
        self._feed = None

    def ready(self, action: Action) -> bool:
        """Whether `action` would run without waiting for another rank."""
        if isinstance(action, Receive):
            return self._inbox(action.payload).ready(self._minibatch_base + action.minibatch)
        if isinstance(action, Send):
            return self._outbox(action.payload).ready()
        return True

    def run(self, action: Action) -> None:
        """Carry out one action.

        Raises:
            PipedreamError: bad input, with rank, stage and action before its sentence.
            ActionError: whatever else went wrong, likewise; the cause is chained.
        """
        began = time.perf_counter_ns()
        try:
            self._do[type(action)](action)
        except PipedreamError as error:
            raise PipedreamError(f"rank {self.rank} (stage {self.stage}) at '{action}': {error}") from error
        except Exception as error:
            raise ActionError(
                f"rank {self.rank} (stage {self.stage}) failed at '{action}': {type(error).__name__}: {error}"
            ) from error
        if self._spans is not None:
            minibatch = getattr(action, "minibatch", -1)
            version = getattr(action, "version", -1)
            kind: Kind = type(action).__name__.lower()  # type: ignore[assignment]
            self._spans.append((action.stage, kind, minibatch, version, began, time.perf_counter_ns()))

    def spans(self, epoch_ns: int) -> list[Span]:
        """What ran since `begin`, with times in seconds since `epoch_ns` on this process's clock."""
        return [
            Span(self.rank, stage, kind, minibatch, version, (began - epoch_ns) * 1e-9, (ended - epoch_ns) * 1e-9)
            for stage, kind, minibatch, version, began, ended in self._spans or ()
        ]

    def _receive(self, action: Receive) -> None:
        tensor = self._inbox(action.payload).receive(self._minibatch_base + action.minibatch)
        live = self._live.setdefault(action.minibatch, _Live())
        if action.payload == "activation":
            # A leaf over the slot's memory: its gradient is what goes back.
            live.entry = tensor.detach().requires_grad_(self._training)
        else:
            live.gradient = tensor

    def _forward(self, action: Forward) -> None:
        assert self._feed is not None
        live = self._live.setdefault(action.minibatch, _Live())
        if self.ports.activation_in is None:
            live.entry = self._feed.input(action.minibatch)
        assert live.entry is not None
        if self._training:
            self._check_version(self.stash.acquire(action.minibatch), action)
        self._current = self._minibatch_base + action.minibatch
        # Whatever else is random in the stage does not depend on what this process did before.
        torch.manual_seed(seed_for(self._seed, self._current, self.stage))
        with torch.set_grad_enabled(self._training):
            entry = live.entry
            output = self.module(enter(entry) if self._rewrites_input and entry.requires_grad else entry)
            if self.ports.activation_out is None:
                samples = output.shape[0]
                output = self._score(output, self._feed.target(action.minibatch))
                if output.dim() != 0:
                    what = "loss" if self._training else "metric"
                    raise PipedreamError(
                        f"the {what} should be one number, the mean over the minibatch, but has shape "
                        f"{tuple(output.shape)}: take its mean (reduction='mean')"
                    )
                self.tally.add(output.detach(), samples)
        live.output = output
        if not self._training and self.ports.activation_out is None:
            self._finish(action.minibatch)

    def _send(self, action: Send) -> None:
        live = self._live[action.minibatch]
        minibatch = self._minibatch_base + action.minibatch
        if action.payload == "activation":
            assert live.output is not None
            output = live.output
            if not self._training:
                # The slot is given back at once, so nothing in it may still be on its way.
                output = _apart_from(output, live.entry)
            self._outbox("activation").send(minibatch, output)
            if not self._training:
                self._finish(action.minibatch)
            return
        assert isinstance(live.entry, torch.Tensor)
        gradient = live.entry.grad
        if gradient is None:  # the stage's output does not depend on its input
            gradient = torch.zeros_like(live.entry)
        self._outbox("gradient").send(minibatch, gradient)
        self._finish(action.minibatch)

    def _backward(self, action: Backward) -> None:
        live = self._live[action.minibatch]
        self._check_version(self.stash.version_of(action.minibatch), action)
        assert live.output is not None
        if live.output.requires_grad:
            torch.autograd.backward(live.output, live.gradient)
        live.output = None
        self._gradients = self.stash.release(action.minibatch)
        if self.ports.gradient_in is not None:
            if self.ports.gradient_out is not None and live.entry is not None:
                # A stage of views hands the very gradient on that came in; that send may still be
                # under way when the slot is given back.
                live.entry.grad = _apart_from(live.entry.grad, live.gradient)
            # So may a parameter's gradient be, which is kept until the update.
            self._gradients = [_apart_from(gradient, live.gradient) for gradient in self._gradients]
            live.gradient = None
            self.ports.gradient_in.release(self._minibatch_base + action.minibatch)
        if self.ports.gradient_out is None:
            self._finish(action.minibatch)

    def _update(self, action: Update) -> None:
        made = self.stash.update(self._gradients)
        self._gradients = []
        if made - self._version_base != action.version:
            raise RuntimeError(f"made version {made - self._version_base}, planned was {action.version}")

    def _finish(self, minibatch: int) -> None:
        del self._live[minibatch]
        if self.ports.activation_in is not None:
            self.ports.activation_in.release(self._minibatch_base + minibatch)

    def _check_version(self, held: int, action: Forward | Backward) -> None:
        if held - self._version_base != action.version:
            raise RuntimeError(f"ran on version {held - self._version_base}, planned was {action.version}")

    def _inbox(self, payload: str) -> Inbox:
        inbox = self.ports.activation_in if payload == "activation" else self.ports.gradient_in
        assert inbox is not None
        return inbox

    def _outbox(self, payload: str) -> Outbox:
        outbox = self.ports.activation_out if payload == "activation" else self.ports.gradient_out
        assert outbox is not None
        return outbox

    def _seed_random_layers(self) -> None:
        """Draw the masks of dropout from (seed, minibatch, layer), so that every plan draws the same."""

        def seeder(name: str) -> Callable[[torch.nn.Module, Any], None]:
            def seed(module: torch.nn.Module, _: Any) -> None:
                if module.training:
                    torch.manual_seed(seed_for(self._seed, self._current, name))

            return seed

        self._current = 0
        for name, module in self.module.named_modules():
            # Recurrent and attention layers keep their dropout as a number.
            number = getattr(module, "dropout", None)
            if isinstance(module, torch.nn.modules.dropout._DropoutNd) or (isinstance(number, float) and number > 0):
                module.register_forward_pre_hook(seeder(name))


def _apart_from(tensor: torch.Tensor | None, slot: torch.Tensor | None) -> Any:
    """`tensor`, copied if it shares memory with `slot`."""
    if tensor is None or slot is None:
        return tensor
    shared = tensor.untyped_storage().data_ptr() == slot.untyped_storage().data_ptr()
    return tensor.clone() if shared else tensor
