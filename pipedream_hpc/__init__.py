"""PipeDream as an MPI runtime: pipeline-parallel training with 1F1B and weight stashing.

Importing the package needs neither MPI nor a GPU nor the compiled core; each is loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipedream_hpc.errors import PipedreamError
    from pipedream_hpc.job import Job
    from pipedream_hpc.planning.plan import Plan
    from pipedream_hpc.planning.profile import Profile
    from pipedream_hpc.planning.topology import Topology
    from pipedream_hpc.runtime.pipeline import Pipeline
    from pipedream_hpc.runtime.step import Clip
    from pipedream_hpc.schedule.trace import Trace

__version__ = "0.1.0"

_HOMES = {
    "Clip": "pipedream_hpc.runtime.step",
    "Job": "pipedream_hpc.job",
    "Pipeline": "pipedream_hpc.runtime.pipeline",
    "PipedreamError": "pipedream_hpc.errors",
    "Plan": "pipedream_hpc.planning.plan",
    "Profile": "pipedream_hpc.planning.profile",
    "Topology": "pipedream_hpc.planning.topology",
    "Trace": "pipedream_hpc.schedule.trace",
}

__all__ = ["Clip", "Job", "PipedreamError", "Pipeline", "Plan", "Profile", "Topology", "Trace"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipedream_hpc' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
