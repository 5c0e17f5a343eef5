"""Train a small convolutional network on handwritten digits.

python digits.py                   all four stages in this process
mpirun -n 4 python digits.py       one stage per rank, with identical results
srun --mpi=pmix -n 4 python digits.py
"""

from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pipedream_hpc import Pipeline
from pipedream_hpc.job import accuracy


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64 * 4 * 4, 10),
    )


def main() -> None:
    torch.manual_seed(0)  # the same initial weights on every rank
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train_loader = DataLoader(TensorDataset(images[:1437], labels[:1437]), batch_size=32, shuffle=True)
    test_loader = DataLoader(TensorDataset(images[1437:], labels[1437:]), batch_size=32)

    with Pipeline(
        network(),
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.SGD, lr=0.02, momentum=0.9),
        example_inputs=images[:32],
        plan=4,
    ) as pipeline:
        for epoch in range(5):
            loss = pipeline.fit(train_loader)
            scores = pipeline.evaluate(test_loader, metrics={"accuracy": accuracy})
            if pipeline.rank == 0:
                print(f"epoch {epoch}  loss {loss:.6f}  test accuracy {scores['accuracy']:.4f}", flush=True)


if __name__ == "__main__":
    main()
