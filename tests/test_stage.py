"""What a stage hands on while its sends may still be under way."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from pipedream_hpc import Pipeline

SAMPLES, WIDTH = 4, 6


class Shift(nn.Module):
    """A weight as large as what comes in, seen through a view as that is: one gradient for both."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(SAMPLES, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.flatten() + self.shift.flatten()).view_as(x) * 2


class Same(nn.Module):
    """Nothing but a view: the gradient that comes in is the one that goes on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(SAMPLES, WIDTH)


class Added(nn.Module):
    """A layer, and a weight as large as what it puts out: the gradient that comes in is that of both."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.shift = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.zeros(SAMPLES * WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.shift.view(SAMPLES, WIDTH)


def around(middle: nn.Module, x: torch.Tensor, **options: Any) -> Pipeline:
    """Three stages, `middle` being the second."""
    return Pipeline(
        nn.Sequential(nn.Linear(WIDTH, WIDTH), middle, nn.Linear(WIDTH, 2)),
        loss=nn.functional.mse_loss,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        example=x,
        plan="1-1-1",
        schedule="1f1b-flush",
        leaves=[type(middle)],
        device="cpu",
        **options,
    )


@pytest.mark.parametrize("middle", [Shift, Same])
def test_a_gradient_that_is_sent_stands_in_memory_of_its_own(middle: type[nn.Module]) -> None:
    torch.manual_seed(0)
    sent: list[tuple[torch.Tensor, torch.Tensor]] = []
    x, y = torch.randn(2 * SAMPLES, WIDTH), torch.randn(2 * SAMPLES, 2)
    with around(middle(), x, microbatches=2) as pipeline:
        (outbox,) = (box for port, box in pipeline.stages[1].ports.outboxes.items() if port[0] == "gradient")
        send = outbox.send

        def noting(unit: int, tensors: list[torch.Tensor]) -> None:
            sent.extend((tensor, tensor.clone()) for tensor in tensors)
            send(unit, tensors)

        outbox.send = noting  # type: ignore[method-assign]
        pipeline.fit([(x, y)] * 3)
    assert len(sent) == 6
    assert all(torch.equal(now, then) for now, then in sent), "as MPI would have read it, however late"


@pytest.mark.parametrize("split", [False, True])
def test_a_weights_gradient_leaves_the_slot_before_that_is_given_back(split: bool) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4 * SAMPLES, WIDTH), torch.randn(4 * SAMPLES, 2)
    with around(Added(), x, microbatches=4, split_backward=split) as pipeline:
        stage = pipeline.stages[1]
        (inbox,) = (box for port, box in stage.ports.inboxes.items() if port[0] == "gradient")
        release = inbox.release

        def given_back(unit: int) -> None:
            """From here on the slot is for the next gradient."""
            for slot in inbox._slots:  # type: ignore[attr-defined]
                places = {tensor.untyped_storage().data_ptr() for tensor in slot}
                for parameter in stage.stash.trained:
                    assert parameter.grad is None or parameter.grad.untyped_storage().data_ptr() not in places
            release(unit)

        inbox.release = given_back  # type: ignore[method-assign]
        pipeline.fit([(x, y)] * 2)
        # The gradient that came in waits with the layer, but in its slot, which counts already.
        assert stage.scales.waiting_bytes == (0 if split else None)
