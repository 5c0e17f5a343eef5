"""Checksum of tensors, by which ranks compare weights and checkpoints detect damage."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch


def checksum(tensors: Iterable[torch.Tensor], start: int = 0) -> int:
    """Return the CRC-32 of the tensors' bytes, one after the other, continued from the checksum `start`."""
    for tensor in tensors:
        if tensor.layout is not torch.strided:
            tensor = tensor.to_dense()
        flat = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg().view(-1)
        if flat.numel():
            start = zlib.crc32(flat.view(torch.uint8).numpy().data, start)
    return start
