"""Reference: every way of training in plain autograd, from the equations of the papers and nothing else.

With weight stashing (PipeDream, section 3.3), one replica per stage:

    w^(t+1) = w^(t) - ν · ∇f(w_1^(t-n+1), w_2^(t-n+2), ..., w_n^(t))

and in general: stage s runs microbatch k on version `version(s, k)`, each round of microbatches makes one version of a
stage, and the gradients of a round are averaged. Schedules differ only in these functions. Every version of every
stage is a copy of its own; nothing is shared with the runtime.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from pipedream_hpc.job import LossFn
from pipedream_hpc.verification.rounding import correct_square_roots

Batches = Sequence[tuple[Any, Any]]
Tensors = dict[str, torch.Tensor]
Gradients = Mapping[str, torch.Tensor | None]

#: Schedules with split backwards: the schedule that they are otherwise, and how many times the distance from the
#: input stage gradients are delayed. Splitting only changes the order in which a round's gradients are added up.
_SPLIT = {"zb-h1": ("1f1b-flush", 1), "zb-h2": ("1f1b-flush", 2), "gpipe-split": ("gpipe", 1)}
#: Schedules that split minibatches into microbatches.
_CUT = ("1f1b-flush", "gpipe", "2bw", "interleaved")


@dataclass(frozen=True)
class ReferenceConfig:
    """A way of training.

    Attributes:
        schedule: name of a schedule as in schedule.registry; `1f1b` with replicas is 1F1B-RR.
        replicas: of every stage.
        n_microbatches: microbatches per minibatch.
        gradient_accumulation_steps: minibatches per replica in a round.
        clip: largest norm of the gradients, and whether of each "stage" or of the "model"; None for no clipping.
        master_weights: whether bfloat16 weights are float32 masters, rounded after each step.
        batch_dims: name of an input, "target", or a path in them -> the dimension of its samples; None for one that
            has none.
    """

    schedule: str = "1f1b"
    replicas: Sequence[int] = (1,)
    n_microbatches: int = 1
    gradient_accumulation_steps: int = 1
    clip: tuple[float, str] | None = None
    master_weights: bool = False
    batch_dims: Mapping[str, int | None] = field(default_factory=dict)

    @property
    def unsplit(self) -> str:
        """The schedule, apart from split backwards."""
        return _SPLIT.get(self.schedule, (self.schedule, 0))[0]

    @property
    def split(self) -> int:
        """0 for whole backwards; 1 for split ones; 2 for split ones with twice the microbatches in flight."""
        return _SPLIT.get(self.schedule, (self.schedule, 0))[1]

    @property
    def cuts_minibatches(self) -> bool:
        """Whether minibatches are split into microbatches."""
        return self.unsplit in _CUT

    @property
    def per_minibatch(self) -> int:
        """Microbatches that pass for a minibatch."""
        return self.n_microbatches if self.cuts_minibatches else 1

    def round_size(self, s: int) -> int:
        """Return the microbatches in a round of stage s."""
        return self.gradient_accumulation_steps * (self.n_microbatches if self.cuts_minibatches else self.replicas[s])

    def warm_up(self, s: int) -> int:
        """Return ceil(ranks after the stage / its replicas): forwards before the first backward."""
        return -(-sum(self.replicas[s + 1 :]) // self.replicas[s])

    def version(self, s: int, k: int) -> int:
        """Return the version that stage s runs microbatch k on, counted from the beginning of the epoch."""
        if self.unsplit == "1f1b":
            return max(0, k // self.replicas[s] - self.warm_up(s)) // self.gradient_accumulation_steps
        if self.unsplit == "vertical-sync":
            of_input = max(0, k // self.replicas[0] - self.warm_up(0)) // self.gradient_accumulation_steps
            return self.replicas[0] * of_input // self.replicas[s]
        if self.unsplit == "2bw":
            return max(0, k // self.round_size(s) - 1)
        return k // self.round_size(s)  # synchronous: all rounds before it

    def before(self, s: int) -> int:
        """Return ceil(ranks before the stage / its replicas)."""
        return -(-sum(self.replicas[:s]) // self.replicas[s])

    def lag(self, s: int) -> int:
        """Return the most microbatches whose gradients are deferred while another's are computed."""
        return (2 if self.unsplit == "gpipe" and max(self.replicas) == 1 else self.split) * self.before(s)

    def is_deferred(self, s: int, turn: int, count: int) -> bool:
        """Return whether the weight gradients of a microbatch are deferred.

        Args:
            s: the stage.
            turn: number of the microbatch among those of its replica in the round.
            count: microbatches of its replica in the round.
        """
        last = 0 if self.unsplit == "gpipe" else self.split * (self.before(s) + self.warm_up(s) - 1) + 1
        some = turn < self.lag(s) or turn >= count - last
        return s > 0 and self.split > 0 and (some or max(self.replicas) > 1)

    def turn(self, s: int, k: int, total: int) -> tuple[int, int]:
        """Return the number of microbatch k among those of its replica of stage s in the round, and their count.

        Args:
            s: the stage.
            k: the microbatch.
            total: microbatches of the epoch.
        """
        begin = k // self.round_size(s) * self.round_size(s)
        own = range(begin + (k - begin) % self.replicas[s], min(begin + self.round_size(s), total), self.replicas[s])
        return own.index(k), len(own)


@dataclass(frozen=True)
class Event:
    """A result of training that can be compared.

    Attributes:
        kind: `loss` of a microbatch, averaged `gradient` of a round, or `weight` after it.
        stage: the stage; the last one for a loss.
        epoch: the epoch.
        number: of the microbatch or the round, within the epoch.
        tensors: by the names of parameters; a loss under the name `loss`.
    """

    kind: str
    stage: int
    epoch: int
    number: int
    tensors: Tensors


def train(
    model: nn.Module,
    stage_of: dict[str, int],
    epochs: Sequence[Batches],
    loss_fn: LossFn,
    optimizer: Callable[..., torch.optim.Optimizer],
    config: ReferenceConfig | None = None,
    *,
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    during: Callable[[int], AbstractContextManager[None]] = lambda microbatch: nullcontext(),
    on_event: Callable[[Event], None] = lambda event: None,
) -> Tensors:
    """Train and return the weights of the model after all epochs, by name.

    The whole model runs on a mixture of weights: those of every stage in the version that the microbatch meets there.

    Args:
        model: only its buffers are changed.
        stage_of: the stage of every parameter.
        epochs: the minibatches of each, as (inputs, target).
        loss_fn: mean loss, or a pair (sum, count), from (output, target): then the gradients of a round are those of
            the sum of its sums, divided by the sum of its counts.
        optimizer: called with the parameters of a stage.
        config: the way of training; 1F1B on single replicas by default.
        lr_scheduler: creates a learning-rate scheduler from an optimizer; stepped once per minibatch.
        precision: a context for forwards.
        forward: runs (model, inputs), where the model has the weights to use; by default inputs are its arguments.
        during: makes the context of a microbatch, forward and backward, from its number within the run.
        on_event: called with every result, in the order of training.
    """
    n = max(stage_of.values()) + 1
    config = config or ReferenceConfig(replicas=[1] * n)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    for name, p in trained.items():
        vars(p).setdefault("qualified_name", name)  # as factories get parameters in the pipeline
    own = [{name: p for name, p in trained.items() if stage_of[name] == s} for s in range(n)]
    stepped = [{name: _master(p) if config.master_weights else p for name, p in each.items()} for each in own]
    optimizers = [optimizer(list(each.values())) if each else None for each in stepped]
    lr_schedulers = [lr_scheduler(each) if lr_scheduler and each else None for each in optimizers]
    versions = [[_copy(each)] for each in own]  # versions[s][v]
    pools = any(config.round_size(s) > 1 for s in range(n))
    names = list(inspect.signature(model.forward).parameters)
    split = partial(_split, config.batch_dims, names)
    training = _Training(model, loss_fn, precision, forward or _call, pools)
    first = 0  # number of the epoch's first microbatch within the run
    for epoch, batches in enumerate(epochs):
        begin = [len(of_stage) - 1 for of_stage in versions]
        accumulation_steps = config.gradient_accumulation_steps if config.cuts_minibatches else 1
        microbatches = _microbatches(batches, config.per_minibatch, accumulation_steps, split)
        # sums[s][r]: of the gradients of replica r of stage s in this round
        sums: list[list[Tensors]] = [[{} for _ in range(R)] for R in config.replicas]
        # deferred[s][r]: gradients of its microbatches that are not in the sum yet, the oldest first
        deferred: list[list[list[Gradients]]] = [[[] for _ in range(R)] for R in config.replicas]
        counts: dict[int, float] = {}  # of the losses that are pairs, by microbatch
        for k, (inputs, target, weight) in enumerate(microbatches):
            leaves: Tensors = {}
            for s in range(n):
                used = versions[s][begin[s] + config.version(s, k)]
                leaves.update({name: w.clone().requires_grad_() for name, w in used.items()})
            with during(first + k):
                named = {f"model.{name}": leaf for name, leaf in leaves.items()}
                loss, count = functional_call(training, named, (inputs, target, weight))
            on_event(Event("loss", n - 1, epoch, k, {"loss": loss}))
            if count is not None:
                counts[k] = float(count)
            for s in range(n):
                r, (turn, count) = k % config.replicas[s], config.turn(s, k, len(microbatches))
                gradients = {name: leaf.grad for name, leaf in leaves.items() if stage_of[name] == s}
                waiting = deferred[s][r]
                if config.is_deferred(s, turn, count):
                    waiting.append(gradients)
                else:
                    _add(sums[s][r], gradients)
                while waiting and (turn + 1 == count or len(waiting) > config.lag(s)):
                    _add(sums[s][r], waiting.pop(0))
            ending = [s for s in range(n) if (k + 1) % config.round_size(s) == 0 or k + 1 == len(microbatches)]
            averages = {}
            for s in ending:
                divisor: float = 1 if config.cuts_minibatches else (k % config.round_size(s)) + 1
                if counts and pools:
                    round = range(k // config.round_size(s) * config.round_size(s), k + 1)
                    divisor = sum(counts[each] for each in round) or 1.0
                averages[s] = _average(sums[s], divisor)
                copies = {name: gradient.clone() for name, gradient in averages[s].items()}
                on_event(Event("gradient", s, epoch, len(versions[s]) - 1 - begin[s], copies))
                sums[s] = [{} for _ in range(config.replicas[s])]
            _clip(averages, config.clip)
            for s in ending:
                for name, parameter in stepped[s].items():
                    gradient = averages[s].get(name)
                    parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
                own_optimizer, own_scheduler = optimizers[s], lr_schedulers[s]
                if own_optimizer is not None:
                    with correct_square_roots():
                        own_optimizer.step()  # on the newest version
                for name, parameter in own[s].items():
                    parameter.data.copy_(stepped[s][name])
                versions[s].append(_copy(own[s]))
                on_event(Event("weight", s, epoch, len(versions[s]) - 2 - begin[s], versions[s][-1]))
                for _ in range(-(-((k % config.round_size(s)) + 1) // config.per_minibatch)):
                    if own_scheduler is not None:
                        own_scheduler.step()
        first += len(microbatches)
    return {name: value for of_stage in versions for name, value in of_stage[-1].items()} | frozen


class _Training(nn.Module):
    """A model's forward, loss and backward, for which functional_call gives the model other weights.

    A backward needs them, too, where the model has activation checkpointing of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        precision: Callable[[], AbstractContextManager[Any]],
        run: Callable[[nn.Module, Any], Any],
        pools: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self._precision, self._run, self._pools = precision, run, pools
        self._loss = [loss_fn]  # a loss may be a module, and is not ours

    def forward(self, inputs: Any, target: Any, weight: float) -> tuple[torch.Tensor, Any]:
        """Return the loss of a microbatch and its count, if it has one.

        Its backward has left `weight` times the gradients of the loss; with a count those of the sum, if rounds have
        several microbatches, and of the loss otherwise.
        """
        with self._precision():
            returned = self._loss[0](self._run(self.model, inputs), target)
            total, count = returned if isinstance(returned, tuple) else (returned, None)
            loss = total if count is None else total / max(count, 1)
        root = loss if count is None or not self._pools else total
        if root.requires_grad:
            torch.autograd.backward(root if weight == 1 or count is not None else root * weight)
        return loss.detach(), count


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _microbatches(
    batches: Batches, n_microbatches: int, gradient_accumulation_steps: int, split: Callable[..., Any]
) -> list[tuple[Any, Any, float]]:
    """Return (inputs, target, weight of the loss) of each microbatch."""
    microbatches = []
    for number, minibatch in enumerate(batches):
        # A mapping is inputs and target in one.
        inputs, target = (minibatch, minibatch) if isinstance(minibatch, Mapping) else minibatch
        in_round = min(
            gradient_accumulation_steps,
            len(batches) - number // gradient_accumulation_steps * gradient_accumulation_steps,
        )
        for index in range(n_microbatches):
            x, samples = split(inputs, "", index, n_microbatches)
            y = x if inputs is target else split(target, "target", index, n_microbatches)[0]
            weight = 1.0 if n_microbatches == in_round == 1 else samples[0] / samples[1] / in_round
            microbatches.append((x, y, weight))
    return microbatches


def _split(
    batch_dims: Mapping[str, int | None], names: Sequence[str], value: Any, name: str, index: int, count: int
) -> tuple[Any, tuple[int, int]]:
    """Return a microbatch's part of a minibatch's inputs or target, and its samples and those of the minibatch.

    Args:
        batch_dims: of the inputs by name.
        names: of the model's positional arguments.
        value: inputs or target.
        name: "target", or nothing for inputs.
        index: the microbatch.
        count: microbatches of the minibatch.
    """
    samples: list[tuple[int, int]] = []

    def part(path: str, dim: int | None, value: Any) -> Any:
        key = path if path in batch_dims else path.rpartition(".")[2]
        dim = batch_dims.get(key, dim)
        if isinstance(value, Mapping):
            return {each: part(f"{path}.{each}".lstrip("."), dim, item) for each, item in value.items()}
        if isinstance(value, tuple | list):
            kind: Any = partial(_named_tuple, type(value)) if hasattr(value, "_fields") else type(value)
            if dim == 0 and key in batch_dims:
                own = torch.arange(len(value)).tensor_split(count)[index].tolist()
                samples.append((len(own), len(value)))
                return kind([value[each] for each in own])
            fields = getattr(value, "_fields", range(len(value)))
            return kind([part(f"{path}.{each}", dim, item) for each, item in zip(fields, value, strict=True)])
        if not isinstance(value, torch.Tensor) or not value.dim() or dim is None:
            return value
        cut = value if count == 1 else value.tensor_split(count, dim)[index]
        samples.append((cut.shape[dim], value.shape[dim]))
        return cut

    if name or isinstance(value, Mapping):
        found = part(name, 0, value)
    elif isinstance(value, tuple | list):
        found = tuple(part(own, 0, each) for own, each in zip(names, value, strict=False))
    else:
        found = part(names[0], 0, value)
    return found, samples[0] if samples else (1, 1)


def _named_tuple(kind: Any, items: list[Any]) -> Any:
    return kind(*items)


def _add(total: Tensors, gradients: Gradients) -> None:
    for name, gradient in gradients.items():
        if gradient is not None:
            total[name] = total[name] + gradient if name in total else gradient


def _average(of_replicas: list[Tensors], divisor: float) -> Tensors:
    total: Tensors = {}
    for own in of_replicas:
        _add(total, own)
    return {name: gradient / divisor if divisor != 1 else gradient for name, gradient in total.items()}


def _clip(averages: dict[int, Tensors], clip: tuple[float, str] | None) -> None:
    if clip is None:
        return
    max_norm, over = clip
    squares = {
        s: sum(float(g.abs().double().pow(2).sum()) for g in tensors.values()) for s, tensors in averages.items()
    }
    for s, tensors in averages.items():
        norm = (squares[s] if over == "stage" else sum(squares.values())) ** 0.5
        if norm > max_norm:
            for gradient in tensors.values():
                gradient.mul_(max_norm / (norm + 1e-6))


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype != torch.bfloat16:
        return parameter
    master = nn.Parameter(parameter.detach().float())
    vars(master).update(vars(parameter))
    return master


def _copy(parameters: dict[str, nn.Parameter]) -> Tensors:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}
