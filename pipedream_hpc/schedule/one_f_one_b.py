"""1F1B and 1F1B-RR: one forward, one backward, replicas in round robin (paper, section 3.2).

Four stages, one rank each; F and B are drawn equally long, U is an update::

    stage 0   F0 F1 F2 F3          B0 F4 B1 F5 B2 F6 B3 ...
    stage 1      F0 F1 F2       B0 F3 B1 F4 B2 F5 B3 F6 ...
    stage 2         F0 F1    B0 F2 B1 F3 B2 F4 B3 F5 B4 ...
    stage 3            F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 ...
              start-up        steady state                  time ──►

Two replicas, then one (2-1): minibatch k goes to replica k mod R of every stage, and its backward
to where its forward was. Every replica applies one update per round of R minibatches::

    stage 0 a   F0 F2 B0 (reduce, U) F4 B2 (reduce, U) ...
    stage 0 b   F1 F3 B1 (reduce, U) F5 B3 (reduce, U) ...
    stage 1     F0 B0 U F1 B1 U F2 B2 U F3 B3 U ...

The order on every rank is fixed beforehand: no rank ever asks another what to do next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipedream_hpc.planning.plan import warm_up
from pipedream_hpc.schedule.actions import Action, Backward, Forward, Layout, Receive, Reduce, Send, Update


@dataclass(frozen=True)
class OneFOneB:
    """The schedule for `minibatches` minibatches; 1F1B where every stage has one replica."""

    layout: Layout
    minibatches: int
    training = True

    def in_flight(self, stage: int) -> int:
        """Most minibatches alive at once on a replica of `stage`, and so most weight versions."""
        return self._warm_up(stage) + 1

    def _warm_up(self, stage: int) -> int:
        return warm_up([len(ranks) for ranks in self.layout], stage)

    def actions(self, rank: int) -> Iterator[Action]:
        """The actions of `rank`, in order."""
        stage = next(index for index, ranks in enumerate(self.layout) if rank in ranks)
        replicas = len(self.layout[stage])
        own = range(self.layout[stage].index(rank), self.minibatches, replicas)
        ahead = self._warm_up(stage)
        for turn in range(len(own) + ahead):
            # Local turn t runs forward t and, once warmed up, backward t - W; at either end of the
            # schedule only one of the two is left.
            if turn < len(own):
                yield from self._forward(stage, own[turn], version=max(0, turn - ahead))
            done = turn - ahead
            if 0 <= done < len(own):
                yield from self._backward(stage, own[done], version=max(0, done - ahead))
                yield from self._update(stage, done)
        rounds = -(-self.minibatches // replicas)
        if len(own) < rounds:
            # The last round is short and has no minibatch for this replica; it takes part all the
            # same, so that all replicas go on with the same weights.
            yield from self._update(stage, rounds - 1)

    def _forward(self, stage: int, minibatch: int, version: int) -> Iterator[Action]:
        if stage > 0:
            yield Receive(minibatch, "activation", self._peer(stage - 1, minibatch))
        yield Forward(minibatch, version)
        if stage + 1 < len(self.layout):
            yield Send(minibatch, "activation", self._peer(stage + 1, minibatch))

    def _backward(self, stage: int, minibatch: int, version: int) -> Iterator[Action]:
        if stage + 1 < len(self.layout):
            yield Receive(minibatch, "gradient", self._peer(stage + 1, minibatch))
        yield Backward(minibatch, version)
        if stage > 0:
            # Before the reduction: upstream must not wait for the other replicas of this stage,
            # which may be waiting for upstream.
            yield Send(minibatch, "gradient", self._peer(stage - 1, minibatch))

    def _update(self, stage: int, round: int) -> Iterator[Action]:
        replicas = len(self.layout[stage])
        if replicas > 1:
            yield Reduce(round, min(replicas, self.minibatches - round * replicas))
        yield Update(round + 1)

    def _peer(self, stage: int, minibatch: int) -> int:
        ranks = self.layout[stage]
        return ranks[minibatch % len(ranks)]
