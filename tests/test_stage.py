"""A stage is driven by actions in their text form, between channels that take notes: what it sends and releases, when.

The stage is the second of three: it receives from stage 0 on rank 0 and sends to stage 2 on rank 2.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from pipedream_hpc.model.capture import capture
from pipedream_hpc.model.materialize import materialize
from pipedream_hpc.model.partition import Partition
from pipedream_hpc.runtime.comm.channels import StageChannels
from pipedream_hpc.runtime.comm.loss_board import local_loss_board
from pipedream_hpc.runtime.execution.position import PassPosition
from pipedream_hpc.runtime.execution.run_losses import RunLosses
from pipedream_hpc.runtime.execution.split_backward import SplitBackward
from pipedream_hpc.runtime.execution.stage import Stage
from pipedream_hpc.runtime.execution.stage_loss import StageLoss
from pipedream_hpc.runtime.execution.worker import ActionError, Worker
from pipedream_hpc.runtime.weights.optimizer_step import StageOptimizer
from pipedream_hpc.runtime.weights.stash import WeightStash
from pipedream_hpc.schedule.text import parse_action

SAMPLES, WIDTH, SLOTS, RATE = 4, 6, 3, 0.1


class Layer(nn.Module):
    """A linear layer and tanh; counts the forwards of all its copies, where they are not taken for state."""

    counted = threading.local()

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Layer.counted.forwards = getattr(Layer.counted, "forwards", 0) + 1
        return self.inner(x).tanh()


class Shift(nn.Module):
    """A weight as large as the input, used through a view as the input is: autograd gives both the same gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(SAMPLES, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.flatten() + self.shift.flatten()).view_as(x) * 2


class View(nn.Module):
    """Returns a view: the gradient of its output is the gradient of its input, in the same memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(SAMPLES, WIDTH)


class Added(nn.Module):
    """A weight as large as the output: the gradient of the output is that of the weight, in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.shift = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.zeros(SAMPLES * WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.shift.view(SAMPLES, WIDTH)


@dataclass
class Receiver:
    """The receiving end of a channel. A released slot is overwritten, as by the next message.

    Attributes:
        letter: F for activations, B for gradients.
        messages: the tensor of every microbatch.
        notes: what happened.
    """

    letter: str
    messages: list[torch.Tensor]
    notes: list[str]
    slots: list[torch.Tensor] = field(default_factory=lambda: [torch.empty(SAMPLES, WIDTH) for _ in range(SLOTS)])
    slot_of: dict[int, torch.Tensor] = field(default_factory=dict)

    def ready(self, microbatch: int) -> bool:
        return bool(self.slots)

    def receive(self, microbatch: int) -> list[torch.Tensor]:
        slot = self.slot_of[microbatch] = self.slots.pop()
        return [slot.copy_(self.messages[microbatch])]

    def release(self, microbatch: int) -> None:
        self.notes.append(f"releases {self.letter}{microbatch}")
        self.slots.append(self.slot_of.pop(microbatch).fill_(torch.nan))


@dataclass
class Sender:
    """The sending end of a channel. MPI may read what is sent until the end of the test."""

    letter: str
    notes: list[str]
    sent: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def ready(self) -> bool:
        return True

    def send(self, microbatch: int, tensors: Sequence[torch.Tensor]) -> None:
        self.notes.append(f"sends {self.letter}{microbatch}")
        (tensor,) = tensors
        self.sent.append(tensor.detach())
        self.values.append(tensor.detach().clone())

    def drain(self) -> None:
        return None

    def unchanged(self) -> bool:
        """Return whether everything that was sent still has the values that it had."""
        return all(torch.equal(now, then) for now, then in zip(self.sent, self.values, strict=True))


class Driven:
    """The middle stage of three, and what it does.

    Args:
        middle: its module.
        slabs: weight versions that it keeps.
        split: whether actions split backwards.
        recompute: whether it runs forwards again.
        training: whether the pass trains.
    """

    def __init__(
        self, middle: nn.Module, *, slabs: int = 3, split: bool = False, recompute: bool = False, training: bool = True
    ) -> None:
        torch.manual_seed(0)
        self.plain = copy.deepcopy(middle)
        self.inputs = [torch.randn(SAMPLES, WIDTH) for _ in range(6)]
        self.gradients = [torch.randn(SAMPLES, WIDTH) for _ in range(6)]
        self.notes: list[str] = []
        self.receivers = Receiver("F", self.inputs, self.notes), Receiver("B", self.gradients, self.notes)
        self.senders = Sender("F", self.notes), Sender("B", self.notes)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), middle, nn.Linear(WIDTH, 2))
        graph = capture(model, torch.zeros(SAMPLES, WIDTH), (type(middle),))
        partition = Partition(graph, [[0], [1], [2]])
        part = partition.stage_module(1)
        materialize(graph, [part])
        stash = WeightStash(part.module, slabs, partial(torch.optim.SGD, lr=RATE), entries=part.entries)
        optimizer = StageOptimizer(stash.optimizer)
        self.stage = Stage(
            1,
            0,
            part,
            partition.edges,
            stash,
            optimizer,
            None,
            StageChannels(
                recv={("activation", 0, 0): self.receivers[0], ("gradient", 2, 2): self.receivers[1]},
                send={("activation", 2, 2): self.senders[0], ("gradient", 0, 0): self.senders[1]},
            ),
            StageLoss(
                nn.functional.mse_loss,
                RunLosses(local_loss_board(), [2]),
                optimizer,
                weights_of_others=part.weights_of_others,
            ),
            seed=0,
            split_backward=SplitBackward(part.modules, stash.trains) if split else None,
            recompute=recompute,
        )
        self.worker = Worker(1, [self.stage])
        data: Any = object()  # the middle stage reads none
        self.worker.begin(
            data,
            PassPosition("epoch 2"),
            training=training,
            first_microbatch=0,
            first_trained=0,
            score_fn=None,
            trace=False,
        )

    def run(self, text: str) -> str:
        """Carry out the actions of `text`; return them, one per line, with what the stage did."""
        lines = []
        for word in text.split():
            self.notes.clear()
            self.worker.run(parse_action(word))
            lines.append(f"{word:<12} {', '.join(self.notes)}".strip())
        return "\n" + "\n".join(lines) + "\n"


def actions_of(timeline: str) -> str:
    """Return the actions of a timeline."""
    return " ".join(line.split()[0] for line in timeline.strip().splitlines())


STEP_EACH = """
1RECV_F0<0r0
1F0v0
1SEND_F0>2r2 sends F0
1RECV_F1<0r0
1F1v0
1SEND_F1>2r2 sends F1
1RECV_B0<2r2
1B0v0l       releases B0
1SEND_B0>0r0 sends B0, releases F0
1STEP1n1
1RECV_F2<0r0
1F2v1
1SEND_F2>2r2 sends F2
1RECV_B1<2r2
1B1v0l       releases B1
1SEND_B1>0r0 sends B1, releases F1
1STEP2n1
1RECV_B2<2r2
1B2v1l       releases B2
1SEND_B2>0r0 sends B2, releases F2
1STEP3n1
"""
ONE_ROUND = """
1RECV_F0<0r0
1F0v0
1SEND_F0>2r2 sends F0
1RECV_F1<0r0
1F1v0
1SEND_F1>2r2 sends F1
1RECV_B0<2r2
1B0v0        releases B0
1SEND_B0>0r0 sends B0, releases F0
1RECV_B1<2r2
1B1v0l       releases B1
1SEND_B1>0r0 sends B1, releases F1
1STEP1n2
"""
#: The received tensors are kept for BackwardWeight, though the gradient of the input is sent before.
SPLIT = """
1RECV_F0<0r0
1F0v0s
1SEND_F0>2r2 sends F0
1RECV_F1<0r0
1F1v0s
1SEND_F1>2r2 sends F1
1RECV_B0<2r2
1I0v0
1SEND_B0>0r0 sends B0
1RECV_B1<2r2
1I1v0
1SEND_B1>0r0 sends B1
1W0v0        releases B0, releases F0
1W1v0l       releases B1, releases F1
1STEP1n2
"""
#: A backward is whole in the same pass; its weights' gradients are added first.
MIXED = """
1RECV_F0<0r0
1F0v0s
1SEND_F0>2r2 sends F0
1RECV_F1<0r0
1F1v0
1SEND_F1>2r2 sends F1
1RECV_B0<2r2
1I0v0
1SEND_B0>0r0 sends B0
1RECV_B1<2r2
1B1v0        releases B1
1SEND_B1>0r0 sends B1, releases F1
1W0v0l       releases B0, releases F0
1STEP1n2
"""
FORWARD_ONLY = """
1RECV_F0<0r0
1F0v0
1SEND_F0>2r2 sends F0, releases F0
1RECV_F1<0r0
1F1v0
1SEND_F1>2r2 sends F1, releases F1
"""


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("timeline", "rounds", "version_of"),
    [(STEP_EACH, [[0], [1], [2]], [0, 0, 1]), (ONE_ROUND, [[0, 1]], [0, 0])],
    ids=["1f1b", "one round"],
)
def test_a_whole_backward(timeline: str, rounds: list[list[int]], version_of: list[int], recompute: bool) -> None:
    driven = Driven(Layer(), recompute=recompute)
    assert driven.run(actions_of(timeline)) == timeline
    assert_as_plain_autograd(driven, rounds, version_of)


@pytest.mark.parametrize("timeline", [SPLIT, MIXED], ids=["split", "mixed"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_split_backward(timeline: str, recompute: bool) -> None:
    driven = Driven(Layer(), split=True, recompute=recompute)
    assert driven.run(actions_of(timeline)) == timeline
    assert_as_plain_autograd(driven, rounds=[[0, 1]], version_of=[0, 0])


def test_an_evaluation_keeps_nothing_after_the_send() -> None:
    driven = Driven(Layer(), training=False)
    assert driven.run(actions_of(FORWARD_ONLY)) == FORWARD_ONLY
    driven.worker.end()


def assert_as_plain_autograd(driven: Driven, rounds: list[list[int]], version_of: list[int]) -> None:
    """Assert the bits of what was sent, and the newest weights.

    Args:
        driven: a stage that has trained.
        rounds: the microbatches of every optimizer step.
        version_of: the version that every microbatch ran on.
    """
    driven.worker.end()
    versions, outputs, of_inputs = [dict(driven.plain.named_parameters())], {}, {}
    for members in rounds:
        total: dict[str, torch.Tensor] = {}
        for k in members:
            weights = {name: value.detach().requires_grad_() for name, value in versions[version_of[k]].items()}
            x = driven.inputs[k].clone().requires_grad_()
            outputs[k] = torch.func.functional_call(driven.plain, weights, x)
            outputs[k].backward(driven.gradients[k])
            of_inputs[k] = x.grad
            for name, weight in weights.items():
                total[name] = total[name] + weight.grad if name in total else weight.grad  # type: ignore[operator]
        newest = {name: weight.detach() for name, weight in versions[-1].items()}
        mean = {name: gradient / len(members) for name, gradient in total.items()}
        versions.append({name: torch.add(newest[name], mean[name], alpha=-RATE) for name in newest})
    activations, gradients = driven.senders
    assert activations.unchanged()
    assert gradients.unchanged()
    assert all(torch.equal(sent, outputs[k]) for k, sent in enumerate(activations.sent))
    assert all(torch.equal(sent, of_inputs[k]) for k, sent in enumerate(gradients.sent))
    found = dict(zip(driven.stage.stash.trained_names, driven.stage.stash.trained, strict=True))
    assert all(torch.equal(found[f"1.{name}"], weight) for name, weight in versions[-1].items())


def test_recomputation_runs_every_forward_twice() -> None:
    driven = Driven(Layer(), recompute=True)
    Layer.counted.forwards = 0
    driven.run(actions_of(STEP_EACH))
    assert Layer.counted.forwards == 2 * 3


@pytest.mark.parametrize("middle", [Shift, View])
def test_the_memory_of_a_sent_gradient_is_not_written_again(middle: type[nn.Module]) -> None:
    """Neither by the next gradient in the receive slot, nor by those that add up on the weight."""
    driven = Driven(middle())
    driven.run(actions_of(ONE_ROUND))
    assert len(driven.senders[1].sent) == 2
    assert driven.senders[1].unchanged()


@pytest.mark.parametrize("timeline", [ONE_ROUND, SPLIT], ids=["whole", "split"])
def test_the_gradient_of_a_weight_is_moved_out_of_the_slot_before_its_release(timeline: str) -> None:
    """The slot is overwritten when it is released."""
    driven = Driven(Added(), split=timeline is SPLIT)
    driven.run(actions_of(timeline))
    assert all(weight.isfinite().all() for weight in driven.stage.stash.trained)
    # The gradient that came in waits for BackwardWeight in its slot, which counts already.
    assert driven.stage.memory_probe.deferred_bytes == (0 if timeline is SPLIT else None)


def test_an_action_that_fails_names_rank_stage_position_and_action() -> None:
    driven = Driven(Layer())
    driven.run("1RECV_F0<0r0 1F0v0 1SEND_F0>2r2 1RECV_B0<2r2")
    words = (
        r"^rank 1 \(stage 1\) at epoch 2, minibatch 0, backward \(1B0v1\) failed: RuntimeError: "
        "microbatch 0 of stage 1 holds version 0, not 1$"
    )
    with pytest.raises(ActionError, match=words):
        driven.run("1B0v1")


def test_a_step_that_makes_another_version_fails() -> None:
    driven = Driven(Layer())
    driven.run("1RECV_F0<0r0 1F0v0 1SEND_F0>2r2 1RECV_B0<2r2 1B0v0l 1SEND_B0>0r0")
    with pytest.raises(ActionError, match=r"epoch 2, round 1, optimizer step \(1STEP2n1\) .* made version 1, not 2"):
        driven.run("1STEP2n1")


def test_a_receive_is_ready_when_its_channel_is() -> None:
    driven = Driven(Layer())
    assert driven.worker.ready(parse_action("1RECV_F0<0r0"))
    driven.receivers[0].slots.clear()
    assert not driven.worker.ready(parse_action("1RECV_F0<0r0"))
