"""The code paths of training on GPUs, on a machine without one: stand-ins take the place of the device.

Comparisons are bitwise: results through the stand-ins are those without them.
"""

from __future__ import annotations

import ctypes
from collections import deque
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipedream_hpc.core import load_weights
from pipedream_hpc.model.arguments import Arguments
from pipedream_hpc.model.clock import HostClock, StreamClock, clock_of
from pipedream_hpc.model.precision import autocast
from pipedream_hpc.model.recipe import tensors_of
from pipedream_hpc.model.stage_module import move_tensors
from pipedream_hpc.runtime.comm.allreduce import LocalGroup
from pipedream_hpc.runtime.comm.staged_allreduce import CopyStream, StagedAllReduce
from pipedream_hpc.runtime.comm.tensor_view import CPU, memory_on, tensor_over
from pipedream_hpc.runtime.execution.data import MicrobatchLoader, Reader
from pipedream_hpc.runtime.execution.loss_meter import LossMeter
from pipedream_hpc.runtime.execution.score import Score, read_score
from pipedream_hpc.runtime.weights import stash as stash_module
from pipedream_hpc.runtime.weights.grad_allreduce import BucketLayout, GradAllReduce
from pipedream_hpc.runtime.weights.optimizer_step import _clip_on_device
from pipedream_hpc.runtime.weights.stash import WeightStash

GPU = torch.device("cuda", 0)


# --- memory of the core, as tensors ------------------------------------------------------------------


@pytest.fixture
def device_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.as_tensor reads a view by its address, as it does by __cuda_array_interface__; pools are on the host."""

    def as_tensor(view: Any, device: torch.device) -> torch.Tensor:
        assert device == GPU
        return torch.frombuffer((ctypes.c_uint8 * view.nbytes).from_address(view.address), dtype=torch.uint8)

    def pool(nbytes: int, slabs: int, memory: str) -> Any:
        assert memory == "device"
        return load_weights().WeightPool(nbytes, slabs)

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    monkeypatch.setattr(stash_module, "load_weights", lambda: SimpleNamespace(WeightPool=pool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_view_as_a_tensor(device_memory: None, dtype: torch.dtype) -> None:
    pool = load_weights().WeightPool(1024, 1)
    there = tensor_over(pool.slab(0), torch.Size([2, 3]), dtype, offset=64, device=GPU)
    here = tensor_over(pool.slab(0), torch.Size([2, 3]), dtype, offset=64, device=CPU)
    here.copy_(torch.arange(6).view(2, 3))
    assert torch.equal(there, here)
    assert there.data_ptr() == here.data_ptr() == pool.slab(0).address + 64
    assert (memory_on(CPU), memory_on(GPU)) == ("host", "device")


def test_a_copy_instead_of_a_view_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training would change the copy, and the weights would stay as they are."""
    monkeypatch.setattr(torch, "as_tensor", lambda view, device: torch.zeros(view.nbytes, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="the memory is not on cuda:0"):
        tensor_over(load_weights().WeightPool(64, 1).slab(0), torch.Size([4]), torch.float32, device=GPU)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.RMSprop])  # with a fused step, and without
@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_a_stash_on_a_device_makes_the_same_versions(optimizer: Any, skipped: list[bool]) -> None:
    """On a device torch copies versions, on its stream; the core would have to wait for the stream."""
    torch.manual_seed(0)
    module, twin = nn.Linear(3, 5), nn.Linear(3, 5)
    twin.load_state_dict(module.state_dict())
    make = partial(optimizer, lr=0.1)
    here = WeightStash(module, 3, make)
    with pytest.MonkeyPatch.context() as patch:
        device_memory.__wrapped__(patch)  # type: ignore[attr-defined]
        there = WeightStash(twin, 3, make, device=GPU)
        for round, skip in enumerate(skipped):
            gradients = [torch.full_like(weight, round + 1.0) for weight in here.trained]
            for stash in (here, there):
                stash.acquire(round)
                if skip:
                    stash.skip_update()
                else:
                    stash.update([gradient.clone() for gradient in gradients])
                if round:
                    stash.release(round - 1)
            assert here.version == there.version
            for a, b in zip(here.trained, there.trained, strict=True):
                assert torch.equal(a, b)
    assert here.nbytes == there.nbytes == 3 * 128


# --- gradients through pinned memory -----------------------------------------------------------------


class DelayedCopy:
    """A copy that completes at the n-th query."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor, queries: int) -> None:
        self.copy: Any = (source, target)
        self.queries = queries

    def query(self) -> bool:
        self.queries -= 1
        if self.queries <= 0:
            self.synchronize()
        return self.queries <= 0

    def synchronize(self) -> None:
        self.queries = 0
        if self.copy is not None:
            source, target = self.copy
            target.copy_(source)
            self.copy = None


class DelayedCopies:
    """DeviceCopies whose copies are delayed: a reader that does not wait for one finds the old values."""

    def __init__(self, delays: list[int]) -> None:
        self.delays = deque(delays)

    def device_buffer(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(count, dtype=dtype)

    def pinned_buffer(self, like: torch.Tensor) -> torch.Tensor:
        return torch.full_like(like, 7)

    def to_host(self, source: torch.Tensor, target: torch.Tensor) -> DelayedCopy:
        self.delays.rotate(-1)
        return DelayedCopy(source, target, self.delays[0])

    def to_device(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)


def averages(rounds: int, delays: list[int] | None) -> list[list[torch.Tensor | None]]:
    """Average three parameters over two replicas; the second replica does not use the last parameter."""
    parameters = [torch.zeros(5), torch.zeros(3, 2), torch.zeros(4)]
    layout = BucketLayout(parameters, bucket_bytes=32)
    group = LocalGroup()
    members: list[Any] = [group.join(layout.buckets) for _ in range(2)]
    if delays is not None:
        members = [StagedAllReduce(each, layout.buckets, DelayedCopies(delays), n_host_buckets=1) for each in members]
    grad_allreduces = [GradAllReduce(layout, member) for member in members]
    found = []
    for round in range(rounds):
        draw = torch.Generator().manual_seed(round)
        for replica, grad_allreduce in enumerate(grad_allreduces):
            for position in reversed(range(3 - replica)):
                grad_allreduce.add(position, torch.randn(parameters[position].shape, generator=draw), last=True)
        for grad_allreduce in grad_allreduces:
            grad_allreduce.start_rest()
        # The last replica to ask finds all buckets started, however late the copies are: waiting for a copy on
        # its own device is not waiting for another rank.
        assert [grad_allreduce.done() for grad_allreduce in grad_allreduces][1]
        assert grad_allreduces[0].done()
        found += [
            [None if gradient is None else gradient.clone() for gradient in grad_allreduce.average(lambda: 2)]
            for grad_allreduce in grad_allreduces
        ]
    return found


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=7))
def test_gradients_averaged_through_the_host_are_the_same(delays: list[int]) -> None:
    for plain, staged in zip(averages(3, None), averages(3, delays), strict=True):
        for a, b in zip(plain, staged, strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)


def test_buckets_start_in_the_callers_order() -> None:
    """bucket   0        1      2
    copied     late     at once  at once      and still no bucket overtakes another
    """
    started: list[int] = []
    inner = SimpleNamespace(
        bucket=lambda index: torch.zeros(1), start=started.append, done=lambda index: True, wait=lambda index: None
    )
    staged = StagedAllReduce(inner, [(1, torch.float32)] * 3, DelayedCopies([1, 9, 1]))
    for index in range(3):
        staged.start(index)
    assert started == []
    assert staged.done(1)
    assert started == [0, 1, 2]
    assert staged.nbytes == 12


def test_the_copy_stream_waits_for_the_compute_stream_and_the_other_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """compute   gradient │                        │ waits, reads
    copies            waits │ to the host │ to the device │
    """
    notes: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = "compute" if name == "compute" else "copies"

        def wait_stream(self, other: Stream) -> None:
            notes.append(f"{self.name} waits for {other.name}")

    class Recorded:
        def record(self, stream: Stream) -> None:
            notes.append(f"event on {stream.name}")

    class Tensor:
        def copy_(self, source: Any, *, non_blocking: bool) -> None:
            notes.append(f"copies {source}, without waiting: {non_blocking}")

        def record_stream(self, stream: Stream) -> None:
            notes.append(f"used on {stream.name}")

    compute = Stream("compute")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Recorded)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch, "zeros", lambda count, dtype, device: Tensor())
    monkeypatch.setattr(torch, "zeros_like", lambda like, pin_memory: f"pinned {pin_memory}")
    copies: Any = CopyStream(GPU)
    target = copies.device_buffer(4, torch.float32)
    assert copies.pinned_buffer(target) == "pinned True"
    assert isinstance(copies.to_host("a", target), Recorded)
    copies.to_device("b", target)
    assert notes == [
        "used on copies",
        *("copies waits for compute", "copies a, without waiting: True", "event on copies"),
        *("copies waits for compute", "copies b, without waiting: True", "event on copies", "compute waits for copies"),
    ]


# --- data, buffers, numbers --------------------------------------------------------------------------


def test_minibatches_are_copied_to_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Arguments((torch.zeros(4, 2), torch.ones(4, 3)), {}, ("x", "y"))
    moved: list[tuple[torch.Size, str]] = []

    def to_device(value: Any, device: torch.device) -> Any:
        if isinstance(value, torch.Tensor):
            moved.append((value.shape, str(device)))
        return value

    monkeypatch.setattr("pipedream_hpc.runtime.execution.data.to_device", to_device)
    data = [((torch.zeros(4, 2), torch.ones(4, 3)), {"of": torch.zeros(4)})]
    batches = MicrobatchLoader(data, epoch=0, seed=0, readers=[Reader(0, 1)], example=two, length=1, device=GPU)
    for _ in range(2):
        batches.arguments(0)
        batches.target(0)
    assert moved == [((4, 2), "cuda:0"), ((4, 3), "cuda:0"), ((4,), "cuda:0")], "each once"
    moved.clear()
    batches = MicrobatchLoader(data, epoch=0, seed=0, readers=[Reader(0, 1)], example=two, length=1)
    assert batches.arguments(0).args[1] is data[0][0][1], "on the CPU the loader's own tensor"
    assert moved == []


def test_buffers_and_constants_move_together_and_shared_ones_stay_shared() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    constant = torch.ones(3)
    module.constant = constant
    module[1].register_buffer("same", constant)
    weights = list(module.parameters())
    move_tensors(list(tensors_of(module)), torch.device("meta"))
    assert all(buffer.is_meta for buffer in module.buffers())
    assert module.constant.is_meta
    assert module.constant is module[1].same
    assert all(a is b and not b.is_meta for a, b in zip(weights, module.parameters(), strict=True)), (
        "the stash places weights"
    )


@settings(deadline=None)
@given(st.floats(0.1, 100.0))
def test_clipping_on_a_device(norm: float) -> None:
    draw = torch.Generator().manual_seed(0)
    gradients = [torch.randn(4, 3, generator=draw), torch.randn(7, generator=draw)]
    before = [gradient.clone() for gradient in gradients]
    length = float(torch.cat([each.flatten().double() for each in before]).norm())
    _clip_on_device(gradients, norm)
    factor = norm / (length + 1e-6) if length > norm else 1.0
    for a, b in zip(before, gradients, strict=True):
        torch.testing.assert_close(a * factor, b)
        if factor == 1.0:
            assert torch.equal(a, b)


def test_scores_are_read_all_at_once() -> None:
    loss_meter = LossMeter()
    assert loss_meter.read() == []
    for microbatch, mean in enumerate((0.1, 2.5)):
        loss_meter.add(microbatch, [Score(torch.tensor(mean))], 4)
    assert loss_meter.read() == [(0, [torch.tensor(0.1).item()], [4]), (1, [2.5], [4])]


def test_several_metrics_are_read_all_at_once() -> None:
    loss_meter = LossMeter()
    for microbatch, one, other, samples in ((3, 0.5, 2.0, 8), (4, 0.25, 1.0, 4)):
        loss_meter.add(microbatch, [Score(torch.tensor(one)), Score(torch.tensor(other))], samples)
    assert loss_meter.read() == [(3, [0.5, 2.0], [8, 8]), (4, [0.25, 1.0], [4, 4])]
    counted = read_score((torch.tensor(6.0), torch.tensor(12)), "a metric")
    loss_meter.add(5, [Score(torch.tensor(0.75)), counted], 4)
    assert loss_meter.read()[2] == (5, [0.75, 0.5], [4, 12])


def test_autocast_is_that_of_the_device() -> None:
    assert [autocast("bf16", kind).kind for kind in ("cpu", "cuda")] == ["cpu", "cuda"]  # type: ignore[union-attr]
    assert autocast(None, "cuda") is None


# --- time --------------------------------------------------------------------------------------------


class Event:
    """torch.cuda.Event on a stream where everything takes 1.5 s."""

    now_ms = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        self.at_ms = Event.now_ms
        Event.now_ms += 1500

    def elapsed_time(self, other: Event) -> float:
        return other.at_ms - self.at_ms

    def synchronize(self) -> None: ...


def test_times_on_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = clock_of(GPU)
    assert isinstance(clock, StreamClock)
    times = clock.read([clock.mark() for _ in range(4)])
    assert [after - times[0] for after in times] == pytest.approx([0, 1.5, 3, 4.5])
    assert clock.read([]) == []
    assert isinstance(clock_of(CPU), HostClock)
