"""Every way of training in plain autograd: equations of the papers and nothing else.

With weight stashing (PipeDream, section 3.3), one replica per stage:

    w^(t+1) = w^(t) - ν · ∇f(w_1^(t-n+1), w_2^(t-n+2), ..., w_n^(t))

and in general: stage s runs unit k on version `version(s, k)`, versions of a stage are made by rounds of
units, and each round's gradients are averaged. What differs between schedules is these two functions.
Every version of every stage is kept as a copy of its own; nothing is shared with the workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from pipedream_hpc.verification.rounding import correct_square_roots

Batches = Sequence[tuple[Any, Any]]
Tensors = dict[str, torch.Tensor]
Gradients = Mapping[str, torch.Tensor | None]

#: Schedules whose units are microbatches.
CUT = ("1f1b-flush", "gpipe", "2bw", "interleaved")


@dataclass(frozen=True)
class Way:
    """A way of training.

    Attributes:
        kind: a schedule, by its name in schedule.kinds; `1f1b` with replicas is 1F1B-RR.
        replicas: of every stage.
        microbatches: to a minibatch.
        accumulate: minibatches per replica to an update.
        clip: largest norm of gradients, and whether over each "stage" or the "model".
        masters: whether bfloat16 weights are float32 masters, rounded after each step.
        split: 0 for whole backwards, 1 for split ones, 2 for those without a bubble. It changes nothing but the order
            in which a round's gradients add up.
    """

    kind: str = "1f1b"
    replicas: Sequence[int] = (1,)
    microbatches: int = 1
    accumulate: int = 1
    clip: tuple[float, str] | None = None
    masters: bool = False
    split: int = 0

    @property
    def pieces(self) -> int:
        """Units to a minibatch."""
        return self.microbatches if self.kind in CUT else 1

    def per_round(self, s: int) -> int:
        """Units that an update of stage s learns from."""
        return self.accumulate * (self.microbatches if self.kind in CUT else self.replicas[s])

    def warm_up(self, s: int) -> int:
        """ceil(ranks behind the stage / its replicas): forwards before the first backward."""
        return -(-sum(self.replicas[s + 1 :]) // self.replicas[s])

    def version(self, s: int, k: int) -> int:
        """The version that stage s runs unit k on, counted from the epoch's beginning."""
        if self.kind == "1f1b":
            return max(0, k // self.replicas[s] - self.warm_up(s)) // self.accumulate
        if self.kind == "vertical-sync":
            of_input = max(0, k // self.replicas[0] - self.warm_up(0)) // self.accumulate
            return self.replicas[0] * of_input // self.replicas[s]
        if self.kind == "2bw":
            return max(0, k // self.per_round(s) - 1)
        return k // self.per_round(s)  # synchronous: every round before it

    def before(self, s: int) -> int:
        """ceil(ranks before the stage / its replicas)."""
        return -(-sum(self.replicas[:s]) // self.replicas[s])

    def lag(self, s: int) -> int:
        """Units whose gradients wait while another's are computed, at most."""
        return (2 if self.kind == "gpipe" and max(self.replicas) == 1 else self.split) * self.before(s)

    def waits(self, s: int, turn: int, count: int) -> bool:
        """Whether the gradients of unit `turn` of the `count` that a replica of stage s has of a round wait."""
        last = 0 if self.kind == "gpipe" else self.split * (self.before(s) + self.warm_up(s) - 1) + 1
        some = turn < self.lag(s) or turn >= count - last
        return s > 0 and self.split > 0 and (some or max(self.replicas) > 1)

    def place(self, s: int, k: int, units: int) -> tuple[int, int]:
        """Which of its replica's in its round unit k of `units` is in stage s, and of how many."""
        begin = k // self.per_round(s) * self.per_round(s)
        own = range(begin + (k - begin) % self.replicas[s], min(begin + self.per_round(s), units), self.replicas[s])
        return own.index(k), len(own)


@dataclass(frozen=True)
class Event:
    """Something that training came to.

    Attributes:
        kind: `loss` of a unit, averaged `gradient` of a round, or `weight` after it.
        stage: whose; the last one's of a loss.
        number: of the unit, or of the round, within the run.
        tensors: by the parameters' names; of a loss under the name `loss`.
    """

    kind: str
    stage: int
    number: int
    tensors: Tensors


def train(
    model: nn.Module,
    stage_of: dict[str, int],
    epochs: Sequence[Batches],
    loss: Callable[[Any, Any], torch.Tensor],
    optimizer: Callable[..., torch.optim.Optimizer],
    way: Way | None = None,
    *,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    forward: Callable[[nn.Module, Tensors, Any], Any] = functional_call,
    seeded: Callable[[nn.Module, int], None] = lambda model, unit: None,
    note: Callable[[Event], None] = lambda event: None,
) -> Tensors:
    """Weights of the model after all epochs, by name.

    The whole model is run on a mixture of weights: of every stage the version that the unit meets there.

    Args:
        model: which is changed only in its buffers.
        stage_of: the stage of every parameter.
        epochs: the minibatches of each, as (inputs, target).
        loss: mean loss from (output, target).
        optimizer: called with the parameters of a stage.
        way: in which to train; 1F1B on single replicas by default.
        scheduler: makes a learning-rate scheduler from an optimizer; stepped once per minibatch.
        precision: a context for forwards.
        forward: runs (model, weights by name, inputs).
        seeded: called with every unit's number within the run before its forward.
        note: is told what training comes to, in its order.
    """
    n = max(stage_of.values()) + 1
    way = way or Way(replicas=[1] * n)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    own = [{name: p for name, p in trained.items() if stage_of[name] == s} for s in range(n)]
    stepped = [{name: _master(p) if way.masters else p for name, p in each.items()} for each in own]
    optimizers = [optimizer(each.values()) if each else None for each in stepped]
    schedulers = [scheduler(each) if scheduler and each else None for each in optimizers]
    versions = [[_copy(each)] for each in own]  # versions[s][v]
    run = 0
    for batches in epochs:
        begin = [len(of_stage) - 1 for of_stage in versions]
        units = _units(batches, way.pieces, way.accumulate if way.kind in CUT else 1)
        # sums[s][r]: of the gradients that replica r of stage s has made in this round
        sums: list[list[Tensors]] = [[{} for _ in range(R)] for R in way.replicas]
        # late[s][r]: of its units whose gradients are not among them yet, the oldest first
        late: list[list[list[Gradients]]] = [[[] for _ in range(R)] for R in way.replicas]
        for k, (inputs, target, weight) in enumerate(units):
            leaves: Tensors = {}
            for s in range(n):
                used = versions[s][begin[s] + way.version(s, k)]
                leaves.update({name: w.clone().requires_grad_() for name, w in used.items()})
            seeded(model, run + k)
            with precision():
                scored = loss(forward(model, leaves, inputs), target)
            note(Event("loss", n - 1, run + k, {"loss": scored.detach()}))
            if scored.requires_grad:
                torch.autograd.backward(scored if weight == 1 else scored * weight)
            for s in range(n):
                r, (turn, count) = k % way.replicas[s], way.place(s, k, len(units))
                found = {name: leaf.grad for name, leaf in leaves.items() if stage_of[name] == s}
                waiting = late[s][r]
                if way.waits(s, turn, count):
                    waiting.append(found)
                else:
                    _add(sums[s][r], found)
                while waiting and (turn + 1 == count or len(waiting) > way.lag(s)):
                    _add(sums[s][r], waiting.pop(0))
            ending = [s for s in range(n) if (k + 1) % way.per_round(s) == 0 or k + 1 == len(units)]
            averages = {}
            for s in ending:
                count = (k % way.per_round(s)) + 1 if way.kind not in CUT else 1
                averages[s] = _averaged(sums[s], count)
                note(Event("gradient", s, len(versions[s]) - 1, {name: g.clone() for name, g in averages[s].items()}))
                sums[s] = [{} for _ in range(way.replicas[s])]
            _clip(averages, way.clip)
            for s in ending:
                for name, parameter in stepped[s].items():
                    gradient = averages[s].get(name)
                    parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
                stepping = optimizers[s]
                if stepping is not None:
                    with correct_square_roots():
                        stepping.step()  # acts on the newest version
                for name, parameter in own[s].items():
                    parameter.data.copy_(stepped[s][name])
                versions[s].append(_copy(own[s]))
                note(Event("weight", s, len(versions[s]) - 2, versions[s][-1]))
                rates = schedulers[s]
                for _ in range(-(-((k % way.per_round(s)) + 1) // way.pieces)):
                    if rates is not None:
                        rates.step()
        run += len(units)
    return {name: value for of_stage in versions for name, value in of_stage[-1].items()} | frozen


def _units(batches: Batches, pieces: int, accumulate: int) -> list[tuple[Any, Any, float]]:
    """(inputs, target, weight of its loss): minibatches, or the microbatches they are cut into."""
    units = []
    for number, (inputs, target) in enumerate(batches):
        sharing = min(accumulate, len(batches) - number // accumulate * accumulate)
        for piece in range(pieces):
            x, y = tree_map(lambda each, piece=piece: _piece(each, piece, pieces), (inputs, target))
            weight = 1.0 if pieces == sharing == 1 else _samples(x) / _samples(inputs) / sharing
            units.append((x, y, weight))
    return units


def _piece(value: Any, index: int, pieces: int) -> Any:
    """The part of a tensor's samples that belongs to a microbatch."""
    if pieces == 1 or not isinstance(value, torch.Tensor) or not value.dim():
        return value
    return value.tensor_split(pieces)[index]


def _samples(inputs: Any) -> int:
    return next(len(each) for each in tree_leaves(inputs) if isinstance(each, torch.Tensor))


def _add(total: Tensors, found: Gradients) -> None:
    for name, gradient in found.items():
        if gradient is not None:
            total[name] = total[name] + gradient if name in total else gradient


def _averaged(of_replicas: list[Tensors], count: int) -> Tensors:
    total: Tensors = {}
    for own in of_replicas:
        _add(total, own)
    return {name: gradient / count if count > 1 else gradient for name, gradient in total.items()}


def _clip(averages: dict[int, Tensors], clip: tuple[float, str] | None) -> None:
    if clip is None:
        return
    squares = {s: sum(float(g.double().pow(2).sum()) for g in found.values()) for s, found in averages.items()}
    for s, found in averages.items():
        norm = (squares[s] if clip[1] == "stage" else sum(squares.values())) ** 0.5
        if norm > clip[0]:
            for gradient in found.values():
                gradient.mul_(clip[0] / (norm + 1e-6))


def _master(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().float()) if parameter.dtype == torch.bfloat16 else parameter


def _copy(parameters: dict[str, nn.Parameter]) -> Tensors:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}
