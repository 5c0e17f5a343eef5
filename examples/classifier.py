"""The job of the demo: a convolutional classifier of real images.

pipedream profile examples/classifier.py                                 scikit-learn's digits, 8x8
pipedream profile examples/classifier.py -- --data fashion-mnist DIR     IDX files of Fashion-MNIST, 28x28
"""

from __future__ import annotations

import argparse
import gzip
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pipedream_hpc import Job, PipedreamError

MINIBATCH = 32


def job(args: list[str]) -> Job:
    """Return the job that the `pipedream` commands run."""
    parser = argparse.ArgumentParser(prog="classifier.py")
    parser.add_argument("--data", nargs="+", default=["digits"], metavar=("NAME", "DIR"))
    name, *folder = parser.parse_args(args).data
    if name == "digits" and not folder:
        train, test = digits()
    elif name == "fashion-mnist" and len(folder) == 1:
        train, test = (idx(Path(folder[0]), part) for part in ("train", "t10k"))
    else:
        raise PipedreamError(f"--data takes 'digits' or 'fashion-mnist DIR', not {' '.join([name, *folder])!r}")
    torch.manual_seed(0)  # the same initial weights on every rank
    return Job(
        model=classifier(size=train.tensors[0].shape[-1]),
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=partial(torch.optim.SGD, lr=0.02, momentum=0.9),
        train_loader=DataLoader(train, batch_size=MINIBATCH, shuffle=True),
        test_loader=DataLoader(test, batch_size=MINIBATCH),
        example_inputs=train.tensors[0][:MINIBATCH],
        epochs=30,
    )


def classifier(size: int) -> nn.Sequential:
    """Create four convolutions and two linear layers for grey images of size x size pixels and ten classes."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 32),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (size // 4) ** 2, 128),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Linear(128, 10),
    )


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return training and test set of the 1,797 handwritten digits of scikit-learn; every fifth is in the test set."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    in_test = torch.arange(len(labels)) % 5 == 4
    return TensorDataset(images[~in_test], labels[~in_test]), TensorDataset(images[in_test], labels[in_test])


def idx(folder: Path, part: str) -> TensorDataset:
    """Read the part `train` or `t10k` of a data set in MNIST's IDX format, plain or gzipped."""
    images = torch.tensor(read_idx(folder, f"{part}-images-idx3-ubyte", 3)).unsqueeze(1) / 255
    labels = torch.tensor(read_idx(folder, f"{part}-labels-idx1-ubyte", 1)).long()
    if len(images) != len(labels):
        raise PipedreamError(f"{folder}: {part} has {len(images)} images but {len(labels)} labels")
    return TensorDataset(images, labels)


def read_idx(folder: Path, name: str, dims: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes: magic 0, 0, 8, dims; big-endian sizes; then the values."""
    plain, zipped = folder / name, folder / f"{name}.gz"
    if not plain.is_file() and not zipped.is_file():
        raise PipedreamError(f"{folder} contains neither {name} nor {name}.gz: give the folder of the IDX files")
    content = plain.read_bytes() if plain.is_file() else gzip.decompress(zipped.read_bytes())
    header = 4 + 4 * dims
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims))
    if content[:4] != bytes([0, 0, 8, dims]) or len(content) != header + math.prod(shape):
        raise PipedreamError(
            f"{folder / name} is not a complete IDX file of unsigned bytes in {dims} dimensions: download it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
