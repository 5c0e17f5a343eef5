"""Reading the user's data: the same order on every rank and under every plan, without reading unneeded samples."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import forkserver
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import ranks
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, WeightedRandomSampler

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.arguments import Arguments
from pipedream_hpc.runtime.execution.data import MicrobatchLoader, Reader
from pipedream_hpc.runtime.execution.dataloader import minibatches, use_forkserver


class Numbers(Dataset[Any]):
    """Sample n is n and a random number; counts reads of each sample."""

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


#: One input, x.
ONE = Arguments((torch.ones(4, 2),), {}, ("x",))


def microbatches(loader: Any, readers: list[Reader], epoch: int = 0, length: int = 6) -> dict[int, Any]:
    """Read a pass: number, input and target of each microbatch that a reader has."""
    batches = MicrobatchLoader(loader, epoch=epoch, seed=0, readers=readers, length=length)
    own = [microbatch for microbatch in range(length) if any(reader.has(microbatch) for reader in readers)]
    return {
        microbatch: (batches.arguments(microbatch).args[0].tolist(), batches.target(microbatch).tolist())
        for microbatch in own
    }


@pytest.mark.parametrize(
    ("told", "imported"), [(["__main__"], ["__main__", "torch"]), (["numpy"], ["numpy"])], ids=["nothing", "something"]
)
def test_the_server_of_workers_imports_torch_once(
    told: list[str], imported: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forkserver._forkserver, "_preload_modules", told)
    loader = DataLoader(Numbers(), 4, num_workers=1)
    use_forkserver(loader)
    assert forkserver._forkserver._preload_modules == imported
    assert loader.multiprocessing_context.get_start_method() == "forkserver"


@pytest.mark.parametrize("name", LOADERS)
def test_replicas_together_read_what_one_reads(name: str) -> None:
    for epoch in (0, 1):
        one = microbatches(LOADERS[name](Numbers()), [Reader(0, 1)], epoch)
        for replicas in (2, 3):
            each = [microbatches(LOADERS[name](Numbers()), [Reader(r, replicas)], epoch) for r in range(replicas)]
            assert {microbatch: value for read in each for microbatch, value in read.items()} == one


class Augmented(Dataset[Any]):
    """Shifts input and target by the same random number, from a generator of its own or of a part of it."""

    def __init__(self, how: str) -> None:
        generator: Any = {
            "numpy": numpy.random.default_rng(0),
            "python": random.Random(0),
            "torch": torch.Generator().manual_seed(0),
            "count": itertools.count(),
        }.get(how, random.Random(0))

        def shift() -> float:
            if how == "torch":
                return float(torch.rand((), generator=generator))
            return float(next(generator) if how == "count" else generator.random())

        self.shift: Any = {"part": SimpleNamespace(all=[shift]), "partial": partial(lambda draw: draw(), shift)}.get(
            how, shift
        )

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[torch.Tensor, float]:
        number = index + (self.shift if callable(self.shift) else self.shift.all[0])()
        return torch.tensor([number]), number


@pytest.mark.parametrize("how", ["numpy", "python", "torch", "count", "part", "partial"])
def test_replicas_read_all_of_a_data_set_that_draws_from_a_generator_of_its_own(how: str) -> None:
    expected = [target.tolist() for _, target in DataLoader(Augmented(how), 4)]
    for replica in range(3):
        found = microbatches(DataLoader(Augmented(how), 4), [Reader(replica, 3)])
        assert {number: target for number, (_, target) in found.items()} == {
            number: target for number, target in enumerate(expected) if number % 3 == replica
        }


class Counting(Dataset[Any]):
    """Numbers that depend on how many were read before."""

    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[torch.Tensor, float]:
        self.read += 1
        return torch.full((100, 100), float(self.read)), float(index)


def test_checksums_tell_what_depends_on_earlier_reads() -> None:
    def checksums(replica: int, data: Any) -> dict[int, int]:
        batches = MicrobatchLoader(DataLoader(data, 4), epoch=0, seed=0, readers=[Reader(replica, 2)], length=6)
        for microbatch in range(replica, 6, 2):
            batches.target(microbatch)
        return batches.checksums

    one, other = (checksums(replica, Counting()) for replica in (0, 1))
    assert (list(one), list(other)) == ([0, 2, 4], [0, 1, 3, 5])
    assert one[0] == other[0]
    whole = MicrobatchLoader(DataLoader(Counting(), 4), epoch=0, seed=0, readers=[Reader(0, 1)], length=6)
    whole.target(5)
    assert whole.checksums[0] == one[0]
    assert whole.checksums[2] != one[2]
    assert checksums(0, Numbers()) == checksums(0, Numbers())


def test_epochs_differ() -> None:
    loader = LOADERS["shuffled"](Numbers())
    assert microbatches(loader, [Reader(0, 1)], 0) != microbatches(loader, [Reader(0, 1)], 1)


def test_a_replica_reads_its_own_samples_and_the_first_minibatch() -> None:
    data = Numbers()
    microbatches(DataLoader(data, 4), [Reader(1, 3)])
    #  minibatch          0         1         2         3         4         5
    assert data.read == [1] * 4 + [1] * 4 + [0] * 4 + [0] * 4 + [1] * 4 + [0] * 4


def test_the_order_is_the_one_that_torch_draws() -> None:
    torch.manual_seed(3)
    expected = [target.tolist() for _, target in LOADERS["with a generator"](Numbers())]
    found = microbatches(LOADERS["with a generator"](Numbers()), [Reader(0, 1)])
    assert [target for _, target in found.values()] == expected


class Derived(DataLoader[Any]):
    """Not torch's own class, so every minibatch is read."""


@pytest.mark.parametrize("generator", [None, 5])
def test_a_subclass_reads_in_the_same_order(generator: int | None) -> None:
    def read(kind: type[DataLoader[Any]]) -> list[Any]:
        own = None if generator is None else torch.Generator().manual_seed(generator)
        loader = kind(Numbers(), 4, shuffle=True, generator=own)
        return [microbatches(loader, [Reader(0, 1)], epoch) for epoch in (0, 1)]

    assert read(Derived) == read(DataLoader)


def test_a_loader_that_ends_early_is_refused() -> None:
    batches = MicrobatchLoader(
        DataLoader(Numbers(8), 4), epoch=0, seed=0, readers=[Reader(0, 1)], example=ONE, length=6
    )
    batches.arguments(0)
    batches.arguments(1)
    with pytest.raises(PipedreamError, match="the loader ended after 2 minibatches of 6: make len"):
        batches.arguments(2)


def stream() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """An endless iterator without a length: minibatch n is n."""
    return ((torch.full((2, 1), float(n)), torch.tensor([n, n])) for n in itertools.count())


def test_a_stream_is_advanced_by_exactly_the_minibatches_of_the_pass_on_every_rank() -> None:
    """Minibatches 0 to 4, then 5 to 6; replica 1 skips minibatches 4 and 5, and replica 0 skips the rest."""
    read = []
    for replica in (0, 1):
        endless = stream()
        for epoch, length in enumerate((5, 2)):
            read.append(
                [target[0] for _, target in microbatches(endless, [Reader(replica, 2)], epoch, length).values()]
            )
        assert next(endless)[1].tolist() == [7, 7]
    assert read == [[0, 2, 4], [5], [1, 3], [6]]


def test_a_stream_is_advanced_on_a_rank_that_has_no_microbatch_of_the_pass() -> None:
    endless = stream()
    batches = MicrobatchLoader(endless, epoch=0, seed=0, readers=[Reader(2, 3)], example=ONE, length=2)
    assert batches.fingerprint() is not None
    assert next(endless)[1].tolist() == [2, 2]


def test_a_pass_may_be_shorter_than_the_loader() -> None:
    assert list(microbatches(LOADERS["a stream"](Numbers()), [Reader(0, 1)], length=2)) == [0, 1]
    assert list(microbatches(LOADERS["in order"](Numbers()), [Reader(0, 1)], length=2)) == [0, 1]


def test_a_stream_that_ends_early_is_refused_on_a_rank_that_skips_the_end() -> None:
    short = iter([(torch.ones(2, 1), torch.zeros(2))] * 3)
    with pytest.raises(PipedreamError, match="the loader ended after 3 minibatches of 4"):
        microbatches(short, [Reader(0, 2)], length=4)


@pytest.mark.parametrize(
    ("minibatch", "words"),
    [
        (7, "epoch 3, minibatch 1: the loader yielded int instead of an .input, target. pair"),
        (({"y": torch.ones(2, 1)}, torch.ones(2)), "minibatch 1: the inputs of the loader have no 'x', .*, but y"),
        (((), torch.ones(2)), r"minibatch 1: the loader yielded 0 inputs, but example_inputs has 1 \(x\)"),
        ((torch.ones(1, 1), torch.ones(1)), "minibatch 1: 1 samples cannot be split into 2 microbatches"),
        ((torch.ones(2, 1), torch.ones(3)), "minibatch 1: tensors of 2 and 3 samples cannot be split into 2"),
    ],
)
def test_messages_name_epoch_and_minibatch(minibatch: Any, words: str) -> None:
    """Two microbatches per minibatch; the second minibatch, microbatches 2 and 3, is wrong."""
    loader = [(torch.ones(2, 1), torch.ones(2)), minibatch]
    n_microbatches = 1 if "yielded 0" in words else 2
    batches = MicrobatchLoader(
        loader,
        epoch=3,
        seed=0,
        readers=[Reader(0, 1)],
        length=2,
        n_microbatches=n_microbatches,
        example=ONE,
    )
    batches.arguments(0)
    with pytest.raises(PipedreamError, match=words):
        batches.arguments(n_microbatches)


def test_a_first_minibatch_unlike_the_example_is_refused() -> None:
    batches = MicrobatchLoader(
        [(torch.ones(2, 3), torch.ones(2))],
        epoch=0,
        seed=0,
        readers=[Reader(0, 1)],
        length=1,
        example=Arguments((torch.ones(2, 1),), {}, ("x",)),
    )
    words = r"epoch 0, minibatch 0: input 'x' has shape \(2, 3\) and .* example_inputs has shape \(2, 1\)"
    with pytest.raises(PipedreamError, match=words):
        batches.fingerprint()


def test_workers_of_a_loader_on_ranks() -> None:
    """Each rank's worker process is started by a fork server; the losses are those of one process."""
    finished = ranks.python(2, "with_workers.py", timeout=120)
    alone = ranks.python(0, "with_workers.py", timeout=120)
    assert (finished.status, alone.status) == (0, 0), finished.output + alone.output
    assert "started by forkserver" in finished.output
    losses = [line for line in alone.output.splitlines() if line.startswith("losses")]
    assert len(losses) == 1
    assert losses[0] in finished.output


@pytest.mark.parametrize("what", ["dataset", "collate_fn", "worker_init_fn"])
def test_what_cannot_be_sent_to_workers_is_named(what: str) -> None:
    class Local(Numbers):
        """A class that no module has."""

    options: dict[str, Any] = {"dataset": Numbers(), what: Local() if what == "dataset" else lambda _: None}
    loader = DataLoader(**options, batch_size=4, num_workers=1, multiprocessing_context="forkserver")
    with pytest.raises(PipedreamError, match=f"^the {what} of the DataLoader cannot be sent to its worker processes"):
        minibatches(loader, lambda _: True)


@pytest.mark.parametrize(
    ("what", "method", "said"),
    [
        (
            "collate_fn",
            "evaluate",
            "pipedream: the collate_fn of the DataLoader cannot be sent to its worker processes",
        ),
        ("main", "fit", "exited unexpectedly; what it printed is above: a worker imports the program anew"),
    ],
)
def test_workers_that_cannot_be_given_what_they_need(what: str, method: str, said: str) -> None:
    """One sentence, at once, and no traceback of this process."""
    finished = ranks.python(2, "unpicklable.py", what, method, timeout=120)
    assert finished.status == 2, finished.output
    assert said in finished.output
    assert "dataloader.py" not in finished.output, "no traceback, and no advice of torch's"
