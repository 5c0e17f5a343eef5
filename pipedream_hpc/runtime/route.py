"""Route: how boundary tensors that are on a GPU get into the network. It is tried before it is chosen.

::

    direct    GPU ──────────────── MPI ──────────────── GPU      MPI reads and writes device memory
    staged    GPU ─► pinned ────── MPI ────── pinned ─► GPU      chunk by chunk, by way of the host

An MPI that cannot reach device memory ends the process that tries, or delivers wrong bytes. So a child process
of every node plays ping-pong first; where that went well, all ranks pass bytes around, over the network too::

    each node     a child: two ranks of its own on the GPU, bytes compared      it may crash, or hang
    all ranks     rank 0 ─► 1 ─► 2 ─► ... ─► 0, bytes compared                  the links of the job
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
from pipedream_hpc.runtime.handshake import agree
from pipedream_hpc.runtime.ping_pong import play
from pipedream_hpc.runtime.view import CPU, memory_on

#: Set to `direct` or `staged`, nothing is tried; what rank 0 has counts.
WISH = "PIPEDREAM_GPU_ROUTE"
#: Seconds that a child may take, which imports MPI on a node whose other ranks do the same.
TRIAL_LIMIT_S = 60.0

#: What launchers and batch systems tell a process: a child that begins a world of its own must not hear it.
_OF_LAUNCHERS = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "PALS_", "MPI_LOCAL", "HYDRA_", "HYDI_", "SLURM_")
#: Settings of MPI among them, with which the child is to be tried; the second ones are a launcher's again.
_SETTINGS = ("OMPI_MCA_", "OMPI_ALLOW_")
_OF_MPIRUN = ("OMPI_MCA_orte_", "OMPI_MCA_ess", "OMPI_MCA_pmix", "OMPI_MCA_initial_wdir")
#: The cores are taken by the job's own ranks, which wait meanwhile: the child's two share them, whatever their count.
_SHARING = {"OMPI_MCA_rmaps_base_oversubscribe": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}


@dataclass(frozen=True)
class Route:
    """How boundary tensors travel.

    Attributes:
        device: that they are on.
        staged: whether they go by way of pinned host memory.
        words: the same for people, with a reason; empty on a CPU.
    """

    device: torch.device = CPU
    staged: bool = False
    words: str = ""

    @property
    def index(self) -> int:
        """Of the GPU among those that the rank sees; -1 for a CPU."""
        return self.device.index if self.device.type == "cuda" else -1

    def stream(self) -> int:
        """Address of the stream that computes now; 0 on a CPU."""
        if self.device.type == "cpu":
            return 0
        return int(torch.cuda.current_stream(self.device).cuda_stream)


ON_CPU = Route()


def choose_route(world: World, device: Device, *, limit_s: float) -> Route:
    """The route of all ranks. Collective; nothing is tried on CPUs, or by a rank alone.

    Raises:
        PipedreamError: the environment wishes for a route that there is none of, or a rank did not answer.
    """
    if device.kind == "cpu":
        return ON_CPU
    if world.size == 1:
        return Route(device.torch)
    return _agreed(world, device, os.environ.get(WISH, "") or "auto", limit_s)


def _agreed(world: World, device: Device, wish: str, limit_s: float) -> Route:
    wish = str(agree(world, {"route": wish}, limit_s=limit_s)[0]["route"])
    if wish not in ("auto", "direct", "staged"):
        raise PipedreamError(f"{WISH} should be auto, direct or staged, not '{wish}'")
    if wish != "auto":
        return _route(device, f"{WISH} says so" if wish == "staged" else None, tried=False)
    memory = memory_on(device.torch)
    own = attempt(command(memory, device.index)) if world.local_rank == 0 else None
    reason = _first_reason(world, own, TRIAL_LIMIT_S + limit_s)
    if reason is None:
        reason = _first_reason(
            world, play(world.comm, memory, device=device.index, limit_s=min(limit_s, TRIAL_LIMIT_S)), 2 * limit_s
        )
    return _route(device, reason, tried=True)


def _first_reason(world: World, own: str | None, limit_s: float) -> str | None:
    """What went wrong on the first rank on which something did; the same on all ranks."""
    said = f"on {world.host}: {own}" if own else None
    answers = agree(world, {"reason": said}, limit_s=limit_s)
    return next((answer["reason"] for answer in answers if answer["reason"]), None)


def _route(device: Device, reason: str | None, *, tried: bool) -> Route:
    if reason is not None:
        return Route(device.torch, True, f"by way of pinned host memory ({reason})")
    how = "a ping-pong came back bit for bit" if tried else f"{WISH} says so, and nothing was tried"
    return Route(device.torch, False, f"MPI reaches device memory itself ({how})")


def command(memory: str, index: int) -> list[str]:
    """What a node's child is: two ranks where there is an mpirun, else one that sends to itself.

    Args:
        memory: that is tried, as the core calls it.
        index: of the GPU; -1 for the host's memory.
    """
    program = [sys.executable, "-m", "pipedream_hpc.runtime.ping_pong", memory, str(index)]
    beside = Path(sys.executable).parent / "mpirun"
    launcher = str(beside) if beside.exists() else shutil.which("mpirun")
    return [launcher, "-n", "2", *program] if launcher else program


def attempt(
    words: Sequence[str], *, limit_s: float = TRIAL_LIMIT_S, environment: Mapping[str, str] = os.environ
) -> str | None:
    """Run a child; what went wrong in few words, or None.

    Args:
        words: its command.
        limit_s: seconds until it and all that it has started are ended.
        environment: of this process; what launchers have put in is left out.
    """
    child = subprocess.Popen(
        list(words),
        env={**alone(environment), **_SHARING},
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
    told = [line.removeprefix("ping-pong: ") for line in output.splitlines() if line.startswith("ping-pong: ")]
    if told:
        return told[0]
    if child.returncode < 0:
        return f"a ping-pong was ended by {signal.Signals(-child.returncode).name}"
    return f"a ping-pong ended with status {child.returncode}"


def alone(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that begins a world of its own."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(_OF_LAUNCHERS) or (name.startswith(_SETTINGS) and not name.startswith(_OF_MPIRUN))
    }
