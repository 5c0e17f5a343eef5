"""Stand-ins: weights and buffers without values that a model holds while its forward is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipedream_hpc.model.recipe import tensors_of


class StandIns:
    """What stands for a model's parameters, and for its buffers that have no values.

    Args:
        model: the user's model.
        fake: the mode that makes tensors without values; None to record with the parameters themselves.
        device: the device that tensors without values are on.

    Attributes:
        parameters: qualified names of the parameters, by the identity of what stands for them.
        buffers: what stands for buffers, by identity.
    """

    def __init__(self, model: nn.Module, fake: FakeTensorMode | None, device: torch.device) -> None:
        self._model, self._fake, self._device = model, fake, device
        self.parameters: dict[int, str] = {}
        self.buffers: dict[int, torch.Tensor] = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the model hold them in the block."""
        before: list[tuple[Any, Any, torch.Tensor]] = []
        stands_for: dict[int, nn.Parameter] = {}
        first_names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        for module in self._model.modules():
            for key, parameter in list(module._parameters.items()):
                if parameter is None:
                    continue
                if id(parameter) not in stands_for:
                    stands_for[id(parameter)] = self._of(parameter)
                    self.parameters[id(stands_for[id(parameter)])] = first_names[id(parameter)]
                before.append((module._parameters, key, parameter))
                module._parameters[key] = stands_for[id(parameter)]
            flat: list[Any] = getattr(module, "_flat_weights", [])
            for position, parameter in enumerate(flat):
                if id(parameter) in stands_for:
                    before.append((flat, position, parameter))
                    flat[position] = stands_for[id(parameter)]
        made: dict[int, torch.Tensor] = {}
        for place in list(tensors_of(self._model)):
            # Buffers of a model that was given as a function may have no values yet.
            if isinstance(place.tensor, nn.Parameter) or not place.tensor.is_meta or self._fake is None:
                continue
            if id(place.tensor) not in made:
                with self._fake:
                    made[id(place.tensor)] = torch.empty_like(place.tensor, device=self._device)
            before.append((place.container, place.attribute, place.tensor))
            place.container[place.attribute] = made[id(place.tensor)]
        self.buffers.update((id(each), each) for each in made.values())
        try:
            yield
        finally:
            for container, key, tensor in before:
                container[key] = tensor

    def _of(self, parameter: nn.Parameter) -> nn.Parameter:
        if self._fake is None:
            return parameter
        with self._fake:
            empty = (
                torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device=self._device)
                if parameter.layout is torch.strided
                else torch.empty_like(parameter, device=self._device)
            )
        made = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, value in vars(parameter).items():
            setattr(made, name, value)
        return made
