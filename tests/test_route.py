"""What is tried before tensors on a GPU go to MPI; host memory takes the place of a device's."""

from __future__ import annotations

import sys

import pytest
import ranks
import torch

from pipedream_hpc.cluster.device import Device
from pipedream_hpc.cluster.world import World
from pipedream_hpc.runtime.route import ON_CPU, Route, alone, attempt, choose_route, command


@pytest.mark.parametrize(
    ("child", "reason"),
    [
        ("pass", None),
        ("print('ping-pong: 3 of 4096 bytes arrived wrong'); exit(1)", "3 of 4096 bytes arrived wrong"),
        ("exit(3)", "a ping-pong ended with status 3"),
        ("import ctypes; ctypes.string_at(0)", "a ping-pong was ended by SIGSEGV"),
        (
            "import time; print('ping-pong: too early', flush=True); time.sleep(60)",
            "a ping-pong had not ended after 2 s",
        ),
    ],
)
def test_what_becomes_of_a_child(child: str, reason: str | None) -> None:
    assert attempt([sys.executable, "-c", child], limit_s=2.0) == reason


def test_a_child_hears_nothing_of_the_launcher() -> None:
    environment = {
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "1",
        "UCX_TLS": "sm,cuda_copy",
        "OMPI_MCA_btl": "^ofi",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        # left out
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_MCA_orte_hnp_uri": "0.0",
        "OMPI_MCA_ess": "env",
        "PMIX_RANK": "1",
        "PMI_SIZE": "2",
        "SLURM_PROCID": "1",
    }
    assert list(alone(environment)) == list(environment)[:5]


def test_on_cpus_and_alone_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipedream_hpc.runtime.route.attempt", lambda *_: pytest.fail("tried"))
    assert choose_route(World(0, 4, 0, 4, "n1"), Device("cpu", "n1"), limit_s=1.0) is ON_CPU
    assert ON_CPU.index == -1
    assert ON_CPU.stream() == 0
    gpu = choose_route(World(0, 1, 0, 1, "n1"), Device("cuda", "n1", 3), limit_s=1.0)
    assert gpu == Route(torch.device("cuda", 3))
    assert gpu.index == 3


@pytest.mark.parametrize("launcher", [True, False])
def test_bytes_come_back_as_they_were(launcher: bool) -> None:
    words = command("host", -1)
    assert words[1:3] == ["-n", "2"], "the launcher that MPI's wheel brings"
    assert attempt(words if launcher else words[3:]) is None


def test_a_child_without_a_gpu_says_so() -> None:
    reason = attempt(command("device", 99))
    assert reason is not None
    assert reason.startswith(("cudaSetDevice failed", "pinned and device memory need CUDA"))


@pytest.mark.parametrize(
    ("case", "staged", "words"),
    [
        ("good", False, "MPI reaches device memory itself (a ping-pong came back bit for bit)"),
        ("child", True, "by way of pinned host memory (on HOST: a ping-pong was ended by SIGSEGV)"),
        ("bytes", True, "by way of pinned host memory (on HOST: 1 of 4096 bytes in host memory arrived wrong)"),
        ("direct", False, "MPI reaches device memory itself (PIPEDREAM_GPU_ROUTE says so, and nothing was tried)"),
        ("staged", True, "by way of pinned host memory (PIPEDREAM_GPU_ROUTE says so)"),
    ],
)
def test_ranks_choose_alike(case: str, staged: bool, words: str) -> None:
    """child: only rank 0's child fails; bytes: only what rank 2 receives; the wishes: only rank 0 has one."""
    done = ranks.python(3, "route.py", case)
    assert done.status == 0, done.output
    # Sorted: what ranks print at one time arrives in any order.
    assert sorted(line for line in done.output.splitlines() if line.startswith("rank")) == [
        f"rank {rank} of 3: {staged} {words}" for rank in range(3)
    ]


def test_a_wish_that_is_none_of_them() -> None:
    done = ranks.python(2, "route.py", "quick")
    assert done.status == 2
    assert "PIPEDREAM_GPU_ROUTE should be auto, direct or staged, not 'quick'" in done.output
    assert done.output.count("pipedream:") == 1
