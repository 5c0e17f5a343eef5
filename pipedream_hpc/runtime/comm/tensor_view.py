"""Tensor views of memory that the core owns, without a copy, on a CPU or a GPU; and who shares a tensor's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pipedream_hpc._weights import MemoryKind, View

#: The default device.
CPU = torch.device("cpu")
#: Kind of device -> the core's name for the memory that it computes on.
_MEMORY: dict[str, MemoryKind] = {"cpu": "host", "cuda": "device"}


def memory_on(device: torch.device) -> MemoryKind:
    """Return the core's name for the memory that `device` computes on."""
    return _MEMORY[device.type]


def tensor_over(
    view: View, shape: torch.Size, dtype: torch.dtype, *, offset: int = 0, device: torch.device
) -> torch.Tensor:
    """Create a tensor in the memory of `view`, with its own version counter; it keeps the memory alive.

    Args:
        view: a view of host memory for the CPU, of device memory for a GPU.
        shape: shape of the tensor, which is contiguous.
        dtype: dtype of the tensor.
        offset: bytes from the beginning of the view; a multiple of the dtype's size.
        device: the device that the memory belongs to.

    Raises:
        RuntimeError: the memory is on another device.
    """
    if not shape.numel():
        return torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        return torch.frombuffer(view, dtype=dtype, count=shape.numel(), offset=offset).view(shape)
    # __cuda_array_interface__ has no bfloat16: take the memory as bytes, then view them as `dtype`.
    as_bytes = torch.as_tensor(view, device=device)
    if as_bytes.data_ptr() != view.address:
        raise RuntimeError(f"the memory is not on {device}: torch copied it")
    return as_bytes[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def is_shared(tensor: torch.Tensor) -> bool:
    """Return whether another tensor uses the same memory."""
    return bool(_use_count(tensor) > _SINGLE_USE)


def clone_if_shared(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, or a clone of it if another tensor shares its memory."""
    return tensor.clone() if is_shared(tensor) else tensor


def _use_count(tensor: torch.Tensor) -> int:
    """Count the references to a tensor's storage, including the one that this call takes."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


_SINGLE_USE = _use_count(torch.empty(1))
