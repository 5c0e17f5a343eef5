"""Footprint: the memory of a rank, what was planned beside what was measured.

::

    planned     weights │ gradients │ optimizer │ activations │ slots      planning.memory, for the plan as it is run
    measured    weights │ gradients │ optimizer │ activations │ slots      counted here, tensor by tensor
    peak        ├──────────── the process, or its GPU, at its largest ────────────┤

Counting disturbs nothing: sizes of what lasts are asked for at the end, what autograd keeps of a unit is
looked up in its graph before the first backward, and how many units are in flight at once is noted down.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

from pipedream_hpc.planning.memory import MemoryParts
from pipedream_hpc.schedule.play import activation_slots, gradient_slots

if TYPE_CHECKING:
    from pipedream_hpc.planning.plan import Plan
    from pipedream_hpc.runtime.stage import Stage
    from pipedream_hpc.runtime.transport import Lines
    from pipedream_hpc.runtime.worker import Worker
    from pipedream_hpc.schedule.actions import Schedule


@dataclass(frozen=True)
class Footprint:
    """Memory of one rank.

    Attributes:
        rank: whose.
        stages: that it holds.
        device: where, such as `CPU of node n1`.
        planned: bytes by part; None where the plan says nothing of memory.
        measured: bytes by part, at their largest.
        peak_bytes: of the process, or of its GPU, at the largest since training began; None where the process
            has other ranks as well.
        before_bytes: likewise, when training began.
    """

    rank: int
    stages: tuple[int, ...]
    device: str
    planned: MemoryParts | None
    measured: MemoryParts
    peak_bytes: int | None = None
    before_bytes: int | None = None


class Scales:
    """What a stage's units and rounds weigh.

    Attributes:
        unit_bytes: that autograd keeps of the first unit from forward to backward, beside weights and slots.
        waiting_bytes: of the first unit, between the two parts of its backward: gradients of layers' outputs.
        early_bytes: likewise: gradients of the weights of layers that do not put theirs off.
        gradient_bytes: of the first round's gradients.
        in_flight: units alive at once, at most.
        put_off: units between the two parts of their backward at once, at most.
        run_again: units alive at once, at most, since their forward was run again.
    """

    def __init__(self) -> None:
        self.unit_bytes: int | None = None
        self.waiting_bytes: int | None = None
        self.early_bytes = 0
        self.gradient_bytes: int | None = None
        self.in_flight = self.put_off = self.run_again = 0

    def unit(self, graphs: Iterable[Node], others: Iterable[torch.Tensor], data: Iterable[torch.Tensor]) -> None:
        """Weigh a unit, just before its backward.

        Args:
            graphs: what backward begins with.
            others: whose memory does not count: weights, received tensors.
            data: from the data set; a microbatch is a part of a minibatch, and counts as that.
        """
        parts = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in data}
        kept = kept_storages(graphs)
        for tensor in others:
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        self.unit_bytes = sum(parts.get(place, nbytes) for place, nbytes in kept.items())

    def waiting(self, outputs: Iterable[int], early: Iterable[torch.Tensor]) -> None:
        """Weigh what waits between the parts of a unit's backward: gradients of outputs in bytes, those of weights."""
        self.waiting_bytes, self.early_bytes = sum(outputs), sum(gradient.nbytes for gradient in early)

    def round(self, gradients: Iterable[torch.Tensor | None]) -> None:
        """Weigh the first round's gradients."""
        if self.gradient_bytes is None:
            self.gradient_bytes = sum(gradient.nbytes for gradient in gradients if gradient is not None)


def kept_storages(graphs: Iterable[Node]) -> dict[int, int]:
    """Address and bytes of every storage that autograd keeps to go back from `graphs`, the results' `grad_fn`."""
    kept: dict[int, int] = {}
    todo: list[Any] = list(graphs)
    seen = set(todo)
    while todo:
        node = todo.pop()
        for tensor in _saved(node):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                todo.append(following)
    return kept


def _saved(node: Any) -> list[torch.Tensor]:
    """Tensors that one operation keeps for its backward."""
    found: list[torch.Tensor] = []
    for name in dir(node):
        if name.startswith("_saved_") or name == "saved_tensors":
            try:
                value = getattr(node, name)
            except RuntimeError:
                continue  # written over since, or given back: then it is kept no more
            found.extend(leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
    return found


class Peak:
    """The most memory that this process, or its GPU, has taken since `begin`.

    Args:
        device: on a GPU it is the GPU's memory that counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.before_bytes, self._core_bytes, self.begun = device, 0, 0, False

    def begin(self, core_bytes: int) -> None:
        """From now on; on a GPU the core has `core_bytes` that torch does not know of."""
        self.begun = True
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._core_bytes = core_bytes
            self.before_bytes = int(torch.cuda.memory_allocated(self._device)) + core_bytes
            return
        with contextlib.suppress(OSError):  # then it is that of the whole life of the process
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak
        self.before_bytes = _of_process("VmRSS")

    def read(self) -> int:
        """Bytes."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device)) + self._core_bytes
        return _of_process("VmHWM")


def _of_process(what: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def footprint(
    worker: Worker, plan: Plan, schedule: Schedule, lines: Lines, device: str, peak: Peak | None
) -> Footprint:
    """The memory of one rank.

    Args:
        worker: it, after it has trained.
        plan: which it runs.
        schedule: of the training.
        lines: what travels.
        device: where, in words.
        peak: of the process; None if it has other ranks as well.
    """
    stages = [worker.stages[index] for index in sorted(worker.stages)]
    planned = [plan.stages[stage.index].memory for stage in stages]
    parts = [_measured(stage, schedule, lines) for stage in stages]
    measured = _added(parts)
    return Footprint(
        rank=worker.rank,
        stages=tuple(stage.index for stage in stages),
        device=device,
        # A plan by counted operations knows no activations.
        planned=_added([each for each in planned if each is not None]) if plan.timed and all(planned) else None,
        measured=measured,
        peak_bytes=None if peak is None else peak.read(),
        before_bytes=None if peak is None else peak.before_bytes,
    )


def core_bytes(stages: Sequence[Stage], schedule: Schedule, lines: Lines, *, packs: bool) -> int:
    """What the core has allocated for stages: weight versions, slots and, if it `packs`, buffers to send from."""
    total = 0
    for stage in stages:
        ports = stage.ports
        total += stage.stash.nbytes
        total += sum(_slots_bytes(stage.index, port[0], port[1], schedule, lines) for port in ports.inboxes)
        for payload, far, _ in ports.outboxes if packs else ():
            # The double buffer of each channel.
            leaving = lines[stage.index, far] if payload == "activation" else lines[far, stage.index]
            total += 2 * sum(each.nbytes for each in leaving if payload == "activation" or each.gradient)
    return total


def _added(parts: Sequence[MemoryParts]) -> MemoryParts:
    return MemoryParts(**{name: sum(getattr(each, name) for each in parts) for name in MemoryParts.PARTS})


def _measured(stage: Stage, schedule: Schedule, lines: Lines) -> MemoryParts:
    optimizer, scales = stage.stash.optimizer, stage.scales
    states = tree_leaves(list(optimizer.state.values())) if optimizer is not None else []
    return MemoryParts(
        weights=stage.stash.nbytes,
        gradients=(scales.gradient_bytes or 0) + scales.early_bytes * scales.put_off,
        optimizer=sum(state.nbytes for state in states if isinstance(state, torch.Tensor)),
        activations=(scales.unit_bytes or 0) * (scales.run_again if stage.recomputes else scales.in_flight)
        + (scales.waiting_bytes or 0) * scales.put_off,
        slots=sum(_slots_bytes(stage.index, port[0], port[1], schedule, lines) for port in stage.ports.inboxes),
    )


def _slots_bytes(stage: int, payload: str, far: int, schedule: Schedule, lines: Lines) -> int:
    """Of one channel into the stage."""
    if payload == "activation":
        return activation_slots(schedule, far, stage) * sum(each.nbytes for each in lines[far, stage])
    returning = sum(each.nbytes for each in lines[stage, far] if each.gradient)
    return gradient_slots(schedule, stage, far) * returning
