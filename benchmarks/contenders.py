"""The models of the peer benchmarks, and the contenders that train them on two ranks.

All contenders train the same modules, cut at the same places, with plain SGD on the same batches. Every rank has one
thread and its own core. A contender reports seconds per global batch.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import pipelining
from torch.nn.parallel import DistributedDataParallel

from pipedream_hpc import Pipeline, RunConfig, ScheduleConfig, Step, TrainConfig

LEARNING_RATE = 0.1


class Segment(nn.Sequential):
    """Consecutive blocks that are never cut: a layer of the pipeline."""


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attend, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = self.attend(self.norms[0](x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in split)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


@dataclass(frozen=True)
class Workload:
    """A model as consecutive blocks, its loss, and a function that creates a batch."""

    name: str
    blocks: Callable[[], list[nn.Module]]
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    batch: Callable[[], tuple[torch.Tensor, torch.Tensor]]


def _mlp() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(1024, 1024), nn.ReLU()) for _ in range(8)]


def _vgg() -> list[nn.Module]:
    blocks: list[nn.Module] = []
    channels = 3
    for width, repeats in ((64, 2), (128, 2), (256, 3), (512, 2)):
        for index in range(repeats):
            layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            blocks.append(nn.Sequential(*layers, *([nn.MaxPool2d(2)] if index == repeats - 1 else [])))
            channels = width
    return [*blocks, nn.Sequential(nn.Flatten(), nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, 10))]


def _gpt() -> list[nn.Module]:
    return [nn.Embedding(512, 256), *(Block(256, 4) for _ in range(8)), nn.Linear(256, 512)]


def _tokens_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


WORKLOADS = {
    "mlp": Workload(
        "MLP 8 x 1024, batch 256",
        _mlp,
        nn.functional.cross_entropy,
        lambda: (torch.randn(256, 1024), torch.randint(1024, (256,))),
    ),
    "vgg": Workload(
        "VGG-like, 32 x 32, batch 64",
        _vgg,
        nn.functional.cross_entropy,
        lambda: (torch.randn(64, 3, 32, 32), torch.randint(10, (64,))),
    ),
    "gpt": Workload(
        "GPT-like, 8 x 256, 128 tokens, batch 16",
        _gpt,
        _tokens_loss,
        lambda: (torch.randint(512, (16, 128)), torch.randint(512, (16, 128))),
    ),
}


def block_seconds(workload: Workload, rounds: int = 7) -> list[float]:
    """Return the seconds of forward and backward of every block, as in training; medians over the rounds."""
    torch.manual_seed(0)
    blocks, (x, _) = workload.blocks(), workload.batch()
    samples: list[list[float]] = [[] for _ in blocks]
    for _ in range(1 + rounds):
        block_input = x
        for block, taken in zip(blocks, samples, strict=True):
            began = time.perf_counter()
            out = block(block_input)
            out.backward(torch.ones_like(out))
            taken.append(time.perf_counter() - began)
            block_input = out.detach().requires_grad_()  # the model's own input needs no gradient
    return [statistics.median(taken[1:]) for taken in samples]


def quarters_of(seconds: Sequence[float]) -> tuple[int, int, int]:
    """Return where to cut: into the most balanced halves, and each half into its most balanced halves."""

    def halve(begin: int, end: int) -> int:
        return min(range(begin + 1, end), key=lambda at: max(sum(seconds[begin:at]), sum(seconds[at:end])))

    middle = halve(0, len(seconds))
    return halve(0, middle), middle, halve(middle, len(seconds))


def quarters(workload: Workload, cuts: Sequence[int]) -> list[Segment]:
    """Return the model in four segments, always with the same weights."""
    torch.manual_seed(0)
    blocks = workload.blocks()
    return [Segment(*blocks[a:b]) for a, b in itertools.pairwise([0, *cuts, len(blocks)])]


def halves(workload: Workload, cuts: Sequence[int]) -> list[Segment]:
    """Return the model in two segments, with the same weights."""
    four = quarters(workload, cuts)
    return [Segment(*four[0], *four[1]), Segment(*four[2], *four[3])]


class Contender:
    """A way of training that is measured."""

    def __init__(self, name: str, kind: str, n_microbatches: int = 1) -> None:
        self.name, self.kind, self.n_microbatches = name, kind, n_microbatches

    def open(self) -> None:
        """Prepare training, including the warm-up. Collective."""

    def seconds(self, batches: int) -> float:
        """Train `batches` batches; return the seconds per global batch. Collective."""
        raise NotImplementedError

    def weights(self) -> dict[str, torch.Tensor]:
        """Return all weights, named by the position of their block, on rank 0. Collective."""
        raise NotImplementedError

    def close(self) -> None:
        """Release all resources. Collective."""


def _gather(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    parts: list[Any] = [None, None]
    dist.all_gather_object(parts, own)
    return {name: value for part in parts for name, value in part.items()}


class Copies(Contender):
    """A whole model on each rank, each with its own batches, without communication: the bound."""

    def __init__(self, workload: Workload, cuts: Sequence[int]) -> None:
        super().__init__("two copies", "bound")
        self._workload, self._cuts = workload, cuts

    def open(self) -> None:
        self._model = nn.Sequential(*halves(self._workload, self._cuts))
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=LEARNING_RATE)
        self._batch = self._workload.batch()
        self.seconds(2)

    def seconds(self, batches: int) -> float:
        began = time.perf_counter()
        for _ in range(batches):
            _step(self._model, self._workload.loss_fn, self._optimizer, *self._batch)
        return (time.perf_counter() - began) / batches / 2


def _step(model: nn.Module, loss_fn: Any, optimizer: torch.optim.Optimizer, x: Any, y: Any) -> None:
    optimizer.zero_grad()
    loss_fn(model(x), y).backward()
    optimizer.step()


class Stages(Contender):
    """Each rank runs its own stage repeatedly, without communication: the fastest that these stages can run.

    Inputs and gradients are those at the boundary of the whole model, and every turn starts from the same weights as
    the other contenders. The speed of kernels depends on the values: a max pool of rectified activations that are all
    zero takes half the time of one in a model that learns.
    """

    def __init__(self, workload: Workload, cuts: Sequence[int]) -> None:
        super().__init__("its stages alone", "stages")
        self._workload, self._cuts = workload, cuts

    def open(self) -> None:
        torch.manual_seed(1)
        self._x, self._y = self._workload.batch()
        first, second = halves(self._workload, self._cuts)
        self._boundary = first(self._x).detach()
        leaf = self._boundary.clone().requires_grad_()
        (self._gradient,) = torch.autograd.grad(self._workload.loss_fn(second(leaf), self._y), leaf)
        self._first = dist.get_rank() == 0
        self._module = first if self._first else second
        self._begin = {name: value.clone() for name, value in self._module.state_dict().items()}
        self._optimizer = torch.optim.SGD(self._module.parameters(), lr=LEARNING_RATE)
        self.seconds(1)

    def seconds(self, batches: int) -> float:
        """Return the seconds per batch of this rank's own stage."""
        self._module.load_state_dict(self._begin)
        began = time.perf_counter()
        for _ in range(batches):
            self._optimizer.zero_grad()
            if self._first:
                self._module(self._x).backward(self._gradient)
            else:
                out = self._module(self._boundary.detach().requires_grad_())
                self._workload.loss_fn(out, self._y).backward()
            self._optimizer.step()
        return (time.perf_counter() - began) / batches


class Ddp(Copies):
    """torch DDP: each rank trains on half of every batch."""

    def __init__(self, workload: Workload, cuts: Sequence[int]) -> None:
        super().__init__(workload, cuts)
        self.name, self.kind = "torch DDP", "ddp"

    def open(self) -> None:
        self._model = DistributedDataParallel(nn.Sequential(*halves(self._workload, self._cuts)))
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=LEARNING_RATE)
        own = [part.chunk(2)[dist.get_rank()] for part in self._workload.batch()]
        self._batch = (own[0], own[1])
        self.seconds(2)

    def seconds(self, batches: int) -> float:
        return 2 * super().seconds(batches)


class TorchPipeline(Contender):
    """torch.distributed.pipelining over gloo."""

    def __init__(self, workload: Workload, cuts: Sequence[int], schedule: str, n_microbatches: int) -> None:
        super().__init__(f"torch {schedule.removeprefix('Schedule')}", schedule, n_microbatches)
        self._workload, self._cuts = workload, cuts

    def open(self) -> None:
        kind = getattr(pipelining, self.kind, None) or getattr(pipelining.schedules, self.kind)
        rank, device = dist.get_rank(), torch.device("cpu")
        single = issubclass(kind, pipelining.schedules.PipelineScheduleSingle)
        segments = (halves if single else quarters)(self._workload, self._cuts)
        own = (
            [rank]
            if single
            else [rank, 3 - rank]
            if "ZBV" in self.kind or "DualPipeV" in self.kind
            else [rank, rank + 2]
        )
        self._modules = {index: segments[index] for index in own}
        stages = [pipelining.PipelineStage(segments[index], index, len(segments), device) for index in own]
        self._schedule = kind(
            stages[0] if single else stages, n_microbatches=self.n_microbatches, loss_fn=self._workload.loss_fn
        )
        self._first, self._last = 0 in own, len(segments) - 1 in own
        self._optimizer = torch.optim.SGD(
            [p for module in self._modules.values() for p in module.parameters()], lr=LEARNING_RATE
        )
        torch.manual_seed(1)
        self._x, self._y = self._workload.batch()
        self._offsets = {index: len(list(itertools.chain(*segments[:index]))) for index in own}
        self.seconds(1)

    def seconds(self, batches: int) -> float:
        began = time.perf_counter()
        for _ in range(batches):
            self._optimizer.zero_grad()
            arguments = [self._x] if self._first else []
            self._schedule.step(*arguments, **({"target": self._y, "losses": []} if self._last else {}))
            self._optimizer.step()
        return (time.perf_counter() - began) / batches

    def weights(self) -> dict[str, torch.Tensor]:
        own = {}
        for index, module in self._modules.items():
            for name, value in module.state_dict().items():
                number, _, rest = name.partition(".")
                own[f"{int(number) + self._offsets[index]}.{rest}"] = value
        return _gather(own)


class Ours(Contender):
    """pipedream_hpc over MPI.

    Args:
        workload: the model and its data.
        cuts: where the model is cut into quarters; see `quarters_of`.
        schedule: name of the schedule.
        n_microbatches: microbatches per batch, for schedules that cut minibatches.
        trace: record spans for `bottleneck_idle`.
    """

    def __init__(
        self,
        workload: Workload,
        cuts: Sequence[int],
        schedule: str,
        n_microbatches: int = 1,
        *,
        trace: bool = False,
    ) -> None:
        super().__init__(f"pipedream_hpc {schedule}", schedule, n_microbatches)
        self._workload, self._cuts, self._trace = workload, cuts, trace

    def open(self) -> None:
        torch.manual_seed(1)
        self._batch = self._workload.batch()
        segments = halves(self._workload, self._cuts)
        self._second = len(segments[0])
        self._pipeline = Pipeline(
            nn.Sequential(*segments),
            loss_fn=self._workload.loss_fn,
            optimizer=partial(torch.optim.SGD, lr=LEARNING_RATE),
            example_inputs=self._batch[0],
            plan=2,
            schedule=ScheduleConfig(self.kind, n_microbatches=self.n_microbatches if self.n_microbatches > 1 else None),
            train_config=TrainConfig(leaf_modules=(Segment,)),
            run_config=RunConfig(trace=self._trace),
        )
        self._pipeline.fit([self._batch])

    def seconds(self, batches: int) -> float:
        ends: list[float] = []

        def on_step(_: Step) -> None:
            ends.append(time.perf_counter())

        began = time.perf_counter()
        self._pipeline.fit([self._batch] * batches, on_step=None if self.n_microbatches > 1 else on_step)
        seconds = (time.perf_counter() - began) / batches
        if len(ends) < 3:
            return seconds
        # Asynchronous schedules fill and drain once per epoch: measure from the end of one minibatch to another's.
        return (ends[-1] - ends[0]) / (len(ends) - 1)

    def weights(self) -> dict[str, torch.Tensor]:
        whole = {}
        for name, value in self._pipeline.state_dict().items():
            segment, number, rest = name.split(".", 2)
            whole[f"{int(number) + int(segment) * self._second}.{rest}"] = value
        return whole

    def bottleneck_idle(self) -> float:
        """Return the fraction of the steady state in which the busier stage is idle. Collective."""
        computing = ("forward", "backward", "optimizer-step")
        spans = [span for span in self._pipeline.last_trace().spans if span.kind in computing]
        idle = []
        for rank in (0, 1):
            own = [span for span in spans if span.rank == rank]
            ends = sorted(span.end_s for span in own if span.kind == "backward")
            begin, end = ends[1], ends[-2]  # without filling and draining
            busy = sum(
                min(span.end_s, end) - max(span.start_s, begin)
                for span in own
                if begin < span.end_s and span.start_s < end
            )
            idle.append(1 - busy / (end - begin))
        return min(idle)

    def close(self) -> None:
        self._pipeline.close()


def one_process(workload: Workload, cuts: Sequence[int]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the weights before and after the first batch, trained by plain torch."""
    model = nn.Sequential(*itertools.chain(*quarters(workload, cuts)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    _step(model, workload.loss_fn, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), *workload.batch())
    return before, model.state_dict()


def start_ranks() -> tuple[int, int]:
    """Set up this rank: one thread, its own core, and gloo in addition to MPI; return rank and number of ranks."""
    from mpi4py import MPI

    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    port = MPI.COMM_WORLD.bcast(_free_port() if rank == 0 else None)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    return rank, size


def exit_together() -> None:
    """Exit without destructors once all ranks are here.

    A normal exit destroys the objects of DDP, and torch 2.13 sometimes deadlocks there: the destructor of its gloo
    backend holds the interpreter lock and waits for a lock of its thread, which waits for the interpreter lock.
    """
    from mpi4py import MPI

    MPI.COMM_WORLD.Barrier()
    sys.stdout.flush()
    MPI.Finalize()
    os._exit(0)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rotate(contenders: Sequence[Contender], rounds: int) -> Iterator[Contender]:
    """Yield every contender once per round; the first one changes from round to round."""
    for number in range(rounds):
        first = number % len(contenders)
        yield from [*contenders[first:], *contenders[:first]]
