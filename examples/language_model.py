"""A small GPT that learns to write Python: the next byte of the standard library's own source text.

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
from pipedream_hpc.models import gpt

BYTES = 256


class Windows(Dataset):
    """Every sequence of `length` bytes, with the same sequence one byte later as its target."""

    def __init__(self, text: bytes, length: int) -> None:
        self.text, self.length = torch.frombuffer(bytearray(text), dtype=torch.uint8).long(), length

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        begin = index * self.length
        return self.text[begin : begin + self.length], self.text[begin + 1 : begin + self.length + 1]


def source_text(most: int) -> bytes:
    """The first bytes of the standard library, file by file."""
    text = b""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= most:
            break
    return text[:most]


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy: (samples, length, 256), (samples, length) -> ()."""
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def hits(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Fraction of bytes foretold."""
    return (output.argmax(dim=2) == target).float().mean()


def job(args: list[str]) -> Job:
    """What `pipedream profile` and `pipedream train` ask for."""
    parser = argparse.ArgumentParser(prog="language_model.py")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--minibatch", type=int, default=16)
    parser.add_argument("--bytes", type=int, default=200_000)
    parser.add_argument("--tied", action="store_true", help="one weight for the first and the last layer")
    wanted = parser.parse_args(args)
    text = source_text(wanted.bytes)
    learnt, kept = Windows(text[: -len(text) // 10], wanted.length), Windows(text[-len(text) // 10 :], wanted.length)
    torch.manual_seed(0)  # the same first weights on every rank
    return Job(
        model=gpt(wanted.layers, wanted.width, wanted.width // 64, BYTES, wanted.length, dropout=0.1, tied=wanted.tied),
        loss=loss,
        metric=hits,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        train=DataLoader(learnt, batch_size=wanted.minibatch, shuffle=True, drop_last=True),
        test=DataLoader(kept, batch_size=wanted.minibatch),
        example=torch.zeros(wanted.minibatch, wanted.length, dtype=torch.long),
        epochs=3,
    )
