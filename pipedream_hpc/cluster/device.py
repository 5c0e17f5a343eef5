"""Device: what a rank computes on, its CPU or one GPU of its node.

::

    node n1        local rank   0    1    2    3
                   GPU          0    1    2    3      the local rank, modulo the GPUs that the rank sees
    --gpus-per-task             0    0    0    0      each sees one, and another one: their UUIDs tell

Ranks compute all on CPUs or all on GPUs, and each on a GPU of its own, unless sharing is allowed. They tell
each other before anything else is done with the devices (`agreed`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from pipedream_hpc.cluster.world import World
from pipedream_hpc.core import load_memory
from pipedream_hpc.errors import PipedreamError

#: What may be asked for.
NAMES = ("auto", "cpu", "cuda")
#: Set to 1, ranks may share GPUs: for trying things out where there are more ranks than GPUs.
SHARE = "PIPEDREAM_SHARE_GPUS"


@dataclass(frozen=True)
class Device:
    """What one rank computes on.

    Attributes:
        kind: `cpu` or `cuda`.
        host: name of its node.
        index: of a GPU among those that its rank sees; 0 for a CPU.
        name: of a GPU, such as `NVIDIA H100 80GB HBM3`; empty for a CPU.
        uuid: of a GPU, the same for all ranks that see it; empty for a CPU.
        memory_bytes: of a GPU, what was free when it was chosen; 0 for a CPU.
    """

    kind: Literal["cpu", "cuda"]
    host: str
    index: int = 0
    name: str = ""
    uuid: str = ""
    memory_bytes: int = 0

    def __str__(self) -> str:
        if self.kind == "cpu":
            return f"CPU of node {self.host}"
        return f"GPU {self.index} of node {self.host}, {self.name}"

    @property
    def torch(self) -> torch.device:
        """As torch calls it."""
        return torch.device("cpu") if self.kind == "cpu" else torch.device("cuda", self.index)


def choose(wanted: str, world: World) -> Device:
    """The device that this rank is to compute on; a GPU is made the current one of this thread.

    Args:
        wanted: `cpu`, `cuda`, or `auto` for a GPU where torch sees one and the core can use it.
        world: of which the local rank chooses.

    Raises:
        PipedreamError: `wanted` is none of NAMES; or it is `cuda`, and torch or the core have no CUDA, or
            torch sees no GPU.
    """
    if wanted not in NAMES:
        raise PipedreamError(f"device should be one of {', '.join(NAMES)}, not '{wanted}'")
    lacking = None if wanted == "cpu" else _lacking()
    if wanted == "cuda" and lacking is not None:
        raise PipedreamError(f"rank {world.rank} on {world.host} cannot train on a GPU: {lacking}")
    if wanted == "cpu" or lacking is not None:
        return Device("cpu", world.host)
    index = world.local_rank % torch.cuda.device_count()
    torch.cuda.set_device(index)
    free_bytes, _ = torch.cuda.mem_get_info(index)
    properties = torch.cuda.get_device_properties(index)
    return Device("cuda", world.host, index, str(properties.name), str(properties.uuid), int(free_bytes))


def facts(device: Device, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What a rank tells the others, for `agreed`."""
    return {"device": asdict(device), "shares": environment.get(SHARE, "") not in ("", "0")}


def agreed(answers: Sequence[Mapping[str, Any]]) -> tuple[Device, ...]:
    """The devices of all ranks, from the `facts` of each, in the order of ranks.

    Sharing is allowed if any rank says so: launchers do not hand every variable on to every node.

    Raises:
        PipedreamError: some ranks have GPUs and some have not, or two ranks have the same.
    """
    devices = tuple(Device(**answer["device"]) for answer in answers)
    for rank, device in enumerate(devices):
        if device.kind != devices[0].kind:
            raise PipedreamError(
                f"ranks should train all on CPUs or all on GPUs, but rank 0 has the {devices[0]}, and rank {rank} the "
                f"{device}: give every rank a GPU (srun --gpus-per-task=1), or start all with --device cpu"
            )
    if any(answer["shares"] for answer in answers):
        return devices
    first: dict[str, int] = {}
    for rank, device in enumerate(devices):
        other = first.setdefault(device.uuid, rank) if device.kind == "cuda" else rank
        if other != rank:
            raise PipedreamError(
                f"ranks {other} and {rank} would both train on {device}: start as many ranks on a node as it has GPUs "
                f"(srun --gpus-per-task=1), or allow them to share with {SHARE}=1"
            )
    return devices


def _lacking() -> str | None:
    """Why this process cannot use a GPU; None if it can."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return f"torch {torch.__version__} has no CUDA: install a torch for your CUDA, or take --device cpu"
        return "torch sees none: ask for one (srun --gpus-per-task=1), look at nvidia-smi, or take --device cpu"
    if not load_memory().cuda_compiled():
        return (
            "the core of pipedream_hpc was built without CUDA: put nvcc on the PATH and build it again "
            "(pip install --force-reinstall --no-deps .), or take --device cpu"
        )
    return None
