"""small_job.py, but rank MORTAL of the environment is killed when it begins its second epoch."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import small_job
from torch.utils.data import DataLoader

from pipedream_hpc import Job


class Mortal(DataLoader):
    def __iter__(self) -> Iterator[Any]:
        mortal = os.environ.get("MORTAL")
        if mortal is not None and mortal == os.environ.get("OMPI_COMM_WORLD_RANK"):
            first_epoch = Path(os.environ["RUN"], "checkpoints", "epoch-00001", "manifest.json")
            if first_epoch.exists():
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__iter__()


def job(args: list[str]) -> Job:
    made = small_job.job(args)
    return replace(made, train_loader=Mortal(made.train_loader.dataset, batch_size=8, shuffle=True))
