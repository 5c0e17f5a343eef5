"""The models of the benchmarks beside peers, cut alike for everybody; and the ways to train them on two ranks.

Every way trains the very same modules with plain SGD on the same batches, with one thread per rank and the
rank on a core of its own. A way is asked for seconds per global batch.
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

from pipedream_hpc import Pipeline

RATE = 0.1


class Piece(nn.Sequential):
    """A run of blocks that is never cut: layers of the pipeline are these."""


class Block(nn.Module):
    """Pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attend, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        split = self.attend(self.norms[0](x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in split)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.feed(self.norms[1](x))


@dataclass(frozen=True)
class Workload:
    """A model as blocks in a row, its loss, and one batch."""

    name: str
    blocks: Callable[[], list[nn.Module]]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
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
    """Forward and backward of every block as in training, medians of the rounds."""
    torch.manual_seed(0)
    blocks, (x, _) = workload.blocks(), workload.batch()
    samples: list[list[float]] = [[] for _ in blocks]
    for _ in range(1 + rounds):
        entry = x
        for block, taken in zip(blocks, samples, strict=True):
            began = time.perf_counter()
            out = block(entry)
            out.backward(torch.ones_like(out))
            taken.append(time.perf_counter() - began)
            entry = out.detach().requires_grad_()  # nobody wants the gradient of the model's own input
    return [statistics.median(taken[1:]) for taken in samples]


def quarters_of(seconds: Sequence[float]) -> tuple[int, int, int]:
    """Where to cut: the most balanced halves, and of each half the most balanced halves."""

    def halve(begin: int, end: int) -> int:
        return min(range(begin + 1, end), key=lambda at: max(sum(seconds[begin:at]), sum(seconds[at:end])))

    middle = halve(0, len(seconds))
    return halve(0, middle), middle, halve(middle, len(seconds))


def quarters(workload: Workload, cuts: Sequence[int]) -> list[Piece]:
    """The model in four pieces, always the same weights."""
    torch.manual_seed(0)
    blocks = workload.blocks()
    return [Piece(*blocks[a:b]) for a, b in itertools.pairwise([0, *cuts, len(blocks)])]


def halves(workload: Workload, cuts: Sequence[int]) -> list[Piece]:
    """The model in two pieces, the same weights."""
    four = quarters(workload, cuts)
    return [Piece(*four[0], *four[1]), Piece(*four[2], *four[3])]


class Way:
    """One way of training. `seconds(batches)` is collective, and means seconds per global batch."""

    def __init__(self, name: str, kind: str, microbatches: int = 1) -> None:
        self.name, self.kind, self.microbatches = name, kind, microbatches

    def open(self) -> None:
        """Make ready, warm-up included."""

    def seconds(self, batches: int) -> float:
        raise NotImplementedError

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights by position of the block, on rank 0."""
        raise NotImplementedError

    def close(self) -> None:
        """Leave nothing that runs."""


def _gathered(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    parts: list[Any] = [None, None]
    dist.all_gather_object(parts, own)
    return {name: value for part in parts for name, value in part.items()}


class Copies(Way):
    """A whole model on each rank, each on batches of its own, and no word between them: the bound."""

    def __init__(self, workload: Workload, cuts: Sequence[int]) -> None:
        super().__init__("two copies", "bound")
        self._workload, self._cuts = workload, cuts

    def open(self) -> None:
        self._model = nn.Sequential(*halves(self._workload, self._cuts))
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=RATE)
        self._batch = self._workload.batch()
        self.seconds(2)

    def seconds(self, batches: int) -> float:
        began = time.perf_counter()
        for _ in range(batches):
            _step(self._model, self._workload.loss, self._optimizer, *self._batch)
        return (time.perf_counter() - began) / batches / 2


def _step(model: nn.Module, loss: Any, optimizer: torch.optim.Optimizer, x: Any, y: Any) -> None:
    optimizer.zero_grad()
    loss(model(x), y).backward()
    optimizer.step()


class Stages(Way):
    """Each rank runs its own stage again and again, and no word between them: as fast as these stages can be.

    What comes in and back is what the whole model hands over there, and every turn begins with the weights that
    the others begin with. Kernels are not equally fast on all numbers: a max pool of rectified activations that have
    all died takes half the time of one on a model that learns.
    """

    def __init__(self, workload: Workload, cuts: Sequence[int]) -> None:
        super().__init__("its stages alone", "stages")
        self._workload, self._cuts = workload, cuts

    def open(self) -> None:
        torch.manual_seed(1)
        self._x, self._y = self._workload.batch()
        first, second = halves(self._workload, self._cuts)
        self._boundary = first(self._x).detach()
        entry = self._boundary.clone().requires_grad_()
        (self._gradient,) = torch.autograd.grad(self._workload.loss(second(entry), self._y), entry)
        self._first = dist.get_rank() == 0
        self._module = first if self._first else second
        self._begin = {name: value.clone() for name, value in self._module.state_dict().items()}
        self._optimizer = torch.optim.SGD(self._module.parameters(), lr=RATE)
        self.seconds(1)

    def seconds(self, batches: int) -> float:
        """Of this rank's own stage."""
        self._module.load_state_dict(self._begin)
        began = time.perf_counter()
        for _ in range(batches):
            self._optimizer.zero_grad()
            if self._first:
                self._module(self._x).backward(self._gradient)
            else:
                out = self._module(self._boundary.detach().requires_grad_())
                self._workload.loss(out, self._y).backward()
            self._optimizer.step()
        return (time.perf_counter() - began) / batches


class Ddp(Copies):
    """torch DDP: each rank has half of every batch."""

    def __init__(self, workload: Workload, cuts: Sequence[int]) -> None:
        super().__init__(workload, cuts)
        self.name, self.kind = "torch DDP", "ddp"

    def open(self) -> None:
        self._model = DistributedDataParallel(nn.Sequential(*halves(self._workload, self._cuts)))
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=RATE)
        own = [part.chunk(2)[dist.get_rank()] for part in self._workload.batch()]
        self._batch = (own[0], own[1])
        self.seconds(2)

    def seconds(self, batches: int) -> float:
        return 2 * super().seconds(batches)


class TorchPipeline(Way):
    """torch.distributed.pipelining over gloo."""

    def __init__(self, workload: Workload, cuts: Sequence[int], schedule: str, microbatches: int) -> None:
        super().__init__(f"torch {schedule.removeprefix('Schedule')}", schedule, microbatches)
        self._workload, self._cuts = workload, cuts

    def open(self) -> None:
        kind = getattr(pipelining, self.kind, None) or getattr(pipelining.schedules, self.kind)
        rank, device = dist.get_rank(), torch.device("cpu")
        single = issubclass(kind, pipelining.schedules.PipelineScheduleSingle)
        pieces = (halves if single else quarters)(self._workload, self._cuts)
        own = (
            [rank]
            if single
            else [rank, 3 - rank]
            if "ZBV" in self.kind or "DualPipeV" in self.kind
            else [rank, rank + 2]
        )
        self._modules = {index: pieces[index] for index in own}
        stages = [pipelining.PipelineStage(pieces[index], index, len(pieces), device) for index in own]
        self._schedule = kind(
            stages[0] if single else stages, n_microbatches=self.microbatches, loss_fn=self._workload.loss
        )
        self._first, self._last = 0 in own, len(pieces) - 1 in own
        self._optimizer = torch.optim.SGD(
            [p for module in self._modules.values() for p in module.parameters()], lr=RATE
        )
        torch.manual_seed(1)
        self._x, self._y = self._workload.batch()
        self._offsets = {index: len(list(itertools.chain(*pieces[:index]))) for index in own}
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
        return _gathered(own)


class Ours(Way):
    """pipedream_hpc over MPI."""

    def __init__(
        self,
        workload: Workload,
        cuts: Sequence[int],
        schedule: str,
        microbatches: int = 1,
        *,
        trace: bool = False,
        split: bool = False,
        zero_bubble: bool = False,
    ) -> None:
        how = ", zero bubble" if zero_bubble else ", split" if split else ""
        super().__init__(f"pipedream_hpc {schedule}{how}", schedule, microbatches)
        self._workload, self._cuts, self._trace = workload, cuts, trace
        self._split, self._zero_bubble = split, zero_bubble

    def open(self) -> None:
        torch.manual_seed(1)
        self._batch = self._workload.batch()
        pieces = halves(self._workload, self._cuts)
        self._second = len(pieces[0])
        self._pipeline = Pipeline(
            nn.Sequential(*pieces),
            loss=self._workload.loss,
            optimizer=partial(torch.optim.SGD, lr=RATE),
            example=self._batch[0],
            plan=2,
            schedule=self.kind,
            microbatches=self.microbatches if self.microbatches > 1 else None,
            split_backward=self._split,
            zero_bubble=self._zero_bubble,
            leaves=[Piece],
            trace=self._trace,
        )
        self._pipeline.fit([self._batch])

    def seconds(self, batches: int) -> float:
        ends: list[float] = []
        began = time.perf_counter()
        self._pipeline.fit([self._batch] * batches, on_minibatch=lambda done, total: ends.append(time.perf_counter()))
        took = (time.perf_counter() - began) / batches
        if self.microbatches > 1 or len(ends) < 3:
            return took
        # Asynchronous: filled once and drained once in a whole epoch, so from a minibatch's end to another's.
        return (ends[-1] - ends[0]) / (len(ends) - 1)

    def weights(self) -> dict[str, torch.Tensor]:
        whole = {}
        for name, value in self._pipeline.state_dict().items():
            piece, number, rest = name.split(".", 2)
            whole[f"{int(number) + int(piece) * self._second}.{rest}"] = value
        return whole

    def bottleneck_idle(self) -> float:
        """Part of the steady state in which the busier stage neither computes nor updates. Collective."""
        spans = [span for span in self._pipeline.last_trace().spans if span.kind in ("forward", "backward", "update")]
        idle = []
        for rank in (0, 1):
            own = [span for span in spans if span.rank == rank]
            ends = sorted(span.end_s for span in own if span.kind == "backward")
            begin, end = ends[1], ends[-2]  # neither filling nor draining
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
    """Weights before and after the first batch, trained by plain torch."""
    model = nn.Sequential(*itertools.chain(*quarters(workload, cuts)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    _step(model, workload.loss, torch.optim.SGD(model.parameters(), lr=RATE), *workload.batch())
    return before, model.state_dict()


def start_ranks() -> tuple[int, int]:
    """One thread, one core of its own, and gloo beside MPI; returns rank and ranks."""
    from mpi4py import MPI

    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    port = MPI.COMM_WORLD.bcast(_free_port() if rank == 0 else None)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    return rank, size


def leave() -> None:
    """End this process once all ranks are here, as it stands.

    An interpreter that ends in the usual way destroys what DDP has left, and now and then torch 2.13 waits for ever
    for itself there: the destructor of its gloo backend has the interpreter's lock and wants that of a thread of its
    own, which wants the interpreter's.
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


def interleaved(ways: Sequence[Way], rounds: int) -> Iterator[Way]:
    """Every way once per round, in an order that changes from round to round."""
    for number in range(rounds):
        turn = number % len(ways)
        yield from [*ways[turn:], *ways[:turn]]
