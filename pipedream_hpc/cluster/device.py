"""Device: the CPU or GPU that a rank computes on.

::

    node n1        local rank   0    1    2    3
                   GPU          0    1    2    3      the local rank, modulo the GPUs that the rank sees
    --gpus-per-task             0    0    0    0      each rank sees a different GPU; their UUIDs differ

Either all ranks compute on CPUs, or all on GPUs, each on its own GPU unless sharing is allowed. Ranks exchange
their devices (`device_info`) and check this (`validate_devices`) before they use them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from pipedream_hpc.cluster.world import World
from pipedream_hpc.core import load_weights
from pipedream_hpc.errors import PipedreamError

#: Values of `--device`.
NAMES = ("auto", "cpu", "cuda")
#: Environment variable; 1 allows ranks to share GPUs, for experiments with more ranks than GPUs.
SHARE = "PIPEDREAM_SHARE_GPUS"


@dataclass(frozen=True)
class Device:
    """The device of one rank.

    Attributes:
        kind: `cpu` or `cuda`.
        host: name of its node.
        index: index of the GPU among those that its rank sees; 0 for a CPU.
        name: name of the GPU, such as `NVIDIA H100 80GB HBM3`; empty for a CPU.
        uuid: UUID of the GPU, the same for all ranks that see it; empty for a CPU.
        memory_bytes: free memory of the GPU when it was chosen; 0 for a CPU.
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
        """The torch.device."""
        return torch.device("cpu") if self.kind == "cpu" else torch.device("cuda", self.index)


def choose(name: str, world: World) -> Device:
    """Return the device that this rank computes on; a GPU becomes the current device of this thread.

    Args:
        name: `cpu`, `cuda`, or `auto`: a GPU if torch sees one and the core was built with CUDA.
        world: the ranks of the job; the local rank selects the GPU.

    Raises:
        PipedreamError: `name` is not one of NAMES; or it is `cuda`, and torch or the core were built without
            CUDA, or torch sees no GPU.
    """
    if name not in NAMES:
        raise PipedreamError(f"device should be one of {', '.join(NAMES)}, not '{name}'")
    problem = None if name == "cpu" else _why_no_gpu()
    if name == "cuda" and problem is not None:
        raise PipedreamError(f"rank {world.rank} on {world.host} cannot train on a GPU: {problem}")
    if name == "cpu" or problem is not None:
        return Device("cpu", world.host)
    index = world.local_rank % torch.cuda.device_count()
    torch.cuda.set_device(index)
    free_bytes, _ = torch.cuda.mem_get_info(index)
    properties = torch.cuda.get_device_properties(index)
    return Device("cuda", world.host, index, str(properties.name), str(properties.uuid), int(free_bytes))


def device_info(device: Device, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return what a rank sends to the others for `validate_devices`."""
    return {"device": asdict(device), "shares": environment.get(SHARE, "") not in ("", "0")}


def validate_devices(infos: Sequence[Mapping[str, Any]]) -> tuple[Device, ...]:
    """Return the devices of all ranks after checking that the ranks can train together.

    Args:
        infos: the `device_info` of every rank, in rank order. Sharing GPUs is allowed if any rank allows it,
            since launchers do not forward every variable to every node.

    Raises:
        PipedreamError: some ranks have GPUs and others do not, or two ranks have the same GPU.
    """
    devices = tuple(Device(**info["device"]) for info in infos)
    for rank, device in enumerate(devices):
        if device.kind != devices[0].kind:
            raise PipedreamError(
                f"all ranks should train on CPUs, or all on GPUs, but rank 0 has the {devices[0]}, and rank {rank} the "
                f"{device}: give every rank a GPU (srun --gpus-per-task=1), or start all ranks with --device cpu"
            )
    if any(info["shares"] for info in infos):
        return devices
    first: dict[str, int] = {}
    for rank, device in enumerate(devices):
        other = first.setdefault(device.uuid, rank) if device.kind == "cuda" else rank
        if other != rank:
            raise PipedreamError(
                f"ranks {other} and {rank} would both train on {device}: start at most one rank per GPU "
                f"(srun --gpus-per-task=1), or set {SHARE}=1 to let ranks share GPUs"
            )
    return devices


def _why_no_gpu() -> str | None:
    """Return why this process cannot use a GPU; None if it can."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return (
                f"torch {torch.__version__} was built without CUDA: install a torch for your CUDA, or use --device cpu"
            )
        return "torch sees no GPU: request one (srun --gpus-per-task=1), check nvidia-smi, or use --device cpu"
    if not load_weights().cuda_compiled():
        return (
            "the core of pipedream_hpc was built without CUDA: put nvcc on the PATH and rebuild it "
            "(pip install --force-reinstall --no-deps .), or use --device cpu"
        )
    return None
