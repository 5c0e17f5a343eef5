"""The weight pool against a model of itself, and the bound that makes 1F1B fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipedream_hpc.core import load_memory
from pipedream_hpc.runtime.stash import WeightStash
from pipedream_hpc.schedule.actions import Backward, Forward, Update
from pipedream_hpc.schedule.one_f_one_b import OneFOneB

memory = load_memory()


def values(pool: object, slab: int) -> torch.Tensor:
    return torch.frombuffer(pool.slab(slab), dtype=torch.int64)  # type: ignore[attr-defined]


@settings(max_examples=200, deadline=None)
@given(slabs=st.integers(1, 4), moves=st.lists(st.tuples(st.sampled_from("aru"), st.integers(0, 5)), max_size=40))
def test_against_a_model(slabs: int, moves: list[tuple[str, int]]) -> None:
    """Every version keeps its bytes for as long as a minibatch holds it."""
    pool = memory.WeightPool(8, slabs)
    newest, held = 0, dict[int, int]()  # minibatch -> version; each slab's bytes are its version
    for move, minibatch in moves:
        if move == "a":
            if minibatch in held:
                with pytest.raises(RuntimeError, match=f"minibatch {minibatch} holds a weight version already"):
                    pool.acquire(minibatch)
                continue
            assert pool.acquire(minibatch) == pool.newest_slab
            held[minibatch] = newest
        elif move == "r":
            if minibatch not in held:
                with pytest.raises(IndexError, match=f"minibatch {minibatch} holds no weight version"):
                    pool.release(minibatch)
                continue
            pool.release(minibatch)
            del held[minibatch]
        else:
            alive = {*held.values(), newest}
            if len(alive) == slabs and newest in held.values():
                with pytest.raises(RuntimeError, match=f"all {slabs} weight slabs are held: version"):
                    pool.begin_update(copy=True)
                continue
            source, target = pool.begin_update(copy=True)
            assert values(pool, target).item() == newest
            assert (source == target) == (len(alive) == slabs)
            values(pool, target)[0] = newest + 1
            newest = pool.commit()
        assert pool.newest == newest
        assert pool.holders == len(held)
        for each, version in held.items():
            assert pool.version_of(each) == version
            assert values(pool, pool.slab_of(each)).item() == version


@pytest.mark.parametrize("warm_up", range(5))
def test_a_stage_with_w_warm_up_minibatches_needs_exactly_w_plus_1_slabs(warm_up: int) -> None:
    schedule = OneFOneB(tuple((rank,) for rank in range(warm_up + 1)), 30)

    def run(slabs: int) -> None:
        pool = memory.WeightPool(64, slabs)
        for action in schedule.actions(0):
            if isinstance(action, Forward):
                pool.acquire(action.minibatch)
                assert pool.newest == action.version
            elif isinstance(action, Backward):
                assert pool.version_of(action.minibatch) == action.version
                pool.release(action.minibatch)
            elif isinstance(action, Update):
                pool.begin_update(copy=True)
                assert pool.commit() == action.version

    before = memory.allocations()
    run(warm_up + 1)
    assert memory.allocations() - before == warm_up + 1, "slabs are all there is"
    if warm_up:
        with pytest.raises(RuntimeError, match="slabs are held"):
            run(warm_up)


def test_all_slabs_held_names_the_holders() -> None:
    pool = memory.WeightPool(8, 1)
    pool.acquire(3)
    pool.acquire(5)
    with pytest.raises(RuntimeError, match=r"all 1 weight slabs are held: version 0 by minibatch 3, 5\."):
        pool.begin_update(copy=True)


def test_an_update_is_begun_and_committed_once() -> None:
    pool = memory.WeightPool(8, 2)
    with pytest.raises(RuntimeError, match="begin_update first"):
        pool.commit()
    pool.begin_update(copy=False)
    with pytest.raises(RuntimeError, match="commit it first"):
        pool.begin_update(copy=False)


def test_device_memory_without_a_device_is_refused() -> None:
    if memory.cuda_device_count() == 0:
        with pytest.raises(RuntimeError, match=r"CUDA|cudaMalloc"):
            memory.WeightPool(8, 1, "device")
    with pytest.raises(ValueError, match="memory is 'host', 'pinned' or 'device', not 'disk'"):
        memory.WeightPool(8, 1, "disk")


# --- the stash: the pool with parameters in it ----------------------------------------------------


def stash_of(module: nn.Module, slabs: int) -> WeightStash:
    return WeightStash(module, slabs, lambda parameters: torch.optim.SGD(parameters, lr=1.0))


def test_switching_versions_moves_pointers_not_bytes() -> None:
    module = nn.Linear(4, 4)
    stash = stash_of(module, 3)
    for minibatch in range(2):
        stash.acquire(minibatch)
    first = module.weight
    address = first.data_ptr()
    module(torch.ones(1, 4)).sum().backward()
    stash.update(stash.release(0))
    stash.acquire(2)
    assert module.weight is not first
    assert module.weight.data_ptr() != address
    assert first.data_ptr() == address, "the old version stands where it stood"
    assert not torch.equal(first, module.weight)


def test_backward_uses_the_version_of_its_forward() -> None:
    """Two layers, so that the gradient of the first depends on the weights of the second."""
    module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        module[0].weight.fill_(1.0)
        module[1].weight.fill_(5.0)
    stash = stash_of(module, 2)
    stash.acquire(0)
    old = module(torch.ones(1, 1))
    stash.acquire(1)
    module(torch.ones(1, 1)).sum().backward()
    stash.update(stash.release(1))  # weights become 1 - 5 and 5 - 1
    stash.use_newest()
    assert module[1].weight.item() == 4.0
    old.sum().backward()
    first, second = stash.release(0)
    assert first is not None
    assert first.item() == 5.0, "not 4: the version of its forward"
    assert second is not None


def test_parameters_shared_within_a_stage_stay_shared() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    stash = stash_of(module, 2)
    stash.acquire(0)
    assert module[1].weight is module[0].weight


def test_frozen_and_mixed_parameters() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double(), nn.Linear(3, 3))
    module[2].requires_grad_(False)
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    stash = stash_of(module, 2)
    assert {k: v.dtype for k, v in module.state_dict().items()} == {k: v.dtype for k, v in expected.items()}
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())
    assert not module[2].weight.requires_grad
    assert stash.optimizer is not None
    assert len(stash.optimizer.param_groups[0]["params"]) == 4


def test_a_stage_without_parameters_has_no_optimizer() -> None:
    stash = stash_of(nn.Flatten(), 2)
    stash.acquire(0)
    assert stash.release(0) == []
    assert stash.update([]) == 1
    assert stash.optimizer is None
