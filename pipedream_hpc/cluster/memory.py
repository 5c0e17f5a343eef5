"""Memory of this host that the process may still use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

#: Files of a cgroup: the limit, what is in use, the field of memory.stat that counts page cache that is not in use.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),  # version 2
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # version 1
)


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that can be allocated without swapping; 0 if the system does not tell.

    Limits that a batch system or a container sets by cgroups count.

    Args:
        proc: where the kernel shows its state.
        cgroups: where it shows cgroups.
    """
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (proc / "meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        return max(0, min([free, *_left_in_cgroups(proc, cgroups)]))
    return 0


def _left_in_cgroups(proc: Path, cgroups: Path) -> Iterator[int]:
    """Yield what the limit of each cgroup that the process is in leaves."""
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroups / "memory" if controllers else cgroups
        own = root / path.lstrip("/")
        # In a container the path may be that on the host, which is not visible: then the root is the container's own.
        for folder in (own, *own.parents):
            if folder != root and root not in folder.parents:
                break
            for limit, used, cache in _CGROUP_FILES:
                with contextlib.suppress(OSError, ValueError, StopIteration):
                    most, now = int((folder / limit).read_text()), int((folder / used).read_text())
                    counts = (folder / "memory.stat").read_text().splitlines()
                    yield most - now + next(int(each.split()[1]) for each in counts if each.split()[0] == cache)
