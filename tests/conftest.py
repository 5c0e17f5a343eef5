"""One compute thread and no GPU everywhere: sums are then taken in one order, and results compare bit for bit."""

import os
from pathlib import Path
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMPI_ALLOW_RUN_AS_ROOT"] = os.environ["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"  # containers run as root
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and output without a terminal is as wide as it needs to be
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # benchmarks/gpu has the tests that want one

#: Files that use ranks.call: one process of pytest-xdist runs them all, and starts the ranks once.
ON_TEAMS = (
    *("zoo", "checkpoint", "modes", "draws", "exact", "train_written", "verify", "anything", "pipeline", "cut_points"),
    *("gpu_route", "boundary_values", "losses", "user_minibatches"),
)
#: Other files that take long, the longest first: started last, they would keep one core waiting.
LONG = ("transformers", "slurm", "materialize", "core_native", "data", "check_model", "examples", "on_ranks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start what takes long first."""
    order = {f"test_{name}": number for number, name in enumerate((*ON_TEAMS, *LONG))}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run the tests of a file in one process, and those of all files in ON_TEAMS."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "teams" if Path(file).stem.removeprefix("test_") in ON_TEAMS else file

    return Scheduling(config, log)
