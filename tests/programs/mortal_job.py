"""small_job.py, but in the first attempt of a batch job rank 0 is killed when it begins its second epoch."""

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
        first_epoch_is_kept = Path(os.environ["RUN"], "checkpoints", "epoch-00001", "manifest.json").exists()
        if first_epoch_is_kept and os.environ.get("OMPI_COMM_WORLD_RANK") == os.environ.get("MORTAL"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__iter__()


def job(args: list[str]) -> Job:
    made = small_job.job(args)
    return replace(made, train=Mortal(made.train.dataset, batch_size=8, shuffle=True))
