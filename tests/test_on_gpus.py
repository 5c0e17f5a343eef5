"""What training on GPUs adds, as far as a machine without one can tell: stand-ins take the place of the device.

Everything asserted here is bitwise: what goes by way of the stand-ins is what goes without them.
"""

from __future__ import annotations

import ctypes
from collections import deque
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipedream_hpc.core import load_memory
from pipedream_hpc.model.clock import HostClock, StreamClock, clock_of
from pipedream_hpc.model.precision import autocast
from pipedream_hpc.runtime import stash as stash_module
from pipedream_hpc.runtime.assembly import place_buffers
from pipedream_hpc.runtime.averaging import Averager, Packing
from pipedream_hpc.runtime.feed import Feed, Taker
from pipedream_hpc.runtime.reduction import Meeting
from pipedream_hpc.runtime.staging import StagedReduction
from pipedream_hpc.runtime.stash import WeightStash
from pipedream_hpc.runtime.step import _clip_on_device
from pipedream_hpc.runtime.tally import Tally
from pipedream_hpc.runtime.view import CPU, memory_on, tensor_over

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
        return load_memory().WeightPool(nbytes, slabs)

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    monkeypatch.setattr(stash_module, "load_memory", lambda: SimpleNamespace(WeightPool=pool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_view_as_a_tensor(device_memory: None, dtype: torch.dtype) -> None:
    pool = load_memory().WeightPool(1024, 1)
    there = tensor_over(pool.slab(0), torch.Size([2, 3]), dtype, offset=64, device=GPU)
    here = tensor_over(pool.slab(0), torch.Size([2, 3]), dtype, offset=64, device=CPU)
    here.copy_(torch.arange(6).view(2, 3))
    assert torch.equal(there, here)
    assert there.data_ptr() == here.data_ptr() == pool.slab(0).address + 64
    assert (memory_on(CPU), memory_on(GPU)) == ("host", "device")


def test_a_copy_instead_of_a_view_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be trained, and nobody would ever see it."""
    monkeypatch.setattr(torch, "as_tensor", lambda view, device: torch.zeros(view.nbytes, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="the memory is not on cuda:0"):
        tensor_over(load_memory().WeightPool(64, 1).slab(0), torch.Size([4]), torch.float32, device=GPU)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.RMSprop])  # with a fused step, and without
@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_a_stash_on_a_device_makes_the_same_versions(optimizer: Any, skipped: list[bool]) -> None:
    """Versions are copied by torch, on its stream, in place of the core, which would wait for them."""
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


class Late:
    """A moment that has come after it was asked for so often."""

    def __init__(self, copy: Any, asked: int) -> None:
        self.copy, self.asked = copy, asked

    def query(self) -> bool:
        self.asked -= 1
        if self.asked <= 0:
            self.synchronize()
        return self.asked <= 0

    def synchronize(self) -> None:
        self.asked = 0
        if self.copy is not None:
            source, target = self.copy
            target.copy_(source)
            self.copy = None


class LateLane:
    """Copies arrive only when their moment has come: whoever reads before finds what was there before."""

    def __init__(self, delays: list[int]) -> None:
        self.delays = deque(delays)

    def buffer(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(count, dtype=dtype)

    def pinned(self, like: torch.Tensor) -> torch.Tensor:
        return torch.full_like(like, 7)

    def out(self, source: torch.Tensor, target: torch.Tensor) -> Late:
        self.delays.rotate(-1)
        return Late((source, target), self.delays[0])

    def back(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)


def average(rounds: int, delays: list[int] | None) -> list[list[torch.Tensor | None]]:
    """Two replicas average three parameters, the last of which the second replica does not use."""
    parameters = [torch.zeros(5), torch.zeros(3, 2), torch.zeros(4)]
    packing = Packing(parameters, bucket_bytes=32)
    meeting = Meeting()
    members: list[Any] = [meeting.join(packing.buckets) for _ in range(2)]
    if delays is not None:
        members = [StagedReduction(each, packing.buckets, LateLane(delays), on_host=1) for each in members]
    averagers = [Averager(packing, member) for member in members]
    found = []
    for round in range(rounds):
        draw = torch.Generator().manual_seed(round)
        for replica, averager in enumerate(averagers):
            for position in reversed(range(3 - replica)):
                averager.add(position, torch.randn(parameters[position].shape, generator=draw), last=True)
        for averager in averagers:
            averager.start_rest()
        # The second to be asked knows that all are here, however late the copies are: who waits for nobody but
        # his own device does not wait for another rank.
        assert [averager.done() for averager in averagers][1]
        assert averagers[0].done()
        found += [
            [None if gradient is None else gradient.clone() for gradient in averager.average(2)]
            for averager in averagers
        ]
    return found


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=7))
def test_gradients_by_way_of_the_host_are_the_same(delays: list[int]) -> None:
    for plain, staged in zip(average(3, None), average(3, delays), strict=True):
        for a, b in zip(plain, staged, strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)


def test_buckets_start_in_the_order_they_were_handed_in() -> None:
    """bucket   0        1      2
    copied     late     at once  at once      and yet no bucket overtakes another
    """
    started: list[int] = []
    inner = SimpleNamespace(
        bucket=lambda index: torch.zeros(1), start=started.append, done=lambda index: True, wait=lambda index: None
    )
    staged = StagedReduction(inner, [(1, torch.float32)] * 3, LateLane([1, 9, 1]))
    for index in range(3):
        staged.start(index)
    assert started == []
    assert staged.done(1)
    assert started == [0, 1, 2]
    assert staged.nbytes == 12


# --- data, buffers, numbers --------------------------------------------------------------------------


def test_minibatches_go_to_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[torch.Size, str]] = []

    def onto(value: Any, device: torch.device) -> Any:
        if isinstance(value, torch.Tensor):
            moved.append((value.shape, str(device)))
        return value

    monkeypatch.setattr("pipedream_hpc.runtime.feed.onto", onto)
    data = [((torch.zeros(4, 2), torch.ones(4, 3)), {"of": torch.zeros(4)})]
    feed = Feed(data, epoch=0, seed=0, takers=[Taker(0, 1)], names=["x", "y"], length=1, device=GPU)
    for _ in range(2):
        feed.input(0, 1)
        feed.target(0)
    assert moved == [((4, 3), "cuda:0"), ((4,), "cuda:0")], "not the input that nobody here takes"
    moved.clear()
    feed = Feed(data, epoch=0, seed=0, takers=[Taker(0, 1)], names=["x", "y"], length=1)
    assert feed.input(0, 1) is data[0][0][1], "on the CPU the loader's own"
    assert moved == []


def test_buffers_and_constants_are_placed_and_stay_one() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    constant = torch.ones(3)
    module.constant = constant
    module[1].register_buffer("same", constant)
    weights = list(module.parameters())
    place_buffers(module, torch.device("meta"))
    assert all(buffer.is_meta for buffer in module.buffers())
    assert module.constant.is_meta
    assert module.constant is module[1].same
    assert all(a is b and not b.is_meta for a, b in zip(weights, module.parameters(), strict=True)), "the stash's"


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


def test_scores_are_read_together() -> None:
    tally = Tally()
    assert tally.read() == []
    for unit, mean in enumerate((0.1, 2.5)):
        tally.add(unit, torch.tensor(mean), 4)
    assert tally.read() == [(0, torch.tensor(0.1).item(), 4), (1, 2.5, 4)]


def test_autocast_is_that_of_the_device() -> None:
    assert [autocast("bf16", kind).kind for kind in ("cpu", "cuda")] == ["cpu", "cuda"]  # type: ignore[union-attr]
    assert autocast(None, "cuda") is None


# --- time --------------------------------------------------------------------------------------------


class Event:
    """torch.cuda.Event on a stream that needs a second and a half for everything that it is told."""

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
