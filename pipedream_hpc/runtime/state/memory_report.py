"""Memory report of a rank: what was planned and what was measured, part by part, and the peak of its process.

::

    planned     weights │ gradients │ optimizer │ activations │ slots      planning.memory, for the plan as it is run
    measured    weights │ gradients │ optimizer │ activations │ slots      execution.memory_probe, tensor by tensor
    peak        ├──────────── the process, or its GPU, at its largest ────────────┤
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipedream_hpc.planning.memory import MemoryParts
from pipedream_hpc.planning.plan import Plan


@dataclass(frozen=True)
class MemoryReport:
    """Memory of one rank.

    Attributes:
        rank: the rank.
        stages: the stages that it holds.
        device: the device and its node, such as `CPU of node n1`.
        planned: bytes by part; None if the plan has no memory figures.
        measured: bytes by part, at their largest.
        peak_bytes: largest memory of the process, or of its GPU, since training began; None if the process has other
            ranks as well.
        before_bytes: memory of the process, or of its GPU, when training began; None as for `peak_bytes`.
    """

    rank: int
    stages: tuple[int, ...]
    device: str
    planned: MemoryParts | None
    measured: MemoryParts
    peak_bytes: int | None = None
    before_bytes: int | None = None


class ProcessPeak:
    """The largest memory that this process, or its GPU, has taken since `begin`.

    Args:
        device: the device that the process computes on; for a GPU, its memory counts and not the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.before_bytes, self._core_bytes, self.begun = device, 0, 0, False

    def begin(self, core_bytes: int) -> None:
        """Start measuring.

        Args:
            core_bytes: device memory that the core has allocated, which is invisible to torch's allocator.
        """
        self.begun = True
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._core_bytes = core_bytes
            self.before_bytes = int(torch.cuda.memory_allocated(self._device)) + core_bytes
            return
        with contextlib.suppress(OSError):  # without it, the peak is that since the process started
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak
        self.before_bytes = _process_bytes("VmRSS")

    def read(self) -> int:
        """Return the peak in bytes."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device)) + self._core_bytes
        return _process_bytes("VmHWM")


def _process_bytes(field: str) -> int:
    """Read a field of /proc/self/status; without that file, return the peak since the process started."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_report(
    rank: int, plan: Plan, measured: Mapping[int, MemoryParts], device: str, peak: ProcessPeak | None
) -> MemoryReport:
    """Combine planned and measured memory of one rank.

    Args:
        rank: the rank.
        plan: the plan as it is run.
        measured: of each stage that the rank holds, by its number.
        device: the device and its node, for people.
        peak: of the process; None if it has other ranks as well.
    """
    stages = sorted(measured)
    planned = [memory for index in stages if (memory := plan.stages[index].memory) is not None]
    return MemoryReport(
        rank=rank,
        stages=tuple(stages),
        device=device,
        # A plan from counted operations has no figures for activations.
        planned=combine(planned) if plan.timed and len(planned) == len(stages) else None,
        measured=combine([measured[index] for index in stages]),
        peak_bytes=None if peak is None else peak.read(),
        before_bytes=None if peak is None else peak.before_bytes,
    )


def combine(parts: Sequence[MemoryParts]) -> MemoryParts:
    """Add up the memory of several stages, part by part."""
    return MemoryParts(**{name: sum(getattr(each, name) for each in parts) for name in MemoryParts.PARTS})
