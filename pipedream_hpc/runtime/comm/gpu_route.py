"""GPU route: how boundary tensors on a GPU reach the network. It is tried before it is chosen.

::

    direct    GPU ──────────────── MPI ──────────────── GPU      MPI reads and writes device memory
    staged    GPU ─► pinned ────── MPI ────── pinned ─► GPU      chunk by chunk, through host memory

An MPI that cannot reach device memory ends the process that tries, or delivers wrong bytes. So a child process on
every node plays ping-pong first; if that succeeds, all ranks pass bytes around, over the network too::

    each node     a child: two ranks of its own on the GPU, bytes compared      it may crash, or hang
    all ranks     rank 0 ─► 1 ─► 2 ─► ... ─► 0, bytes compared                  the network of the job
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipedream_hpc.cluster.device import Device
from pipedream_hpc.cluster.world import World
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.runtime.comm.handshake import exchange
from pipedream_hpc.runtime.comm.ping_pong import run_ping_pong
from pipedream_hpc.runtime.comm.tensor_view import CPU, memory_on

#: Environment variable, `direct` or `staged`: overrides probing; rank 0's value applies everywhere.
ROUTE_VARIABLE = "PIPEDREAM_GPU_ROUTE"
#: Seconds that a child may take; it imports MPI on a node where other ranks do the same.
CHILD_LIMIT_S = 60.0

#: Prefixes of what launchers and batch systems tell a process: a child that starts its own world must not see it.
_LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "PALS_", "MPI_LOCAL", "HYDRA_", "HYDI_", "SLURM_")
#: Prefixes of MPI settings among them, which the child needs; except those that again come from a launcher.
_SETTING_PREFIXES = ("OMPI_MCA_", "OMPI_ALLOW_")
_MPIRUN_PREFIXES = ("OMPI_MCA_orte_", "OMPI_MCA_ess", "OMPI_MCA_pmix", "OMPI_MCA_initial_wdir")
#: The job's own ranks hold the cores and wait meanwhile: the child's two ranks share them, however few there are.
_OVERSUBSCRIBE = {"OMPI_MCA_rmaps_base_oversubscribe": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}


@dataclass(frozen=True)
class Route:
    """How boundary tensors travel.

    Attributes:
        device: the device that they are on.
        staged: whether they go through pinned host memory.
        description: the route and the reason for it, for people; empty on a CPU.
    """

    device: torch.device = CPU
    staged: bool = False
    description: str = ""

    @property
    def index(self) -> int:
        """Index of the GPU among those that the rank sees; -1 for a CPU."""
        return self.device.index if self.device.type == "cuda" else -1

    def stream(self) -> int:
        """Return the address of the current CUDA stream; 0 on a CPU."""
        if self.device.type == "cpu":
            return 0
        return int(torch.cuda.current_stream(self.device).cuda_stream)


ON_CPU = Route()


def choose_route(world: World, device: Device, *, limit_s: float) -> Route:
    """Choose the same route on all ranks. Collective; nothing is tried on CPUs or with a single rank.

    Raises:
        PipedreamError: the environment names no route, or a rank did not answer.
    """
    if device.kind == "cpu":
        return ON_CPU
    if world.size == 1:
        return Route(device.torch)
    return _probe(world, device, os.environ.get(ROUTE_VARIABLE, "") or "auto", limit_s)


def _probe(world: World, device: Device, own_setting: str, limit_s: float) -> Route:
    setting = str(exchange(world, {"route": own_setting}, limit_s=limit_s)[0]["route"])
    if setting not in ("auto", "direct", "staged"):
        raise PipedreamError(f"{ROUTE_VARIABLE} should be auto, direct or staged, not '{setting}'")
    if setting != "auto":
        return _route(device, f"set by {ROUTE_VARIABLE}" if setting == "staged" else None, tried=False)
    memory = memory_on(device.torch)
    own_error = run_child(child_command(memory, device.index)) if world.local_rank == 0 else None
    error = _first_error(world, own_error, CHILD_LIMIT_S + limit_s)
    if error is None:
        own_error = run_ping_pong(world.comm, memory, device=device.index, limit_s=min(limit_s, CHILD_LIMIT_S))
        error = _first_error(world, own_error, 2 * limit_s)
    return _route(device, error, tried=True)


def _first_error(world: World, own: str | None, limit_s: float) -> str | None:
    """Return the error of the first rank that has one, the same on all ranks; None if no rank has one."""
    located = f"on {world.host}: {own}" if own else None
    answers = exchange(world, {"error": located}, limit_s=limit_s)
    return next((answer["error"] for answer in answers if answer["error"]), None)


def _route(device: Device, reason: str | None, *, tried: bool) -> Route:
    """Return the staged route if there is a `reason` for it, else the direct one."""
    if reason is not None:
        return Route(device.torch, True, f"through pinned host memory ({reason})")
    how = "a ping-pong came back bit for bit" if tried else f"set by {ROUTE_VARIABLE}, not tried"
    return Route(device.torch, False, f"MPI reaches device memory itself ({how})")


def child_command(memory: str, index: int) -> list[str]:
    """Return the command of a node's child: two ranks where there is an mpirun, else one that sends to itself.

    Args:
        memory: the memory to try, as the core names it.
        index: index of the GPU; -1 for host memory.
    """
    program = [sys.executable, "-m", "pipedream_hpc.runtime.comm.ping_pong", memory, str(index)]
    installed = Path(sys.executable).parent / "mpirun"
    launcher = str(installed) if installed.exists() else shutil.which("mpirun")
    return [launcher, "-n", "2", *program] if launcher else program


def run_child(
    command: Sequence[str], *, limit_s: float = CHILD_LIMIT_S, environment: Mapping[str, str] = os.environ
) -> str | None:
    """Run a child and return what went wrong in a few words, or None.

    Args:
        command: the child's command.
        limit_s: seconds until the child and all processes that it started are killed.
        environment: of this process; the child does not get what launchers put into it.
    """
    child = subprocess.Popen(
        list(command),
        env={**own_world_environment(environment), **_OVERSUBSCRIBE},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return f"a ping-pong had not ended after {limit_s:.0f} s"
    if child.returncode == 0:
        return None
    errors = [line.removeprefix("ping-pong: ") for line in output.splitlines() if line.startswith("ping-pong: ")]
    if errors:
        return errors[0]
    if child.returncode < 0:
        return f"a ping-pong was ended by {signal.Signals(-child.returncode).name}"
    return f"a ping-pong ended with status {child.returncode}"


def own_world_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a process that starts its own MPI world."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(_LAUNCHER_PREFIXES)
        or (name.startswith(_SETTING_PREFIXES) and not name.startswith(_MPIRUN_PREFIXES))
    }
