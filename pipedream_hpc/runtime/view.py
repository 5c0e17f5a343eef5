"""View: memory that the core owns as a torch tensor, without a copy, on the CPU or on a GPU; who stands in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pipedream_hpc._memory import Memory, View

#: Where everything is unless somebody wishes otherwise.
CPU = torch.device("cpu")
#: Where the core keeps what stages compute on, by kind of device.
_MEMORY: dict[str, Memory] = {"cpu": "host", "cuda": "device"}


def memory_on(device: torch.device) -> Memory:
    """The core's name of the memory that `device` computes on."""
    return _MEMORY[device.type]


def tensor_over(
    view: View, shape: torch.Size, dtype: torch.dtype, *, offset: int = 0, device: torch.device
) -> torch.Tensor:
    """A tensor in the memory of `view`, with a version counter of its own; it keeps the memory alive.

    Args:
        view: in host memory for the CPU, in device memory for a GPU.
        shape: of the tensor, which is contiguous.
        dtype: of the tensor.
        offset: where it begins in the view, in bytes; a multiple of the dtype's size.
        device: that the memory is on.

    Raises:
        RuntimeError: the memory is on another device.
    """
    if not shape.numel():
        return torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        return torch.frombuffer(view, dtype=dtype, count=shape.numel(), offset=offset).view(shape)
    # By __cuda_array_interface__, which knows no bfloat16: as bytes, then as what they are.
    whole = torch.as_tensor(view, device=device)
    if whole.data_ptr() != view.address:
        raise RuntimeError(f"the memory is not on {device}: torch made a copy of it")
    return whole[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, copied if anything else stands in its memory."""
    return tensor.clone() if _users(tensor) > _ONE_USER else tensor


def _users(tensor: torch.Tensor) -> int:
    """Of the memory that `tensor` stands in, and one more for asking."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


_ONE_USER = _users(torch.empty(1))
