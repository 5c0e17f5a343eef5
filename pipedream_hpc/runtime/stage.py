"""Stage: one replica of one stage, and what each action means for it.

It decides nothing. What runs when stands in the schedule, and how a tensor travels is the
transport's business::

    Receive activation 5   slots ──► leaves
    Forward 5 on v3        module(inputs, leaves) ──► exits       holds version 3 for unit 5
    Send activation 5      exits ──► outbox
    Receive gradient 2     slots
    Backward 2 on v0       backward(exits, gradients) ──► leaves' gradients, parameters' gradients
    Send gradient 2        leaves' gradients ──► outbox
    Weight gradient 2      what that backward put off, where it is split; maybe after another backward
    Reduce round 1         gradients averaged over the replicas
    Update to v2           optimizer writes the next version
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.job import Loss
from pipedream_hpc.model.cut import Part, enter
from pipedream_hpc.model.graph import Value
from pipedream_hpc.model.precision import Precision
from pipedream_hpc.model.randomness import seed_for, seed_layers, set_seed
from pipedream_hpc.runtime.accumulation import Accumulation
from pipedream_hpc.runtime.averaging import Averager
from pipedream_hpc.runtime.feed import Feed
from pipedream_hpc.runtime.footprint import Scales
from pipedream_hpc.runtime.put_off import PutOff
from pipedream_hpc.runtime.stash import WeightStash
from pipedream_hpc.runtime.statistics import statistics_kept
from pipedream_hpc.runtime.step import Step
from pipedream_hpc.runtime.tally import Tally
from pipedream_hpc.runtime.transport import Inbox, Outbox
from pipedream_hpc.runtime.view import alone
from pipedream_hpc.schedule.actions import (
    Backward,
    Forward,
    Payload,
    Receive,
    Schedule,
    Send,
    Update,
    WeightGradient,
)

#: (payload, stage at the other end, rank there)
Port = tuple[Payload, int, int]


@dataclass
class Ports:
    """The channel ends of one replica of one stage."""

    inboxes: dict[Port, Inbox] = field(default_factory=dict)
    outboxes: dict[Port, Outbox] = field(default_factory=dict)


@dataclass(slots=True)
class _Live:
    """A unit between its first and its last action in this stage."""

    entries: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # by the stage they came from
    gradients: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # likewise
    inputs: list[Any] = field(default_factory=list)
    exits: tuple[torch.Tensor, ...] = ()
    loss: torch.Tensor | None = None
    weight: torch.Tensor | None = None  # the gradient that backward begins with at the loss
    split: bool = False  # whether its backward has two parts

    def gradient_slots(self) -> set[int]:
        """The memory that received gradients stand in."""
        return {_storage(tensor) for received in self.gradients.values() for tensor in received}


class Stage:
    """One replica of one stage at work.

    Args:
        index: number of the stage.
        replica: number among its replicas.
        part: its module, and what goes in and out.
        links: what goes from which stage to which.
        stash: its weights.
        step: what is done with a round's gradients.
        averager: how they are averaged over replicas; None for a single one.
        ports: channel ends.
        loss: mean loss from (output, target); only used by the output stage.
        seed: of the run; random layers draw from (seed, unit, layer).
        put_off: the layers of `part` whose weights' gradients can wait; None where no schedule splits backwards.
        recompute: whether the forward is run again before the backward, instead of keeping activations.
        precision: a context that forwards run in, such as autocast.
        compiler: backend of torch.compile to compile the module with; None for none.
    """

    def __init__(
        self,
        index: int,
        replica: int,
        part: Part,
        links: Mapping[tuple[int, int], tuple[Value, ...]],
        stash: WeightStash,
        step: Step,
        averager: Averager | None,
        ports: Ports,
        loss: Loss,
        seed: int,
        *,
        put_off: PutOff | None,
        recompute: bool,
        precision: Precision,
        compiler: str | None = None,
    ) -> None:
        self.index, self.replica, self.part, self.module = index, replica, part, part.module
        self.stash, self.step, self.averager, self.ports = stash, step, averager, ports
        self.loss, self._seed, self.recomputes, self._precision = loss, seed, recompute, precision
        self.output = part.output
        #: Whether it takes something from the data set.
        self.reads = bool(part.inputs) or part.output
        # By the stage at the other end: whether an entry has a gradient; exits, and those that gradients come back for.
        self._needed = {
            source: [value.needs_gradient for value in values]
            for (source, target), values in links.items()
            if target == index
        }
        exit_of = {value.name: position for position, value in enumerate(part.exits)}
        outgoing = {target: values for (source, target), values in links.items() if source == index}
        self._exits = {far: [exit_of[value.name] for value in values] for far, values in outgoing.items()}
        self._coming_back = {
            far: [exit_of[value.name] for value in values if value.needs_gradient] for far, values in outgoing.items()
        }
        self._live: dict[int, _Live] = {}
        self._accumulation = Accumulation(stash, averager, put_off.keeps if put_off is not None else None)
        self._score: Loss = loss
        self._feed: Feed | None = None
        self._schedule: Schedule | None = None
        self._training, self._put_off = True, put_off
        self._waiting = 0  # units between the two parts of their backward
        self._unit_base = self._trained = self._version_base = 0
        self._current = 0
        self._weights: dict[float, torch.Tensor] = {}
        self.tally = Tally()
        self.scales = Scales()
        #: Shown ("gradient", round, names and tensors) before every update, and ("weight", ...) after it.
        self.watch: Callable[[str, int, Iterable[tuple[str, torch.Tensor | None]]], None] | None = None

        def reseed(name: str) -> None:
            """The same masks under any plan: drawn from (seed, unit, layer)."""
            set_seed(seed_for(seed, self._current, name))

        seed_layers(part.module, torch.compiler.disable(reseed) if compiler else reseed)  # type: ignore[no-untyped-call]
        # Weight versions are arguments to compiled code: to switch them compiles nothing anew.
        # A GraphModule called by its forward takes 3 µs less; nobody has hung hooks on it.
        self._call = torch.compile(part.module, backend=compiler) if compiler else part.module.forward

    def begin(self, schedule: Schedule, feed: Feed, unit_base: int, trained: int, score: Loss) -> None:
        """Make ready for one schedule.

        Args:
            schedule: whose actions are to come.
            feed: the minibatches.
            unit_base: number within the run of the schedule's unit 0; messages carry it, so that no
                unit of one epoch can be taken for one of another.
            trained: units trained before this schedule; random layers are seeded by the count, so that
                neither evaluations nor a new start in between change what they draw.
            score: what the output stage computes from (output, target).
        """
        self._schedule, self._feed, self._score = schedule, feed, score
        self._unit_base, self._trained = unit_base, trained
        self._training = schedule.training
        self._version_base = self.stash.version
        self.tally = Tally()
        self.module.train(self._training)
        if not self._training:
            self.stash.use_newest()

    def end(self) -> None:
        """Wait for the last sends; nothing of the schedule is left behind."""
        for outbox in self.ports.outboxes.values():
            outbox.drain()
        assert not self._live, "a schedule that passed the verifier leaves no unit behind"
        self._feed = None

    def ready(self, action: Receive | Send) -> bool:
        """Whether a message could be taken or handed over without waiting."""
        key = (action.payload, action.far, action.peer)
        if isinstance(action, Receive):
            return self.ports.inboxes[key].ready(self._unit_base + action.minibatch)
        return self.ports.outboxes[key].ready()

    def receive(self, action: Receive) -> None:
        unit = self._unit_base + action.minibatch
        tensors = self.ports.inboxes[action.payload, action.far, action.peer].receive(unit)
        live = self._live.setdefault(action.minibatch, _Live())
        if action.payload == "gradient":
            live.gradients[action.far] = tensors
            return
        # Leaves over the slots' memory: their gradients are what goes back.
        live.entries[action.far] = [
            tensor.detach().requires_grad_(self._training and needed)
            for tensor, needed in zip(tensors, self._needed[action.far], strict=True)
        ]

    def forward(self, action: Forward) -> None:
        assert self._feed is not None
        assert self._schedule is not None
        unit = action.minibatch
        live = self._live.setdefault(unit, _Live())
        live.inputs = [self._feed.input(unit, argument) for argument in self.part.inputs]
        if self._training:
            self.stash.acquire(self._unit_base + unit, self._version_base + action.version)
            self.scales.in_flight = max(self.scales.in_flight, self.stash.holders)
            live.split = self._put_off is not None and self._schedule.puts_off(self.index, unit)
        keep = self._training and not self.recomputes
        live.exits, score = self._run(unit, live, gradients=keep)
        if self.output:
            self._note_score(unit, live, score)
            if not self._training:
                self._leave(unit)

    def backward(self, action: Backward) -> None:
        assert self._schedule is not None
        unit = action.minibatch
        live = self._live[unit]
        self._check_version(unit, action)
        if self.recomputes:
            self._run_again(unit, live)
            self.scales.run_again = max(self.scales.run_again, 1 + self._waiting)
        tensors: list[torch.Tensor] = []
        gradients: list[torch.Tensor | None] = []
        if live.loss is not None and live.loss.requires_grad:
            tensors.append(live.loss)
            gradients.append(live.weight)
        for far, received in live.gradients.items():
            for position, gradient in zip(self._coming_back[far], received, strict=True):
                exit = live.exits[position]
                if exit.requires_grad:
                    tensors.append(exit)
                    gradients.append(gradient)
        if self.scales.unit_bytes is None:
            self._weigh(unit, live, tensors)
        if live.split:
            self._run_first_part(unit, live, tensors, gradients)
        else:
            self._begin_backward(unit)
            if tensors:
                _run_backward(tensors, gradients)
        live.loss, live.exits = None, ()
        for entries in live.entries.values():
            for entry in entries:
                # A stage of views hands the very gradient on that came in, or one that stands where a weight's
                # does. The send may still be under way when the slot is given back, or the next unit's is added.
                entry.grad = None if entry.grad is None else alone(entry.grad)
        if not live.split:
            self._take_over(unit, live)
            if not live.entries:
                self._leave(unit)

    def weight_gradient(self, action: WeightGradient) -> None:
        assert self._put_off is not None
        assert self._schedule is not None
        unit, live = action.minibatch, self._live[action.minibatch]
        self._check_version(unit, action)
        self._begin_backward(unit)
        for leaf, gradient in self._put_off.second_part(unit):
            self._accumulation.add(leaf, gradient)
        self._waiting -= 1
        self._take_over(unit, live)
        for far in self._schedule.sources(self.index):
            self._release(unit, "activation", far)
        self._leave(unit)

    def send(self, action: Send) -> None:
        unit, live = action.minibatch, self._live[action.minibatch]
        outbox = self.ports.outboxes[action.payload, action.far, action.peer]
        if action.payload == "activation":
            exits = [live.exits[position] for position in self._exits[action.far]]
            if not all(exit.requires_grad for exit in exits):
                # Without a gradient to come back, a slot may be given back before the send has gone.
                slots = {_storage(entry) for entries in live.entries.values() for entry in entries}
                free = [exit if exit.requires_grad else _apart(exit, slots) for exit in exits]
                exits = [tensor for tensor in free if tensor is not None]
            outbox.send(self._unit_base + unit, exits)
            if not self._training and action.far == self._last_target:
                self._leave(unit)
            return
        entries = live.entries.pop(action.far)
        wanted = [entry for entry in entries if entry.requires_grad]
        # The stage's output may not depend on all of its input.
        gradients = [torch.zeros_like(entry) if entry.grad is None else entry.grad for entry in wanted]
        outbox.send(self._unit_base + unit, gradients)
        if live.split:
            return
        self._release(unit, "activation", action.far)
        if not live.entries:
            self._leave(unit)

    def update(self, action: Update) -> None:
        assert self._schedule is not None
        round = action.version - 1
        count = self.step.count(self._schedule, self.index, round)
        gradients = self._accumulation.total(count)
        self._accumulation.close()
        self.scales.round(gradients)
        number = self.stash.version
        if self.watch is not None:
            self.watch("gradient", number, zip(self.stash.trained_names, gradients, strict=True))
        made = self.step.apply(self.stash, gradients, self._schedule, self.index, round)
        if made - self._version_base != action.version:
            raise RuntimeError(f"made version {made - self._version_base}, planned was {action.version}")
        if self.watch is not None:
            self.watch("weight", number, zip(self.stash.trained_names, self.stash.trained, strict=True))

    def gradients(self, count: int) -> list[torch.Tensor | None]:
        """The round's gradients, averaged over its `count` units."""
        return self._accumulation.total(count)

    # ------------------------------------------------------------------

    @property
    def _last_target(self) -> int:
        assert self._schedule is not None
        return self._schedule.targets(self.index)[-1]

    def _begin_backward(self, unit: int) -> None:
        assert self._schedule is not None
        last = self._schedule.last_of_round(self.index, unit)
        self._accumulation.begin(self.stash.slab_of(self._unit_base + unit), last=last)

    def _run_first_part(
        self, unit: int, live: _Live, tensors: list[torch.Tensor], gradients: list[torch.Tensor | None]
    ) -> None:
        """Backward to the entries; what it finds of weights on the way is kept for the second part."""
        assert self._put_off is not None
        if tensors:
            self._put_off.first_part(unit, lambda: _run_backward(tensors, gradients))
        self._waiting += 1
        self.scales.put_off = max(self.scales.put_off, self._waiting)
        if self.scales.waiting_bytes is None:
            waiting = {_storage(gradient): gradient.untyped_storage().nbytes() for gradient in self._put_off.kept(unit)}
            slots = live.gradient_slots()
            outputs = (size for place, size in waiting.items() if place not in slots)
            self.scales.waiting(outputs, self._put_off.early(unit))

    def _take_over(self, unit: int, live: _Live) -> None:
        """The backward of a unit is whole: its gradients are the stage's, and its version and slots free."""
        slab = self.stash.slab_of(self._unit_base + unit)
        # A parameter's gradient may stand in the slot, which is given back before the update.
        self._accumulation.keep_apart(slab, live.gradient_slots())
        self._accumulation.end(slab)
        self.stash.let_go(self._unit_base + unit)
        for far in live.gradients:
            self._release(unit, "gradient", far)
        live.gradients = {}

    def _weigh(self, unit: int, live: _Live, tensors: list[torch.Tensor]) -> None:
        """What the first unit keeps until its backward, beside weights and slots, before that begins."""
        graphs = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
        if live.split:
            assert self._put_off is not None
            graphs += self._put_off.graphs(unit)
        entries = [entry for each in live.entries.values() for entry in each]
        assert self._feed is not None
        read = [*live.inputs, self._feed.target(unit) if self.output else None]
        data = [each for each in tree_leaves(read) if isinstance(each, torch.Tensor)]
        self.scales.unit(graphs, [*self.module.parameters(), *entries], data)

    def _run(self, unit: int, live: _Live, *, gradients: bool) -> tuple[tuple[torch.Tensor, ...], Any]:
        """The module on a unit: its exits, and how the model's output scored if it is the output stage."""
        self._current = self._trained + unit
        # Whatever else is random in the stage does not depend on what this process did before.
        set_seed(seed_for(self._seed, self._current, self.index))
        entries = [entry for far in sorted(live.entries) for entry in live.entries[far]]
        arguments = [*live.inputs, *entries]
        for position in self.part.rewrites:
            argument = arguments[position]
            if position < len(live.inputs):
                arguments[position] = argument.clone()  # the data set's own
            elif argument.requires_grad:
                arguments[position] = enter(argument)
        count = len(self.part.exits)
        with _grad(gradients), self._precision():
            with self._put_off.noting(unit) if self._put_off is not None and live.split and gradients else _AS_IT_IS:
                returned = self.part.run(arguments, self._call)
            if not self.output:
                return returned[:count], None
            assert self._feed is not None
            return returned[:count], self._score(returned[count], self._feed.target(unit))

    def _note_score(self, unit: int, live: _Live, score: Any) -> None:
        """Take down how a unit scored; the loss is weighted by the unit's part in its round."""
        assert self._feed is not None
        if not isinstance(score, torch.Tensor) or score.dim() != 0:
            what = "loss" if self._training else "metric"
            got = f"shape {tuple(score.shape)}" if isinstance(score, torch.Tensor) else f"type {type(score).__name__}"
            raise PipedreamError(
                f"the {what} should be one number, the mean over the minibatch, but has {got}: "
                "take its mean (reduction='mean')"
            )
        self.tally.add(unit, score.detach(), self._feed.samples(unit))
        if self._training:
            live.loss, live.weight = score, self._weight(self._feed.weight(unit) * self.step.loss_scale, score)

    def _weight(self, weight: float, score: torch.Tensor) -> torch.Tensor:
        """The gradient of weight * score to score: as good as the product, without computing it."""
        made = self._weights.get(weight)
        if made is None or made.dtype != score.dtype:
            # Few at a time: units of full size have the same, until the loss scale changes.
            if len(self._weights) > 16:
                self._weights.clear()
            made = self._weights[weight] = torch.full_like(score, weight, requires_grad=False)
        return made

    def _run_again(self, unit: int, live: _Live) -> None:
        """Recompute what backward needs, on the weights of the unit's forward, with the same random numbers."""
        self.stash.bind(self._unit_base + unit)
        with statistics_kept(self.module):
            live.exits, score = self._run(unit, live, gradients=True)
        if self.output:
            tally, self.tally = self.tally, Tally()
            self._note_score(unit, live, score)
            self.tally = tally

    def _release(self, unit: int, payload: Payload, far: int) -> None:
        """Give the slot of a unit back to the rank of stage `far` that has the unit."""
        assert self._schedule is not None
        ranks = self._schedule.layout[far]
        self.ports.inboxes[payload, far, ranks[unit % len(ranks)]].release(self._unit_base + unit)

    def _leave(self, unit: int) -> None:
        assert self._feed is not None
        for far in self._live.pop(unit).entries:
            self._release(unit, "activation", far)
        if self.reads:
            self._feed.leave(unit)

    def _check_version(self, unit: int, action: Backward | WeightGradient) -> None:
        held = self.stash.version_of(self._unit_base + unit) - self._version_base
        if held != action.version:
            raise RuntimeError(f"runs on version {held}, planned was {action.version}")


_AS_IT_IS = nullcontext()


def _grad(enabled: bool) -> AbstractContextManager[Any]:
    """Gradients on or off; to set what is set already takes microseconds."""
    return _AS_IT_IS if torch.is_grad_enabled() == enabled else torch.set_grad_enabled(enabled)


def _run_backward(tensors: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> None:
    """torch.autograd.backward, but for what it looks at before, which takes 5 µs; the engine checks shapes itself."""
    torch.autograd.Variable._execution_engine.run_backward(
        tuple(tensors), tuple(gradients), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _apart(tensor: torch.Tensor | None, slots: Sequence[int] | set[int]) -> torch.Tensor | None:
    """`tensor`, copied if it stands in one of `slots`."""
    return tensor.clone() if tensor is not None and slots and _storage(tensor) in slots else tensor
