"""How messages count what runs: epoch, minibatch and, where minibatches are cut, microbatch; all from 0."""

from __future__ import annotations

import pytest

from pipedream_hpc.runtime.execution.position import PassPosition
from pipedream_hpc.schedule.text import parse_action


@pytest.mark.parametrize(
    ("where", "n_microbatches", "text", "position"),
    [
        ("epoch 2", 1, "0F17v3", "epoch 2, minibatch 17"),
        ("epoch 2", 4, "0F17v3", "epoch 2, minibatch 4, microbatch 1"),
        ("epoch 0", 4, "0F3v0", "epoch 0, minibatch 0, microbatch 3"),
        ("epoch 0", 4, "0B4v0l", "epoch 0, minibatch 1, microbatch 0"),
        ("epoch 0", 2, "0I3v0", "epoch 0, minibatch 1, microbatch 1"),
        ("epoch 0", 2, "0W3v0", "epoch 0, minibatch 1, microbatch 1"),
        ("epoch 0", 2, "0SEND_F3>1r1", "epoch 0, minibatch 1, microbatch 1"),
        ("epoch 0", 2, "1RECV_F3<0r0", "epoch 0, minibatch 1, microbatch 1"),
        # A round is what one optimizer step learns from: it makes version 1 from round 0.
        ("epoch 1", 4, "0STEP1n8", "epoch 1, round 0"),
        ("epoch 1", 4, "0REDUCE5n8", "epoch 1, round 5"),
        ("epoch 1", 4, "0NORM5n8", "epoch 1, round 5"),
        ("evaluation before training", 1, "0F1v0", "evaluation before training, minibatch 1"),
    ],
)
def test_position_of_an_action(where: str, n_microbatches: int, text: str, position: str) -> None:
    assert PassPosition(where, n_microbatches).of(parse_action(text)) == position


def test_position_before_the_first_pass() -> None:
    assert PassPosition().of_microbatch(3) == "this pass, minibatch 3"
