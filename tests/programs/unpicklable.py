"""Train or evaluate with a DataLoader whose workers cannot be given what they need: unpicklable.py WHAT fit|evaluate"""

import sys
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pipedream_hpc import Pipeline


def main(what: str, method: str, dataset: Any) -> None:
    options: dict[str, Any] = {
        "collate_fn": {"collate_fn": lambda samples: samples},
        "main": {"dataset": dataset},
    }
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 6), torch.randint(0, 3, (24,)))
    loader: Any = DataLoader(**{"dataset": data, "batch_size": 4, "num_workers": 1, **options[what]})
    with Pipeline(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        example_inputs=torch.zeros(4, 6),
        plan=2,
    ) as pipeline:
        getattr(pipeline, method)(loader)


if __name__ == "__main__":

    class OfTheStart(TensorDataset):
        """A class that an import of this file does not define."""

    main(*sys.argv[1:], OfTheStart(torch.randn(24, 6), torch.randint(0, 3, (24,))))
