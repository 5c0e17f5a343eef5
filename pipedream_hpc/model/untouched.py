"""Run a model to learn about it, and leave no trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pipedream_hpc.model.randomness import generators_kept


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run the block in training mode, then put back what it moved: mode, weights lent out, gradients, buffers, RNG."""
    modes = {module: module.training for module in model.modules()}
    held = {module: dict(module._parameters) for module in model.modules()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    with generators_kept(_device_of(model)):
        try:
            model.train()
            for parameter in gradients:
                parameter.grad = None
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for module, parameters in held.items():
                module._parameters.update(parameters)
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, before in buffers.items():
                    buffer.copy_(before)


def _device_of(model: nn.Module) -> torch.device:
    """The GPU that the model is on, if it is on one."""
    return next((weight.device for weight in model.parameters() if weight.is_cuda), torch.device("cpu"))
