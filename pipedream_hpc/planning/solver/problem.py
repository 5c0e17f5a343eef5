"""Problem: what the solvers are asked, and the price of any one stage.

Cuts are numbered as in planning.solver.cuts, devices along one row as in planning.solver.placement. A stage runs
the layers between two cuts on a run of devices; what follows it runs on all devices after those.
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
from pipedream_hpc.planning.solver.placement import Row

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Piece:
    """A stage of a solution: layers between two cuts on devices first_device, ... of every row."""

    first: int
    last: int
    first_device: int
    replicas: int
    recompute: bool


@dataclass(frozen=True)
class Links:
    """What stages with so many replicas use of the topology; arrays of one shape.

    Attributes:
        replicas: in one row.
        round_s: one synchronisation of no bytes, in seconds.
        round_s_per_byte: and of each byte of parameters more.
        into: shares of the input side's traffic, by level (placement.Row.shares).
        out_of: shares of the output side's.
    """

    replicas: Ints
    round_s: Floats
    round_s_per_byte: Floats
    into: list[Floats]
    out_of: list[Floats]


@dataclass(frozen=True)
class Problem:
    """One row of devices and everything that decides what a stage on it costs.

    Attributes:
        cuts: of the model.
        row: of the topology.
        formula: how stages and boundaries are priced.
        rule: what is kept in memory.
        memory_bytes: of one device; None: no limit.
        recompute: whether stages may, or must, run their forward again before their backward.
        straight: one replica per stage.
        fewer: whether devices may be left unused.
        cut_behind: layers that must not share a stage with a consumer of theirs.
        together: groups of layers that must share a stage.
    """

    cuts: Cuts
    row: Row
    formula: Formula
    rule: MemoryRule
    memory_bytes: int | None = None
    recompute: Recompute = "never"
    straight: bool = False
    fewer: bool = False
    cut_behind: tuple[tuple[int, tuple[int, ...]], ...] = ()
    together: tuple[tuple[int, ...], ...] = ()

    @cached_property
    def crossing_bytes(self) -> Floats:
        """Bytes that cross each cut, as the formula counts them; none at either end."""
        chosen = self.cuts.antichain_bytes if self.formula.antichains else self.cuts.crossing_bytes
        return np.concatenate(([0.0], chosen[1:-1], [0.0]))

    def ends(self, first: int) -> Ints:
        """The cuts at which a stage that begins at cut `first` may end."""
        ends = self.cuts.after(first)
        allowed = np.ones(len(ends), bool)
        for layer, consumers in self.cut_behind:
            inside = self._inside(layer, first, ends)
            for consumer in consumers:
                allowed &= ~(inside & self._inside(consumer, first, ends))
        for group in self.together:
            inside = np.array([self._inside(layer, first, ends) for layer in group])
            allowed &= inside.all(axis=0) | ~inside.any(axis=0)
        return ends[allowed]

    def _inside(self, layer: int, first: int, ends: Ints) -> Bools:
        has = self.cuts.has(layer)
        return np.asarray(has[ends] & ~has[first])

    def thinned(self, count: int) -> Problem:
        """The same with `count` of the cuts, or all if they are fewer."""
        if len(self.cuts) <= count:
            return self
        kept = np.unique(np.linspace(0, len(self.cuts) - 1, count).round().astype(np.int64))
        return dataclasses.replace(self, cuts=self.cuts.only(kept))

    def prices(self, first: int, ends: Ints, device: int, most: int) -> tuple[Floats, Bools]:
        """Seconds per minibatch of stages that begin at cut `first`, and whether they recompute.

        Args:
            first: the cut they all begin at.
            ends: the cuts they end at, shape (n,).
            device: the first device of all of them.
            most: replicas per row are 1 to `most`.

        Returns:
            Two arrays of shape (n, most); inf where the stage does not fit into memory.
        """
        cuts, formula, levels = self.cuts, self.formula, self.row.topology.levels
        links = self.links(device)
        replicas = links.replicas[:most]
        everywhere = replicas * self.row.copies
        weights = (cuts.parameter_bytes[ends] - cuts.parameter_bytes[first])[:, None]
        round_s = links.round_s[:most] + weights * links.round_s_per_byte[:most]
        sync_s = formula.sync_s(round_s, everywhere)
        part = 1 / self.row.copies if formula.routed else 1.0
        into = [share[:most] for share in links.into]
        boundary_s = formula.boundary_s(float(self.crossing_bytes[first]), into, levels)
        if first > 0 or not formula.first_output_free:
            out_of = [share[:most] for share in links.out_of]
            output_s = formula.boundary_s(self.crossing_bytes[ends][:, None], out_of, levels)
            boundary_s = np.maximum(boundary_s, output_s)

        def price(time_s: Floats) -> Floats:
            stage_s = formula.stage_s(formula.compute_s(time_s[:, None], everywhere), sync_s)
            return np.asarray(np.maximum(stage_s, boundary_s * part))

        time_s = cuts.time_s[ends] - cuts.time_s[first]
        plain = price(time_s)
        behind = self.row.devices - device - replicas
        fits = self._fits(first, ends, behind, replicas, recompute=False)
        if self.recompute == "never" or (self.recompute == "auto" and bool(fits.all())):
            return np.where(fits, plain, np.inf), np.zeros(plain.shape, bool)
        again = price(time_s + cuts.forward_s[ends] - cuts.forward_s[first])
        again = np.where(self._fits(first, ends, behind, replicas, recompute=True), again, np.inf)
        if self.recompute == "always":
            return again, np.ones(again.shape, bool)
        return np.where(fits, plain, again), ~fits  # what fits without is at least as fast without

    def links(self, device: int) -> Links:
        """What stages that begin on `device` use of the topology."""
        if device not in self._links:
            replicas = np.arange(1, self.row.devices - device + 1)
            self._links[device] = self.links_of(device, device + replicas)
        return self._links[device]

    def links_of(self, first: Any, last: Any) -> Links:
        """What stages on devices first to last - 1 use of the topology, for arrays of stages."""
        row, levels = self.row, self.row.topology.levels
        spans = row.spans(first, last)
        nothing = np.asarray(self.formula.round_s(0.0, spans, levels), float)
        # Linear in |w|: so much more for each byte.
        large = float(1 << 40)
        slope = (np.asarray(self.formula.round_s(large, spans, levels), float) - nothing) / large
        into = row.shares(first, last, output=False)
        return Links(np.asarray(last) - first, nothing, slope, into, row.shares(first, last, output=True))

    @cached_property
    def _links(self) -> dict[int, Links]:
        return {}

    def bytes(self, first: int, ends: Ints, behind: Ints, replicas: Ints, *, recompute: bool) -> Floats:
        """Memory of one replica of stages from `first` to each of `ends`, shape (n, m)."""
        cuts = self.cuts
        in_flight = self.rule.in_flight(replicas, behind)
        total = self.rule.total(
            parameter_bytes=(cuts.parameter_bytes[ends] - cuts.parameter_bytes[first])[:, None],
            stash_bytes=(cuts.stash_bytes[ends] - cuts.stash_bytes[first])[:, None],
            input_bytes=float(self.crossing_bytes[first]),
            output_bytes=self.crossing_bytes[ends][:, None],
            in_flight=in_flight,
            recompute=recompute,
        )
        return np.asarray(np.broadcast_to(total, (len(ends), len(replicas))), float)

    def _fits(self, first: int, ends: Ints, behind: Ints, replicas: Ints, *, recompute: bool) -> Bools:
        if self.memory_bytes is None:
            return np.ones((len(ends), len(replicas)), bool)
        return self.bytes(first, ends, behind, replicas, recompute=recompute) <= self.memory_bytes

    def price_of(self, pieces: Sequence[Piece]) -> float:
        """The slowest stage or boundary of a solution, in seconds per minibatch."""
        return max(self._price(piece) for piece in pieces)

    def _price(self, piece: Piece) -> float:
        price, _ = self.prices(piece.first, np.array([piece.last]), piece.first_device, piece.replicas)
        return float(price[0, -1])
