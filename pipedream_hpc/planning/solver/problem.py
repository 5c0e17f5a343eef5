"""Problem: the input of the solvers, and the time of any single stage.

Cuts are numbered as in planning.solver.cuts, devices along one row as in planning.solver.placement. A stage runs
the layers between two cuts on a run of devices; the later stages run on the devices after those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pipedream_hpc.planning.cost import Formula
from pipedream_hpc.planning.memory import MemoryRule, Recompute
from pipedream_hpc.planning.solver.cuts import Cuts
from pipedream_hpc.planning.solver.placement import DeviceRow

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PlacedStage:
    """A stage of a solution: the layers between two cuts, on consecutive devices of every row.

    Attributes:
        first: the cut before the stage.
        last: the cut after the stage.
        first_device: its first device in every row.
        replicas: number of its devices in every row.
        recompute: whether it runs its forward again before the backward.
    """

    first: int
    last: int
    first_device: int
    replicas: int
    recompute: bool


@dataclass(frozen=True)
class LinkUse:
    """How stages use the links of the topology; all arrays have one element per stage.

    Attributes:
        replicas: replicas in one row.
        round_s: time of one synchronisation of zero bytes, in seconds.
        round_s_per_byte: additional seconds per byte of parameters.
        input_shares: shares of the traffic with the previous stage, by level (placement.DeviceRow.shares).
        output_shares: shares of the traffic with the next stage, by level.
    """

    replicas: Ints
    round_s: Floats
    round_s_per_byte: Floats
    input_shares: list[Floats]
    output_shares: list[Floats]


@dataclass(frozen=True)
class Problem:
    """One row of devices, and everything that determines the cost of a stage on it.

    Attributes:
        cuts: the model's cuts.
        row: the row of devices.
        formula: cost formula of stages and boundaries.
        rule: memory formula.
        memory_bytes: memory limit of one device; None: no limit.
        recompute: whether stages may, or must, run their forward again before their backward.
        straight: one replica per stage.
        fewer: whether devices may be left unused.
        cut_after: layers, each with its consumers, that must not share a stage with any of them.
        together: groups of layers that must share a stage.
    """

    cuts: Cuts
    row: DeviceRow
    formula: Formula
    rule: MemoryRule
    memory_bytes: int | None = None
    recompute: Recompute = "never"
    straight: bool = False
    fewer: bool = False
    cut_after: tuple[tuple[int, tuple[int, ...]], ...] = ()
    together: tuple[tuple[int, ...], ...] = ()

    @cached_property
    def crossing_bytes(self) -> Floats:
        """Bytes that cross each cut, as the formula counts them; 0 at the first and the last cut."""
        chosen = self.cuts.antichain_bytes if self.formula.antichains else self.cuts.crossing_bytes
        return np.concatenate(([0.0], chosen[1:-1], [0.0]))

    def ends(self, first: int) -> Ints:
        """Return the cuts at which a stage that begins at cut `first` may end."""
        ends = self.cuts.after(first)
        allowed = np.ones(len(ends), bool)
        for layer, consumers in self.cut_after:
            inside = self._inside(layer, first, ends)
            for consumer in consumers:
                allowed &= ~(inside & self._inside(consumer, first, ends))
        for group in self.together:
            inside = np.array([self._inside(layer, first, ends) for layer in group])
            allowed &= inside.all(axis=0) | ~inside.any(axis=0)
        return ends[allowed]

    def _inside(self, layer: int, first: int, ends: Ints) -> Bools:
        before = self.cuts.contains(layer)
        return np.asarray(before[ends] & ~before[first])

    def thinned(self, count: int) -> Problem:
        """Return the same problem with `count` of its cuts, or with all if there are no more."""
        if len(self.cuts) <= count:
            return self
        kept = np.unique(np.linspace(0, len(self.cuts) - 1, count).round().astype(np.int64))
        return dataclasses.replace(self, cuts=self.cuts.select(kept))

    def stage_times(self, first: int, ends: Ints, device: int, most: int) -> tuple[Floats, Bools]:
        """Return the seconds per minibatch of stages that begin at cut `first`, and whether they recompute.

        Args:
            first: the cut that all of them begin at.
            ends: the cuts that they end at, shape (n,).
            device: the first device of all of them.
            most: the replicas per row are 1 to `most`.

        Returns:
            Two arrays of shape (n, most); the time is inf where the stage does not fit into memory.
        """
        cuts, formula, levels = self.cuts, self.formula, self.row.topology.levels
        links = self._link_use_from(device)
        replicas = links.replicas[:most]
        everywhere = replicas * self.row.copies
        weights = (cuts.parameter_bytes[ends] - cuts.parameter_bytes[first])[:, None]
        round_s = links.round_s[:most] + weights * links.round_s_per_byte[:most]
        sync_s = formula.sync_s(round_s, everywhere)
        part = 1 / self.row.copies if formula.routed else 1.0
        input_shares = [share[:most] for share in links.input_shares]
        boundary_s = formula.boundary_s(float(self.crossing_bytes[first]), input_shares, levels)
        if first > 0 or not formula.first_output_free:
            output_shares = [share[:most] for share in links.output_shares]
            output_s = formula.boundary_s(self.crossing_bytes[ends][:, None], output_shares, levels)
            boundary_s = np.maximum(boundary_s, output_s)

        def total_s(time_s: Floats) -> Floats:
            stage_s = formula.stage_s(formula.compute_s(time_s[:, None], everywhere), sync_s)
            return np.asarray(np.maximum(stage_s, boundary_s * part))

        time_s = cuts.time_s[ends] - cuts.time_s[first]
        plain = total_s(time_s)
        later_devices = self.row.devices - device - replicas
        fits = self._fits(first, ends, later_devices, replicas, recompute=False)
        if self.recompute == "never" or (self.recompute == "auto" and bool(fits.all())):
            return np.where(fits, plain, np.inf), np.zeros(plain.shape, bool)
        again = total_s(time_s + cuts.forward_s[ends] - cuts.forward_s[first])
        again = np.where(self._fits(first, ends, later_devices, replicas, recompute=True), again, np.inf)
        if self.recompute == "always":
            return again, np.ones(again.shape, bool)
        return np.where(fits, plain, again), ~fits  # what fits without is at least as fast without

    def _link_use_from(self, device: int) -> LinkUse:
        """Return the link use of stages that begin on `device`, for every number of replicas."""
        if device not in self._link_use_cache:
            replicas = np.arange(1, self.row.devices - device + 1)
            self._link_use_cache[device] = self.link_use(device, device + replicas)
        return self._link_use_cache[device]

    def link_use(self, first: Any, last: Any) -> LinkUse:
        """Return the link use of stages on devices first to last - 1, for arrays of stages."""
        row, levels = self.row, self.row.topology.levels
        spans = row.spans(first, last)
        nothing = np.asarray(self.formula.round_s(0.0, spans, levels), float)
        # The time is linear in |w|.
        large = float(1 << 40)
        slope = (np.asarray(self.formula.round_s(large, spans, levels), float) - nothing) / large
        input_shares = row.shares(first, last, output=False)
        return LinkUse(np.asarray(last) - first, nothing, slope, input_shares, row.shares(first, last, output=True))

    @cached_property
    def _link_use_cache(self) -> dict[int, LinkUse]:
        return {}

    def bytes(self, first: int, ends: Ints, later_devices: Ints, replicas: Ints, *, recompute: bool) -> Floats:
        """Return the memory of one replica of the stages from cut `first` to each of `ends`, shape (n, m)."""
        cuts = self.cuts
        in_flight = self.rule.in_flight(replicas, later_devices)
        total = self.rule.total(
            parameter_bytes=(cuts.parameter_bytes[ends] - cuts.parameter_bytes[first])[:, None],
            stash_bytes=(cuts.stash_bytes[ends] - cuts.stash_bytes[first])[:, None],
            input_bytes=float(self.crossing_bytes[first]),
            output_bytes=self.crossing_bytes[ends][:, None],
            in_flight=in_flight,
            recompute=recompute,
        )
        return np.asarray(np.broadcast_to(total, (len(ends), len(replicas))), float)

    def _fits(self, first: int, ends: Ints, later_devices: Ints, replicas: Ints, *, recompute: bool) -> Bools:
        if self.memory_bytes is None:
            return np.ones((len(ends), len(replicas)), bool)
        return self.bytes(first, ends, later_devices, replicas, recompute=recompute) <= self.memory_bytes

    def bottleneck_s(self, stages: Sequence[PlacedStage]) -> float:
        """Return the time of the slowest stage or boundary of a solution, in seconds per minibatch."""
        return max(self._stage_time_s(stage) for stage in stages)

    def _stage_time_s(self, stage: PlacedStage) -> float:
        times, _ = self.stage_times(stage.first, np.array([stage.last]), stage.first_device, stage.replicas)
        return float(times[0, -1])
