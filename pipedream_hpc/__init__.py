"""PipeDream as an MPI runtime: pipeline-parallel training with 1F1B and weight stashing.

Importing the package needs neither MPI nor a GPU nor the compiled core; each is loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipedream_hpc.version import VERSION

if TYPE_CHECKING:
    from pipedream_hpc.config import RunConfig, ScheduleConfig, TrainConfig
    from pipedream_hpc.errors import PipedreamError
    from pipedream_hpc.job import Job
    from pipedream_hpc.planning.plan import Plan
    from pipedream_hpc.planning.profile import Profile
    from pipedream_hpc.planning.topology import Topology
    from pipedream_hpc.runtime.pipeline import Pipeline, Step
    from pipedream_hpc.schedule.trace import Trace

__version__ = VERSION

_HOMES = {
    "Job": "pipedream_hpc.job",
    "Pipeline": "pipedream_hpc.runtime.pipeline",
    "PipedreamError": "pipedream_hpc.errors",
    "Plan": "pipedream_hpc.planning.plan",
    "Profile": "pipedream_hpc.planning.profile",
    "RunConfig": "pipedream_hpc.config",
    "ScheduleConfig": "pipedream_hpc.config",
    "Step": "pipedream_hpc.runtime.pipeline",
    "Topology": "pipedream_hpc.planning.topology",
    "Trace": "pipedream_hpc.schedule.trace",
    "TrainConfig": "pipedream_hpc.config",
}

__all__ = [
    "Job",
    "PipedreamError",
    "Pipeline",
    "Plan",
    "Profile",
    "RunConfig",
    "ScheduleConfig",
    "Step",
    "Topology",
    "Trace",
    "TrainConfig",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipedream_hpc' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
