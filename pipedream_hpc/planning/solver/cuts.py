"""Cuts: the places where a layer graph can be cut in two, and what crosses each.

A cut is a set of layers that contains, with a layer, all that feeds it: what runs before the cut.
In a chain these are its prefixes. Where branches run side by side, one branch may be further ahead
than the other (the antichains of the paper, section 3.2)::

                   ┌─► b ─► c ─┐          cuts: {} a ab ad abc abd abcd abcde
              a ───┤           ├─► e
                   └─► d ──────┘          abd | ce: the outputs of b and d cross

A stage lies between two cuts, one within the other; its time is the difference of their times.

The number of cuts is the product over parallel branches, so it can explode. Between two layers that
all else comes before or after, cuts are taken, until there are few enough, from: the graph as it
is; the graph with every unbranched run of layers inside a branch as one; the layers in one order.
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

#: Most cuts of a whole model: the solver weighs each pair of them.
LIMIT = 3000


@dataclass(frozen=True)
class Cuts:
    """All cuts that are weighed, smaller sets first: the first is empty, the last the whole model.

    Attributes:
        layers: of the profile, in topological order.
        words: the sets, one row of bits per cut; bit i of word j is layer 64 j + i.
        forward_s: forward time of all layers before each cut, in seconds.
        time_s: forward and backward time, likewise.
        parameter_bytes: likewise.
        stash_bytes: what autograd keeps for one minibatch, likewise.
        crossing_bytes: outputs before the cut that are needed after it; each counts once.
        antichain_bytes: the same as PipeDream's published optimiser counts: outputs of the last
            layers before the cut, and of all layers before one of them that lead elsewhere too, even
            if nothing after the cut needs them.
        crossing: those layers whose outputs cross, one tuple of indices per cut.
        whole: layers that other cuts could come between but do not, because there were too many.
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
    whole: int

    def __len__(self) -> int:
        return len(self.time_s)

    def after(self, cut: int) -> npt.NDArray[np.int64]:
        """The cuts that lie after `cut`: each makes a stage with it."""
        missing = self.words[cut] & ~self.words[cut + 1 :]
        return np.flatnonzero(~missing.any(axis=1)) + cut + 1

    def before(self, cut: int) -> npt.NDArray[np.int64]:
        """The cuts that lie before `cut`."""
        missing = self.words[:cut] & ~self.words[cut]
        return np.flatnonzero(~missing.any(axis=1))

    def between(self, first: int, last: int) -> tuple[int, ...]:
        """Layers of the stage between two cuts, in topological order."""
        bits = np.unpackbits((self.words[last] & ~self.words[first]).view(np.uint8), bitorder="little")
        return tuple(int(index) for index in np.flatnonzero(bits))

    def only(self, kept: npt.NDArray[np.int64]) -> Cuts:
        """Some of the cuts, in ascending order."""
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
            self.whole,
        )

    def has(self, layer: int) -> npt.NDArray[np.bool_]:
        """For every cut whether `layer` runs before it."""
        word, bit = divmod(layer, 64)
        return np.asarray(self.words[:, word] >> np.uint64(bit) & np.uint64(1), bool)


def cuts_of(profile: Profile, limit: int = LIMIT) -> Cuts:
    """The cuts of `profile`, at most about `limit` of them unless it has more layers than that."""
    graph = _Graph.of(profile)
    regions = graph.regions()
    found: list[_Cut] = []
    for most in (limit, limit // 4, limit // 16, 0):
        found, whole = [_Cut.nothing(graph)], 0
        for region in regions:
            cuts, hidden = _cuts_of_region(graph, region, found[-1], most)
            found += cuts
            whole += hidden
        if len(found) <= limit:
            break
    return _table(profile, graph, found, whole)


@dataclass(frozen=True)
class _Graph:
    """The layer graph as bit sets: bit i stands for layer i."""

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
        """The layers in order, parted behind every layer that all others come before or after."""
        count, ancestors = len(self.producers), self.ancestors()
        descendants = [0] * count
        for layer in reversed(range(count)):
            for consumer in _bits(self.consumers[layer]):
                descendants[layer] |= descendants[consumer] | 1 << consumer
        everything = (1 << count) - 1
        ends = [x + 1 for x in range(count) if ancestors[x] | descendants[x] | 1 << x == everything]
        return [tuple(range(a, b)) for a, b in pairwise([0, *ends, *([count] if [count] != ends[-1:] else [])])]

    def ancestors(self) -> list[int]:
        """For every layer all that it needs, directly or not."""
        ancestors = [0] * len(self.producers)
        for layer, producers in enumerate(self.producers):
            for producer in _bits(producers):
                ancestors[layer] |= ancestors[producer] | 1 << producer
        return ancestors


@dataclass(frozen=True, slots=True)
class _Cut:
    """A set of layers.

    Attributes:
        layers: the set.
        inner: those of them that feed another one of them.
        crossing: those of them that feed a layer outside.
        ready: layers outside that nothing else outside feeds.
    """

    layers: int
    inner: int
    crossing: int
    ready: int

    @staticmethod
    def nothing(graph: _Graph) -> _Cut:
        return _Cut(0, 0, 0, sum(1 << layer for layer, producers in enumerate(graph.producers) if not producers))

    def extended(self, graph: _Graph, run: Sequence[int]) -> _Cut:
        """With the layers of `run`, each ready after those before it."""
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
    """The cuts within a region but its first, smaller sets first, and how many layers lost theirs."""
    singles: dict[int, tuple[int, ...]] = {layer: (layer,) for layer in region}
    if len(region) == 1:
        return [start.extended(graph, region)], 0
    runs = {run[0]: run for run in _unbranched(graph, region)}
    for pieces, hidden in ((singles, 0), (runs, len(region) - len(runs))):
        cuts = _enumerate(graph, region, start, pieces, most)
        if cuts is not None:
            return cuts, hidden
    cuts = []
    for layer in region:
        start = start.extended(graph, (layer,))
        cuts.append(start)
    return cuts, len(region)


def _enumerate(
    graph: _Graph, region: tuple[int, ...], start: _Cut, pieces: dict[int, tuple[int, ...]], most: int
) -> list[_Cut] | None:
    """All cuts within a region that take each of `pieces` whole; None if there are more than `most`."""
    within = sum(1 << layer for layer in region)
    seen = {start.layers}
    found: list[_Cut] = []
    frontier = [start]
    while frontier:
        following = []
        for cut in frontier:
            for layer in _bits(cut.ready & within):
                piece = pieces[layer]
                layers = cut.layers | sum(1 << each for each in piece)
                if layers not in seen:
                    seen.add(layers)
                    following.append(cut.extended(graph, piece))
        if len(found) + len(following) > most:
            return None
        found += following
        frontier = following
    return sorted(found, key=lambda cut: cut.layers.bit_count())


def _unbranched(graph: _Graph, region: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The layers of a region as runs: a layer joins its producer if neither has another neighbour.

    The region's last layer, which is no part of any branch, stays alone.
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


def _table(profile: Profile, graph: _Graph, found: list[_Cut], whole: int) -> Cuts:
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
        whole=whole,
    )


def _antichains(graph: _Graph, found: list[_Cut]) -> Iterator[int]:
    """For every cut the layers that `Cuts.antichain_bytes` counts."""
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
