"""Reading the user's data: the same order on every rank and under every plan, and no sample read for nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, WeightedRandomSampler

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.runtime.feed import Feed, Taker


class Numbers(Dataset[Any]):
    """Sample n is n with a random number; counts what is read."""

    def __init__(self, count: int = 24) -> None:
        self.count, self.read = count, [0] * count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.read[index] += 1
        return torch.tensor([float(index), float(torch.rand(()))]), torch.tensor(index)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(torch.tensor([float(n), 0.0]), torch.tensor(n)) for n in range(24)])

    def __len__(self) -> int:
        return 24


LOADERS: dict[str, Callable[[Dataset[Any]], Any]] = {
    "in order": lambda data: DataLoader(data, 4),
    "shuffled": lambda data: DataLoader(data, 4, shuffle=True),
    "with a generator": lambda data: DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(5)),
    "weighted": lambda data: DataLoader(data, 4, sampler=WeightedRandomSampler([1.0] * 24, 24)),
    "distributed sampler": lambda data: DataLoader(data, 4, sampler=DistributedSampler(data, 1, 0)),
    "a stream": lambda _: DataLoader(Stream(), 4),
    "one by one": lambda data: DataLoader(data, batch_size=None, sampler=[[0], [1], [2], [3], [4], [5]][0] * 6),
    "a list": lambda data: [(torch.tensor([[float(n), 0.0]]), torch.tensor([n])) for n in range(6)],
}


def units(loader: Any, takers: list[Taker], epoch: int = 0, count: int = 6) -> dict[int, Any]:
    feed = Feed(loader, epoch=epoch, seed=0, takers=takers, names=["x"], length=count)
    wanted = [unit for unit in range(count) if any(taker.has(unit) for taker in takers)]
    return {unit: (feed.input(unit, 0).tolist(), feed.target(unit).tolist()) for unit in wanted}


@pytest.mark.parametrize("name", LOADERS)
def test_replicas_read_what_one_would(name: str) -> None:
    for epoch in (0, 1):
        one = units(LOADERS[name](Numbers()), [Taker(0, 1)], epoch)
        for replicas in (2, 3):
            parts = [units(LOADERS[name](Numbers()), [Taker(each, replicas)], epoch) for each in range(replicas)]
            assert {unit: value for part in parts for unit, value in part.items()} == one


def test_epochs_differ() -> None:
    loader = LOADERS["shuffled"](Numbers())
    assert units(loader, [Taker(0, 1)], 0) != units(loader, [Taker(0, 1)], 1)


def test_a_replica_reads_its_own_samples_and_the_first_minibatch() -> None:
    data = Numbers()
    units(DataLoader(data, 4), [Taker(1, 3)])
    #  minibatch          0         1         2         3         4         5
    assert data.read == [1] * 4 + [1] * 4 + [0] * 4 + [0] * 4 + [1] * 4 + [0] * 4


def test_as_torch_itself_draws_the_order() -> None:
    torch.manual_seed(3)
    expected = [target.tolist() for _, target in LOADERS["with a generator"](Numbers())]
    found = units(LOADERS["with a generator"](Numbers()), [Taker(0, 1)])
    assert [target for _, target in found.values()] == expected


class Derived(DataLoader[Any]):
    """Not torch's own class, so it is asked for every minibatch."""


@pytest.mark.parametrize("generator", [None, 5])
def test_a_class_of_the_user_reads_in_the_same_order(generator: int | None) -> None:
    def read(kind: type[DataLoader[Any]]) -> list[Any]:
        own = None if generator is None else torch.Generator().manual_seed(generator)
        loader = kind(Numbers(), 4, shuffle=True, generator=own)
        return [units(loader, [Taker(0, 1)], epoch) for epoch in (0, 1)]

    assert read(Derived) == read(DataLoader)


def test_a_loader_that_ends_early_is_named() -> None:
    feed = Feed(DataLoader(Numbers(8), 4), epoch=0, seed=0, takers=[Taker(0, 1)], names=["x"], length=6)
    feed.input(0, 0)
    feed.input(1, 0)
    with pytest.raises(PipedreamError, match="ended after 2 minibatches but its length promised more"):
        feed.input(2, 0)


def test_workers_of_a_loader_on_ranks() -> None:
    """A process reads for each rank, started by a fork server; the losses are those of one process."""
    finished = ranks.python(2, "with_workers.py", timeout=120)
    alone = ranks.python(0, "with_workers.py", timeout=120)
    assert (finished.status, alone.status) == (0, 0), finished.output + alone.output
    assert "started by forkserver" in finished.output
    losses = [line for line in alone.output.splitlines() if line.startswith("losses")]
    assert len(losses) == 1
    assert losses[0] in finished.output
