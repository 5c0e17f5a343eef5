"""Train a small convolutional network on handwritten digits.

python digits.py                   all four stages in this one process
mpirun -n 4 python digits.py       one stage per rank: the same numbers
srun --mpi=pmix -n 4 python digits.py
"""

from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pipedream_hpc import Pipeline


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
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train = DataLoader(TensorDataset(images[:1437], labels[:1437]), batch_size=32, shuffle=True)
    test = DataLoader(TensorDataset(images[1437:], labels[1437:]), batch_size=32)

    pipeline = Pipeline(
        network(),
        loss=nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.SGD, lr=0.02, momentum=0.9),
        example=images[:32],
        plan=4,
    )
    for epoch in range(5):
        loss = pipeline.fit(train)
        accuracy = pipeline.evaluate(test)
        if pipeline.rank == 0:
            print(f"epoch {epoch}  loss {loss:.6f}  test accuracy {accuracy:.4f}", flush=True)
    pipeline.close()


if __name__ == "__main__":
    main()
