"""Random number generators of the user, kept apart from those of training.

Training seeds torch's generators again and again. What the user's own code draws, before, between and after steps,
must not change by that::

    user      draw a │                     │ draw b │                │ draw c       a b c as without training
    training         │ seed, draw ... seed │        │ seed, draw ... │
"""

from __future__ import annotations

import torch


class UserGenerators:
    """The states of torch's generators that belong to the user.

    Args:
        device: what the stages compute on.
    """

    def __init__(self, device: torch.device) -> None:
        devices = set()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            devices.add(torch.cuda.current_device())
        if device.type == "cuda":
            devices.add(torch.cuda.current_device() if device.index is None else device.index)
        self._devices = sorted(devices)
        self.save()

    def save(self) -> None:
        """Take the current states as the user's."""
        self._cpu = torch.get_rng_state()
        self._cuda = {index: torch.cuda.get_rng_state(index) for index in self._devices}

    def restore(self) -> None:
        """Set torch's generators to the user's states."""
        torch.set_rng_state(self._cpu)
        for index, state in self._cuda.items():
            torch.cuda.set_rng_state(state, index)
