"""Memory probe: count the memory of a stage, tensor by tensor, while it trains.

Counting changes nothing: what lasts is counted at the end; what autograd keeps of a microbatch is read from its graph
before the first backward; and the number of microbatches in flight is recorded as they come and go.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

from pipedream_hpc.model.checkpoints import NotKeptError, counting_what_is_kept
from pipedream_hpc.planning.memory import MemoryParts
from pipedream_hpc.planning.plan import Edge
from pipedream_hpc.runtime.comm.channels import ChannelKey, EdgeTensors, StageChannels
from pipedream_hpc.runtime.weights.stage_state import StageState
from pipedream_hpc.schedule.actions import Schedule
from pipedream_hpc.schedule.replay import activation_slots, gradient_slots


class MemoryProbe:
    """Sizes of a stage's microbatches and rounds, and how many of them are alive at once.

    Attributes:
        microbatch_bytes: what autograd keeps of the first microbatch from forward to backward, without weights and
            receive slots.
        deferred_bytes: gradients of layers' outputs that the first microbatch keeps between the two parts of its
            backward.
        early_bytes: gradients of weights that its first part computes, and that wait for the others.
        gradient_bytes: gradients of the first round.
        in_flight: most microbatches alive at once.
        deferred: most microbatches between the two parts of their backward at once.
        recomputed: most microbatches at once whose forward has been run again and that are not finished.
    """

    def __init__(self) -> None:
        self.microbatch_bytes: int | None = None
        self.deferred_bytes: int | None = None
        self.early_bytes = 0
        self.gradient_bytes: int | None = None
        self.in_flight = self.deferred = self.recomputed = 0

    def count_microbatch(
        self, graphs: Iterable[Node], others: Iterable[torch.Tensor], data: Iterable[torch.Tensor]
    ) -> None:
        """Count what autograd keeps of a microbatch, just before its backward.

        Args:
            graphs: the nodes that backward begins with.
            others: tensors that do not count: weights and received tensors.
            data: tensors from the data set; a microbatch's is a view of its minibatch's and counts with its own size.
        """
        data = [tensor for tensor in data if tensor.layout is torch.strided]
        sizes = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in data}
        kept = kept_storages(graphs)
        for tensor in others:
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        self.microbatch_bytes = sum(sizes.get(address, nbytes) for address, nbytes in kept.items())

    def count_deferred(self, output_bytes: Iterable[int], early: Iterable[torch.Tensor]) -> None:
        """Count what a microbatch keeps between the two parts of its backward.

        Args:
            output_bytes: sizes of the gradients of layers' outputs.
            early: gradients of weights that the first part has computed.
        """
        self.deferred_bytes, self.early_bytes = sum(output_bytes), sum(gradient.nbytes for gradient in early)

    def count_round(self, gradients: Iterable[torch.Tensor | None]) -> None:
        """Count the gradients of a round; only the first call counts."""
        if self.gradient_bytes is None:
            self.gradient_bytes = sum(gradient.nbytes for gradient in gradients if gradient is not None)


def kept_storages(graphs: Iterable[Node]) -> dict[int, int]:
    """Return address and bytes of every storage that autograd keeps for the backward from `graphs`."""
    kept: dict[int, int] = {}
    todo: list[Any] = list(graphs)
    seen = set(todo)
    while todo:
        node = todo.pop()
        for tensor in _saved_tensors(node):
            if tensor.layout is not torch.strided:
                continue  # a sparse constant has no storage of its own
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return kept


def _saved_tensors(node: Any) -> list[torch.Tensor]:
    """Return the tensors that one operation keeps for its backward."""
    found: list[torch.Tensor] = []
    for name in dir(node):
        if name.startswith("_saved_") or name == "saved_tensors":
            try:
                with counting_what_is_kept():
                    value = getattr(node, name)
            except NotKeptError as error:
                value = error.arguments
            except RuntimeError:
                continue  # overwritten or freed since then: it is not kept any more
            found.extend(leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
    return found


def measured_parts(
    state: StageState,
    probe: MemoryProbe,
    channels: StageChannels,
    schedule: Schedule,
    edges: EdgeTensors,
    *,
    recompute: bool,
) -> MemoryParts:
    """Return the memory of one replica of a stage after training, in bytes by part.

    Args:
        state: its weights and optimizer.
        probe: what was counted while it trained.
        channels: its channel ends.
        schedule: of the training.
        edges: what travels along each edge.
        recompute: whether it runs forwards again before backwards.
    """
    optimizer = state.stash.optimizer
    states = tree_leaves(list(optimizer.state.values())) if optimizer is not None else []
    return MemoryParts(
        weights=state.stash.nbytes,
        gradients=(probe.gradient_bytes or 0) + probe.early_bytes * probe.deferred,
        optimizer=sum(each.nbytes for each in states if isinstance(each, torch.Tensor)),
        activations=(probe.microbatch_bytes or 0) * (probe.recomputed if recompute else probe.in_flight)
        + (probe.deferred_bytes or 0) * probe.deferred,
        slots=sum(_slot_bytes(state.index, key, schedule, edges) for key in channels.recv),
    )


def core_bytes(
    stages: Iterable[tuple[StageState, StageChannels]], schedule: Schedule, edges: EdgeTensors, *, packs: bool
) -> int:
    """Return the bytes that the core has allocated for stages: weight versions, receive slots and send buffers.

    Args:
        stages: weights and channel ends of each stage.
        schedule: of the training.
        edges: what travels along each edge.
        packs: whether channels copy messages into buffers of their own to send them.
    """
    total = 0
    for state, channels in stages:
        total += state.stash.nbytes
        total += sum(_slot_bytes(state.index, key, schedule, edges) for key in channels.recv)
        for payload, peer_stage, _ in channels.send if packs else ():
            # Each channel has two buffers.
            sent = (
                edges[Edge(state.index, peer_stage)]
                if payload == "activation"
                else edges[Edge(peer_stage, state.index)]
            )
            total += 2 * sum(each.nbytes for each in sent if payload == "activation" or each.has_gradient)
    return total


def _slot_bytes(stage: int, key: ChannelKey, schedule: Schedule, edges: EdgeTensors) -> int:
    """Return the bytes of the receive slots of one channel into `stage`."""
    payload, peer_stage, _ = key
    if payload == "activation":
        return activation_slots(schedule, peer_stage, stage) * sum(
            each.nbytes for each in edges[Edge(peer_stage, stage)]
        )
    returning = sum(each.nbytes for each in edges[Edge(stage, peer_stage)] if each.has_gradient)
    return gradient_slots(schedule, stage, peer_stage) * returning
