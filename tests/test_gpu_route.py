"""The GPU route: what is tried before it is chosen. Host memory stands in for device memory."""

from __future__ import annotations

import sys

import pytest
import ranks
import torch

from pipedream_hpc.cluster.device import Device
from pipedream_hpc.cluster.world import World
from pipedream_hpc.runtime.comm.gpu_route import (
    ON_CPU,
    Route,
    child_command,
    choose_route,
    own_world_environment,
    run_child,
)

sys.path.insert(0, str(ranks.PROGRAMS))
import route


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
def test_each_end_of_a_child_has_its_reason(child: str, reason: str | None) -> None:
    assert run_child([sys.executable, "-c", child], limit_s=2.0) == reason


def test_a_child_does_not_see_the_launchers_variables() -> None:
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
    assert list(own_world_environment(environment)) == list(environment)[:5]


def test_nothing_is_tried_on_cpus_or_with_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipedream_hpc.runtime.comm.gpu_route.run_child", lambda *_: pytest.fail("a route was tried"))
    assert choose_route(World(0, 4, 0, 4, "n1"), Device("cpu", "n1"), limit_s=1.0) is ON_CPU
    assert ON_CPU.index == -1
    assert ON_CPU.stream() == 0
    gpu = choose_route(World(0, 1, 0, 1, "n1"), Device("cuda", "n1", 3), limit_s=1.0)
    assert gpu == Route(torch.device("cuda", 3))
    assert gpu.index == 3


@pytest.mark.parametrize("launcher", [True, False])
def test_bytes_come_back_unchanged(launcher: bool) -> None:
    command = child_command("host", -1)
    assert command[1:3] == ["-n", "2"], "the launcher of the MPI wheel"
    assert run_child(command if launcher else command[3:]) is None


def test_a_child_without_a_gpu_reports_it() -> None:
    reason = run_child(child_command("device", 99))
    assert reason is not None
    assert reason.startswith(("cudaSetDevice failed", "pinned and device memory need CUDA"))


@pytest.mark.parametrize(
    ("case", "staged", "description"),
    [
        ("good", False, "MPI reaches device memory itself (a ping-pong came back bit for bit)"),
        ("child", True, "through pinned host memory (on HOST: a ping-pong was ended by SIGSEGV)"),
        ("bytes", True, "through pinned host memory (on HOST: 1 of 4096 bytes in host memory arrived wrong)"),
        ("direct", False, "MPI reaches device memory itself (set by PIPEDREAM_GPU_ROUTE, not tried)"),
        ("staged", True, "through pinned host memory (set by PIPEDREAM_GPU_ROUTE)"),
    ],
)
def test_all_ranks_choose_the_same_route(case: str, staged: bool, description: str) -> None:
    """child: only rank 0's child fails. bytes: only rank 2 receives wrong bytes. direct, staged: set on rank 0 only."""
    assert ranks.call(3, route.choose, case) == [f"rank {rank} of 3: {staged} {description}" for rank in range(3)]


def test_an_unknown_route_is_refused() -> None:
    done = ranks.python(2, "route.py", "quick")
    assert done.status == 2
    assert "PIPEDREAM_GPU_ROUTE should be auto, direct or staged, not 'quick'" in done.output
    assert done.output.count("pipedream:") == 1
