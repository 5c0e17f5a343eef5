"""What a stage hands on while its sends may still be under way."""

from __future__ import annotations

from functools import partial

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


@pytest.mark.parametrize("middle", [Shift, Same])
def test_a_gradient_that_is_sent_stands_in_memory_of_its_own(middle: type[nn.Module]) -> None:
    torch.manual_seed(0)
    sent: list[tuple[torch.Tensor, torch.Tensor]] = []
    x, y = torch.randn(2 * SAMPLES, WIDTH), torch.randn(2 * SAMPLES, 2)
    with Pipeline(
        nn.Sequential(nn.Linear(WIDTH, WIDTH), middle(), nn.Linear(WIDTH, 2)),
        loss=nn.functional.mse_loss,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        example=x,
        plan="1-1-1",
        schedule="1f1b-flush",
        microbatches=2,
        leaves=[Shift, Same],
        device="cpu",
    ) as pipeline:
        (outbox,) = (box for port, box in pipeline.stages[1].ports.outboxes.items() if port[0] == "gradient")
        send = outbox.send

        def noting(unit: int, tensors: list[torch.Tensor]) -> None:
            sent.extend((tensor, tensor.clone()) for tensor in tensors)
            send(unit, tensors)

        outbox.send = noting  # type: ignore[method-assign]
        pipeline.fit([(x, y)] * 3)
    assert len(sent) == 6
    assert all(torch.equal(now, then) for now, then in sent), "as MPI would have read it, however late"
