"""Which device a rank computes on. torch's answers about GPUs are stood in for: this needs none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipedream_hpc.cluster import device as module
from pipedream_hpc.cluster.device import Device, agreed, choose, facts
from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError

H100 = "NVIDIA H100 80GB HBM3"


def world(rank: int = 0, local_rank: int = 0, host: str = "n1") -> World:
    return World(rank, 8, local_rank, 4, host)


def gpu(index: int, uuid: str, host: str = "n1") -> Device:
    return Device("cuda", host, index, H100, uuid, 1 << 36)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`gpus(4)`: torch sees four GPUs from here on; what was made current is noted in the returned list."""

    def pretend(count: int, *, compiled: bool = True) -> list[int]:
        current: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70 << 30, 80 << 30))
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name=H100, uuid=f"uuid-{index}")
        )
        monkeypatch.setattr(module, "load_memory", lambda: SimpleNamespace(cuda_compiled=lambda: compiled))
        return current

    return pretend


@pytest.mark.parametrize(
    ("visible", "local_rank", "index"),
    [
        (4, 0, 0),
        (4, 3, 3),
        (2, 3, 1),  # the local rank, modulo what is there
        (1, 3, 0),  # srun --gpus-per-task=1: each rank sees one
    ],
)
def test_the_local_rank_chooses(gpus: Any, visible: int, local_rank: int, index: int) -> None:
    current = gpus(visible)
    chosen = choose("auto", world(rank=5, local_rank=local_rank))
    assert chosen == Device("cuda", "n1", index, H100, f"uuid-{index}", 70 << 30)
    assert current == [index], "made current before anything is allocated"
    assert chosen.torch == torch.device("cuda", index)
    assert str(chosen) == f"GPU {index} of node n1, {H100}"


def test_auto_is_the_cpu_unless_torch_and_core_have_cuda(gpus: Any) -> None:
    for count, compiled in ((0, True), (4, False)):
        current = gpus(count, compiled=compiled)
        assert choose("auto", world()) == Device("cpu", "n1")
        assert current == []
    gpus(4)
    assert choose("cpu", world()).torch == torch.device("cpu")


def test_a_gpu_that_cannot_be_had_is_said_to_be_lacking(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(PipedreamError, match=r"rank 2 on n1 .* has no CUDA: install a torch for your CUDA"):
        choose("cuda", world(rank=2))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(PipedreamError, match="torch sees none: ask for one"):
        choose("cuda", world())
    gpus(1, compiled=False)
    with pytest.raises(PipedreamError, match="the core of pipedream_hpc was built without CUDA: put nvcc"):
        choose("cuda", world())
    with pytest.raises(PipedreamError, match="device should be one of auto, cpu, cuda, not 'gpu'"):
        choose("gpu", world())


def test_ranks_with_gpus_of_their_own_agree() -> None:
    devices = (gpu(0, "a"), gpu(1, "b"), gpu(0, "c", "n2"), gpu(0, "d", "n2"))
    assert agreed([facts(each, {}) for each in devices]) == devices


def test_two_ranks_on_one_gpu_are_refused_unless_allowed() -> None:
    devices = (gpu(0, "a"), gpu(1, "b"), gpu(0, "a"))
    with pytest.raises(PipedreamError, match=r"ranks 0 and 2 would both train on GPU 0 of node n1, NVIDIA .*_GPUS=1"):
        agreed([facts(each, {}) for each in devices])
    with pytest.raises(PipedreamError, match="would both train"):
        agreed([facts(each, {"PIPEDREAM_SHARE_GPUS": "0"}) for each in devices])
    said_by_one = [facts(devices[0], {"PIPEDREAM_SHARE_GPUS": "1"}), *(facts(each, {}) for each in devices[1:])]
    assert agreed(said_by_one) == devices


def test_cpus_and_gpus_do_not_mix() -> None:
    with pytest.raises(PipedreamError, match=r"rank 0 has the GPU 0 of node n1, .* and rank 1 the CPU of node n2"):
        agreed([facts(gpu(0, "a"), {}), facts(Device("cpu", "n2"), {})])


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8))
def test_refused_is_exactly_what_repeats(uuids: list[str]) -> None:
    answers = [facts(gpu(0, uuid), {}) for uuid in uuids]
    if len(set(uuids)) == len(uuids):
        assert len(agreed(answers)) == len(uuids)
    else:
        with pytest.raises(PipedreamError):
            agreed(answers)


@given(st.integers(1, 64))
def test_ranks_on_cpus_may_be_many(count: int) -> None:
    assert len(agreed([facts(Device("cpu", "n1"), {})] * count)) == count
