"""A job that trains in a second: four linear layers on 64 random samples."""

from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pipedream_hpc import Job, PipedreamError


def job(args: list[str]) -> Job:
    if args not in ([], ["--width", "12"]):
        raise PipedreamError(f"small_job.py takes --width 12 or nothing, not {' '.join(args)}")
    torch.manual_seed(0)
    width = 12 if args else 16
    inputs = torch.randn(64, 16)
    data = TensorDataset(inputs, (inputs.sum(dim=1) > 0).long())
    return Job(
        model=nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 2)),
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        train_loader=DataLoader(data, batch_size=8, shuffle=True),
        test_loader=DataLoader(data, batch_size=8),
        example_inputs=inputs[:8],
        epochs=2,
    )
