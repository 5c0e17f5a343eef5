"""Run a model for a measurement and restore its state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pipedream_hpc.model.randomness import preserve_rng_state


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Run the block in training mode, then restore modes, borrowed weights, gradients, buffers and generators."""
    modes = {module: module.training for module in model.modules()}
    held = {module: dict(module._parameters) for module in model.modules()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    with preserve_rng_state(_device_of(model)):
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
    """Return the GPU of the model, or the CPU if no weight is on a GPU."""
    return next((weight.device for weight in model.parameters() if weight.is_cuda), torch.device("cpu"))
