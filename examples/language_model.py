"""A small GPT that learns Python: it predicts the next byte in the source text of the standard library.

pipedream profile examples/language_model.py
pipedream profile examples/language_model.py -- --layers 8 --width 256
"""

from __future__ import annotations

import argparse
import sysconfig
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pipedream_hpc import Job
from pipedream_hpc.zoo import gpt

BYTES = 256


class Windows(Dataset):
    """Consecutive sequences of `length` bytes; the target is the same sequence shifted by one byte."""

    def __init__(self, text: bytes, length: int) -> None:
        self.text, self.length = torch.frombuffer(bytearray(text), dtype=torch.uint8).long(), length

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        begin = index * self.length
        return self.text[begin : begin + self.length], self.text[begin + 1 : begin + self.length + 1]


def source_text(size: int) -> bytes:
    """Return the first `size` bytes of the standard library's source files, in the order of their names."""
    text = b""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= size:
            break
    return text[:size]


def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy: (samples, length, 256), (samples, length) -> ()."""
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the fraction of bytes that are predicted correctly: (samples, length, 256), (samples, length) -> ()."""
    return (output.argmax(dim=2) == target).float().mean()


def job(args: list[str]) -> Job:
    """Return the job that the `pipedream` commands run."""
    parser = argparse.ArgumentParser(prog="language_model.py")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--minibatch", type=int, default=16)
    parser.add_argument("--bytes", type=int, default=200_000)
    parser.add_argument("--tied", action="store_true", help="share one weight between the first and the last layer")
    options = parser.parse_args(args)
    text = source_text(options.bytes)
    train, test = Windows(text[: -len(text) // 10], options.length), Windows(text[-len(text) // 10 :], options.length)
    torch.manual_seed(0)  # the same initial weights on every rank
    return Job(
        model=gpt(
            layers=options.layers,
            width=options.width,
            heads=options.width // 64,
            vocabulary=BYTES,
            sequence=options.length,
            dropout=0.1,
            tied=options.tied,
        ),
        loss_fn=loss_fn,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        train_loader=DataLoader(train, batch_size=options.minibatch, shuffle=True, drop_last=True),
        test_loader=DataLoader(test, batch_size=options.minibatch),
        metrics={"accuracy": accuracy},
        example_inputs=torch.zeros(options.minibatch, options.length, dtype=torch.long),
        epochs=3,
    )
