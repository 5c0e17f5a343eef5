"""Cuts: the places where a layer graph can be cut in two, and the bytes that cross each.

A cut is the set of layers that run before it: with every layer, it contains all layers that feed it.
In a chain the cuts are its prefixes. With parallel branches, one branch may be further ahead than
another (the antichains of the paper, section 3.2)::

                   ┌─► b ─► c ─┐          cuts: {} a ab ad abc abd abcd abcde
              a ───┤           ├─► e
                   └─► d ──────┘          abd | ce: the outputs of b and d cross

A stage lies between two cuts, one a subset of the other; its time is the difference of their times.

The number of cuts grows with the product over parallel branches. The graph is therefore divided into
regions at the layers that all other layers come before or after. If a region has too many cuts, they
are taken from a coarser graph: first with every unbranched run of layers merged into one, then with
the layers in one fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pipedream_hpc.planning.profile import LayerProfile, Profile

Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]

#: Upper limit of the cuts of a whole model: the solver considers each pair of them.
LIMIT = 3000


@dataclass(frozen=True)
class Cuts:
    """All cuts that the solver considers, smaller sets first: the first is empty, the last is the whole model.

    Attributes:
        layers: the profile's layers, in topological order.
        words: the sets, one row of 64-bit words per cut; bit i of word j is layer 64 j + i.
        forward_s: forward time of all layers before each cut, in seconds.
        time_s: forward, backward and update time of all layers before each cut, in seconds.
        parameter_bytes: parameter bytes of all layers before each cut.
        stash_bytes: bytes that autograd keeps for one minibatch in all layers before each cut.
        crossing_bytes: bytes of the outputs before the cut that are needed after it; each output counts once.
        antichain_bytes: crossing bytes as PipeDream's published optimiser counts them: the outputs of the
            last layers before the cut, and of all their ancestors that also lead elsewhere, even if
            no layer after the cut needs them.
        crossing: layers whose outputs cross, one tuple of indices per cut.
        uncut_layers: number of layers in regions whose cuts are incomplete because there were too many.
    """

    layers: tuple[LayerProfile, ...]
    words: Words
    forward_s: Floats
    time_s: Floats
    parameter_bytes: Floats
    stash_bytes: Floats
    crossing_bytes: Floats
    antichain_bytes: Floats
    crossing: tuple[tuple[int, ...], ...]
    uncut_layers: int

    def __len__(self) -> int:
        return len(self.time_s)

    def after(self, cut: int) -> npt.NDArray[np.int64]:
        """Return the cuts that are supersets of `cut`: a stage may begin at `cut` and end at any of them."""
        missing = self.words[cut] & ~self.words[cut + 1 :]
        return np.flatnonzero(~missing.any(axis=1)) + cut + 1

    def between(self, first: int, last: int) -> tuple[int, ...]:
        """Return the layers of the stage between two cuts, in topological order."""
        bits = np.unpackbits((self.words[last] & ~self.words[first]).view(np.uint8), bitorder="little")
        return tuple(int(index) for index in np.flatnonzero(bits))

    def select(self, kept: npt.NDArray[np.int64]) -> Cuts:
        """Return the cuts with the given indices, which must be ascending."""
        return Cuts(
            self.layers,
            self.words[kept],
            self.forward_s[kept],
            self.time_s[kept],
            self.parameter_bytes[kept],
            self.stash_bytes[kept],
            self.crossing_bytes[kept],
            self.antichain_bytes[kept],
            tuple(self.crossing[index] for index in kept),
            self.uncut_layers,
        )

    def contains(self, layer: int) -> npt.NDArray[np.bool_]:
        """Return, for every cut, whether `layer` runs before it."""
        word, bit = divmod(layer, 64)
        return np.asarray(self.words[:, word] >> np.uint64(bit) & np.uint64(1), bool)


def cuts_of(profile: Profile, limit: int = LIMIT) -> Cuts:
    """Return the cuts of `profile`, at most about `limit` of them unless it has more layers than that."""
    graph = _Graph.of(profile)
    regions = graph.regions()
    found: list[_Cut] = []
    for most in (limit, limit // 4, limit // 16, 0):
        found, uncut_layers = [_Cut.empty(graph)], 0
        for region in regions:
            cuts, uncut = _cuts_of_region(graph, region, found[-1], most)
            found += cuts
            uncut_layers += uncut
        if len(found) <= limit:
            break
    return _table(profile, graph, found, uncut_layers)


@dataclass(frozen=True)
class _Graph:
    """The layer graph as bit sets: bit i is layer i."""

    producers: tuple[int, ...]
    consumers: tuple[int, ...]

    @staticmethod
    def of(profile: Profile) -> _Graph:
        producers, consumers = [0] * len(profile.layers), [0] * len(profile.layers)
        for producer, consumer in profile.edges:
            producers[consumer] |= 1 << producer
            consumers[producer] |= 1 << consumer
        return _Graph(tuple(producers), tuple(consumers))

    def regions(self) -> list[tuple[int, ...]]:
        """Return the layers in order, divided after every layer that all others come before or after."""
        count, ancestors = len(self.producers), self.ancestors()
        descendants = [0] * count
        for layer in reversed(range(count)):
            for consumer in _bits(self.consumers[layer]):
                descendants[layer] |= descendants[consumer] | 1 << consumer
        everything = (1 << count) - 1
        ends = [x + 1 for x in range(count) if ancestors[x] | descendants[x] | 1 << x == everything]
        return [tuple(range(a, b)) for a, b in pairwise([0, *ends, *([count] if [count] != ends[-1:] else [])])]

    def ancestors(self) -> list[int]:
        """Return, for every layer, all layers that it depends on, directly or indirectly."""
        ancestors = [0] * len(self.producers)
        for layer, producers in enumerate(self.producers):
            for producer in _bits(producers):
                ancestors[layer] |= ancestors[producer] | 1 << producer
        return ancestors


@dataclass(frozen=True, slots=True)
class _Cut:
    """A cut, as bit sets.

    Attributes:
        layers: the layers before the cut.
        inner: layers before the cut that feed another layer before it.
        crossing: layers before the cut that feed a layer after it.
        ready: layers after the cut that only layers before it feed.
    """

    layers: int
    inner: int
    crossing: int
    ready: int

    @staticmethod
    def empty(graph: _Graph) -> _Cut:
        return _Cut(0, 0, 0, sum(1 << layer for layer, producers in enumerate(graph.producers) if not producers))

    def extended(self, graph: _Graph, run: Sequence[int]) -> _Cut:
        """Return the cut after the layers of `run`, which must become ready one after the other."""
        layers, inner, crossing, ready = self.layers, self.inner, self.crossing, self.ready
        for layer in run:
            layers |= 1 << layer
            ready &= ~(1 << layer)
            inner |= graph.producers[layer]
            if graph.consumers[layer]:
                crossing |= 1 << layer
            for producer in _bits(graph.producers[layer]):
                if not graph.consumers[producer] & ~layers:
                    crossing &= ~(1 << producer)
            for consumer in _bits(graph.consumers[layer]):
                if not graph.producers[consumer] & ~layers:
                    ready |= 1 << consumer
        return _Cut(layers, inner, crossing, ready)


def _cuts_of_region(graph: _Graph, region: tuple[int, ...], start: _Cut, most: int) -> tuple[list[_Cut], int]:
    """Return the cuts after `start` within a region, smaller sets first, and the number of incompletely cut layers."""
    singles: dict[int, tuple[int, ...]] = {layer: (layer,) for layer in region}
    if len(region) == 1:
        return [start.extended(graph, region)], 0
    runs = {run[0]: run for run in _unbranched(graph, region)}
    for parts, uncut in ((singles, 0), (runs, len(region) - len(runs))):
        cuts = _enumerate(graph, region, start, parts, most)
        if cuts is not None:
            return cuts, uncut
    cuts = []
    for layer in region:
        start = start.extended(graph, (layer,))
        cuts.append(start)
    return cuts, len(region)


def _enumerate(
    graph: _Graph, region: tuple[int, ...], start: _Cut, runs: dict[int, tuple[int, ...]], most: int
) -> list[_Cut] | None:
    """Return all cuts within a region that do not divide any of `runs`; None if there are more than `most`."""
    inside = sum(1 << layer for layer in region)
    seen = {start.layers}
    found: list[_Cut] = []
    frontier = [start]
    while frontier:
        following = []
        for cut in frontier:
            for layer in _bits(cut.ready & inside):
                run = runs[layer]
                layers = cut.layers | sum(1 << each for each in run)
                if layers not in seen:
                    seen.add(layers)
                    following.append(cut.extended(graph, run))
        if len(found) + len(following) > most:
            return None
        found += following
        frontier = following
    return sorted(found, key=lambda cut: cut.layers.bit_count())


def _unbranched(graph: _Graph, region: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return a region's layers as runs: a layer joins its producer if neither has another neighbour.

    The region's last layer does not belong to any branch and stays a run of its own.
    """
    runs: dict[int, list[int]] = {}  # by last layer
    for layer in region:
        producers = graph.producers[layer]
        joins = producers.bit_count() == 1 and layer != region[-1]
        producer = producers.bit_length() - 1
        if joins and producer in runs and graph.consumers[producer] == 1 << layer:
            runs[layer] = [*runs.pop(producer), layer]
        else:
            runs[layer] = [layer]
    return [tuple(run) for run in runs.values()]


def _table(profile: Profile, graph: _Graph, found: list[_Cut], uncut_layers: int) -> Cuts:
    words = -(-len(profile.layers) // 64)
    packed = np.frombuffer(b"".join(cut.layers.to_bytes(8 * words, "little") for cut in found), np.uint64)
    packed = packed.reshape(len(found), words)
    members = np.unpackbits(packed.view(np.uint8), axis=1, bitorder="little")[:, : len(profile.layers)]

    def sums(values: Sequence[float]) -> Floats:
        return np.asarray(members @ np.array(values, float))

    output_bytes = [layer.output_bytes for layer in profile.layers]
    crossing = tuple(tuple(_bits(cut.crossing)) for cut in found)
    return Cuts(
        layers=profile.layers,
        words=packed,
        forward_s=sums([layer.forward_s for layer in profile.layers]),
        time_s=sums([layer.work_s for layer in profile.layers]),
        parameter_bytes=sums([layer.parameter_bytes for layer in profile.layers]),
        stash_bytes=sums([layer.stash_bytes for layer in profile.layers]),
        crossing_bytes=np.array([float(sum(output_bytes[x] for x in each)) for each in crossing]),
        antichain_bytes=np.array(
            [float(sum(output_bytes[x] for x in _bits(each))) for each in _antichains(graph, found)]
        ),
        crossing=crossing,
        uncut_layers=uncut_layers,
    )


def _antichains(graph: _Graph, found: list[_Cut]) -> Iterator[int]:
    """Yield, for every cut, the layers that `Cuts.antichain_bytes` counts."""
    ancestors = graph.ancestors()
    elsewhere = [
        sum(1 << x for x in _bits(before) if graph.consumers[x] & ~(before | 1 << layer))
        for layer, before in enumerate(ancestors)
    ]
    for cut in found:
        counted = 0
        for layer in _bits(cut.layers & ~cut.inner):
            counted |= 1 << layer | elsewhere[layer]
        yield counted


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
