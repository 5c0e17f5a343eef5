"""Which device a rank computes on. torch's functions for GPUs are replaced, so the tests need no GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipedream_hpc.cluster import device as module
from pipedream_hpc.cluster.device import Device, choose, device_info, validate_devices
from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError

H100 = "NVIDIA H100 80GB HBM3"


def world(rank: int = 0, local_rank: int = 0, host: str = "n1") -> World:
    return World(rank, 8, local_rank, 4, host)


def gpu(index: int, uuid: str, host: str = "n1") -> Device:
    return Device("cuda", host, index, H100, uuid, 1 << 36)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`gpus(4)` makes torch report four GPUs, and returns a list that records the devices made current."""

    def pretend(count: int, *, compiled: bool = True) -> list[int]:
        current: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70 << 30, 80 << 30))
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name=H100, uuid=f"uuid-{index}")
        )
        monkeypatch.setattr(module, "load_weights", lambda: SimpleNamespace(cuda_compiled=lambda: compiled))
        return current

    return pretend


@pytest.mark.parametrize(
    ("visible", "local_rank", "index"),
    [
        (4, 0, 0),
        (4, 3, 3),
        (2, 3, 1),  # the local rank modulo the number of GPUs
        (1, 3, 0),  # srun --gpus-per-task=1: each rank sees one
    ],
)
def test_the_local_rank_selects_the_gpu(gpus: Any, visible: int, local_rank: int, index: int) -> None:
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


def test_the_error_names_why_a_gpu_cannot_be_used(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(PipedreamError, match=r"rank 2 on n1 .* was built without CUDA: install a torch for your CUDA"):
        choose("cuda", world(rank=2))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(PipedreamError, match="torch sees no GPU: request one"):
        choose("cuda", world())
    gpus(1, compiled=False)
    with pytest.raises(PipedreamError, match="the core of pipedream_hpc was built without CUDA: put nvcc"):
        choose("cuda", world())
    with pytest.raises(PipedreamError, match="device should be one of auto, cpu, cuda, not 'gpu'"):
        choose("gpu", world())


def test_ranks_with_different_gpus_are_accepted() -> None:
    devices = (gpu(0, "a"), gpu(1, "b"), gpu(0, "c", "n2"), gpu(0, "d", "n2"))
    assert validate_devices([device_info(each, {}) for each in devices]) == devices


def test_two_ranks_on_one_gpu_are_refused_unless_allowed() -> None:
    devices = (gpu(0, "a"), gpu(1, "b"), gpu(0, "a"))
    with pytest.raises(PipedreamError, match=r"ranks 0 and 2 would both train on GPU 0 of node n1, NVIDIA .*_GPUS=1"):
        validate_devices([device_info(each, {}) for each in devices])
    with pytest.raises(PipedreamError, match="would both train"):
        validate_devices([device_info(each, {"PIPEDREAM_SHARE_GPUS": "0"}) for each in devices])
    allowed_by_one = [
        device_info(devices[0], {"PIPEDREAM_SHARE_GPUS": "1"}),
        *(device_info(each, {}) for each in devices[1:]),
    ]
    assert validate_devices(allowed_by_one) == devices


def test_cpus_and_gpus_do_not_mix() -> None:
    with pytest.raises(PipedreamError, match=r"rank 0 has the GPU 0 of node n1, .* and rank 1 the CPU of node n2"):
        validate_devices([device_info(gpu(0, "a"), {}), device_info(Device("cpu", "n2"), {})])


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=8))
def test_gpus_are_refused_exactly_if_one_repeats(uuids: list[str]) -> None:
    infos = [device_info(gpu(0, uuid), {}) for uuid in uuids]
    if len(set(uuids)) == len(uuids):
        assert len(validate_devices(infos)) == len(uuids)
    else:
        with pytest.raises(PipedreamError):
            validate_devices(infos)


@given(st.integers(1, 64))
def test_any_number_of_ranks_may_share_a_cpu(count: int) -> None:
    assert len(validate_devices([device_info(Device("cpu", "n1"), {})] * count)) == count
