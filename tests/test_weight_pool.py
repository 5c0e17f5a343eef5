"""The weight pool against a simple model, its bound on slabs under 1F1B, and the stash."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipedream_hpc.core import load_weights
from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.runtime.weights.stash import WeightStash
from pipedream_hpc.schedule.actions import Backward, Forward, OptimizerStep
from pipedream_hpc.schedule.one_f_one_b import OneFOneB

memory = load_weights()


def values(pool: object, slab: int) -> torch.Tensor:
    return torch.frombuffer(pool.slab(slab), dtype=torch.int64)  # type: ignore[attr-defined]


@settings(max_examples=200, deadline=None)
@given(slabs=st.integers(1, 4), moves=st.lists(st.tuples(st.sampled_from("aru"), st.integers(0, 5)), max_size=40))
def test_against_a_model(slabs: int, moves: list[tuple[str, int]]) -> None:
    """Every version keeps its bytes as long as a microbatch holds it."""
    pool = memory.WeightPool(8, slabs)
    newest, held = 0, dict[int, int]()  # microbatch -> version; each slab's bytes are its version
    for move, microbatch in moves:
        if move == "a":
            if microbatch in held:
                with pytest.raises(RuntimeError, match=f"microbatch {microbatch} of the run already holds"):
                    pool.acquire(microbatch)
                continue
            assert pool.acquire(microbatch) == pool.newest_slab
            held[microbatch] = newest
        elif move == "r":
            if microbatch not in held:
                with pytest.raises(IndexError, match=f"microbatch {microbatch} of the run holds no weight version"):
                    pool.release(microbatch)
                continue
            pool.release(microbatch)
            del held[microbatch]
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
def test_a_stage_with_w_warm_up_microbatches_needs_exactly_w_plus_1_slabs(warm_up: int) -> None:
    schedule = OneFOneB(tuple((rank,) for rank in range(warm_up + 1)), 30)

    def run(slabs: int) -> None:
        pool = memory.WeightPool(64, slabs)
        for action in schedule.actions(0):
            if isinstance(action, Forward):
                pool.acquire(action.microbatch)
                assert pool.newest == action.version
            elif isinstance(action, Backward):
                assert pool.version_of(action.microbatch) == action.version
                pool.release(action.microbatch)
            elif isinstance(action, OptimizerStep):
                pool.begin_update(copy=True)
                assert pool.commit() == action.version

    before = memory.allocations()
    run(warm_up + 1)
    assert memory.allocations() - before == warm_up + 1, "the pool allocates nothing but slabs"
    if warm_up:
        with pytest.raises(RuntimeError, match="slabs are held"):
            run(warm_up)


def test_all_slabs_held_names_the_holders() -> None:
    pool = memory.WeightPool(8, 1)
    pool.acquire(3)
    pool.acquire(5)
    with pytest.raises(RuntimeError, match=r"all 1 weight slabs are held: version 0 by microbatch 3, 5 of the run\."):
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


def release(stash: WeightStash, microbatch: int) -> list[torch.Tensor | None]:
    """Release the microbatch's version and return its gradients."""
    slab = stash.slab_of(microbatch)
    stash.release(microbatch)
    return stash.take_gradients(slab)


def stash_of(module: nn.Module, slabs: int) -> WeightStash:
    return WeightStash(module, slabs, lambda parameters: torch.optim.SGD(parameters, lr=1.0))


def test_switching_versions_moves_pointers_not_bytes() -> None:
    module = nn.Linear(4, 4)
    stash = stash_of(module, 3)
    for microbatch in range(2):
        stash.acquire(microbatch)
    first = module.weight
    address = first.data_ptr()
    module(torch.ones(1, 4)).sum().backward()
    stash.update(release(stash, 0))
    stash.acquire(2)
    assert module.weight is not first
    assert module.weight.data_ptr() != address
    assert first.data_ptr() == address, "the old version has not moved"
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
    stash.update(release(stash, 1))  # weights become 1 - 5 and 5 - 1
    stash.use_newest()
    assert module[1].weight.item() == 4.0
    old.sum().backward()
    first, second = release(stash, 0)
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
    assert release(stash, 0) == []
    assert stash.update([]) == 1
    assert stash.optimizer is None


# --- what the optimizer factory gets ---------------------------------------------------------------


def test_parameters_carry_the_attributes_and_names_of_the_users_own() -> None:
    """A factory groups parameters by name and attribute; two steps are those of torch with the same groups."""

    def network() -> nn.Sequential:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        made[1].weight.no_decay = True
        return made

    def factory(named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
        for name, parameter in named:
            keep = name.endswith("bias") or getattr(parameter, "no_decay", False)
            groups["no_decay" if keep else "decay"].append(parameter)
        return torch.optim.SGD(
            [{"params": groups["decay"], "weight_decay": 0.5}, {"params": groups["no_decay"]}], lr=0.1
        )

    plain, module = network(), network()
    stash = WeightStash(module, 2, lambda given: factory((each.qualified_name, each) for each in given))
    assert stash.trained_names == [name for name, _ in plain.named_parameters()]
    optimizer = factory(plain.named_parameters())
    for round in range(2):
        gradients = [torch.full_like(each, round + 1.0) for each in plain.parameters()]
        for parameter, gradient in zip(plain.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        stash.update(gradients)
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), stash.trained, strict=True))


def test_a_factory_that_ignores_its_argument_is_refused() -> None:
    module = nn.Linear(3, 2)
    before = list(module.parameters())
    words = r"returned a SGD of other parameters than the 2 of this stage .* functools\.partial\(torch\.optim\.SGD, lr"
    with pytest.raises(PipedreamError, match=words):
        WeightStash(module, 2, lambda given: torch.optim.SGD(before, lr=0.1))
    with pytest.raises(PipedreamError, match=words):
        WeightStash(module, 2, lambda given: torch.optim.SGD([*given, nn.Parameter(torch.zeros(1))], lr=0.1))


def test_a_factory_may_leave_parameters_out() -> None:
    module = nn.Linear(3, 2)
    stash = WeightStash(module, 2, lambda given: torch.optim.SGD([p for p in given if p.ndim == 1], lr=1.0))
    weight, bias = (each.detach().clone() for each in stash.trained)
    stash.update([torch.ones(2, 3), torch.ones(2)])
    assert torch.equal(stash.trained[0], weight)
    assert torch.equal(stash.trained[1], bias - 1)


# --- loading weights -------------------------------------------------------------------------------


def test_loaded_weights_are_the_newest_version_and_frozen_ones_are_in_every_slab() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False).requires_grad_(False))
    stash = stash_of(module, 2)
    stash.update([torch.ones(2, 2)])
    stash.load_state(
        {"0.weight": torch.full((2, 2), 3.0), "1.weight": torch.full((2, 2), 7.0), "elsewhere": torch.ones(1)}
    )
    assert stash.version == 1
    for step in range(3):
        stash.use_newest()
        assert module[0].weight.unique().tolist() == [3.0 - step]
        assert module[1].weight.unique().tolist() == [7.0]
        stash.update([torch.ones(2, 2)])


def test_loading_keeps_the_optimizers_state() -> None:
    """Momentum goes on as in torch after load_state_dict of the model."""
    torch.manual_seed(0)
    module, plain = nn.Linear(2, 2), nn.Linear(2, 2)
    make = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    stash, optimizer = WeightStash(module, 2, make), make(plain.parameters())
    for round in range(3):
        if round != 1:
            state = {name: torch.full_like(value, 0.5 + round) for name, value in plain.state_dict().items()}
            plain.load_state_dict(state)
            stash.load_state(state)
        for parameter in plain.parameters():
            parameter.grad = torch.full_like(parameter, 0.3)
        optimizer.step()
        stash.update([torch.full_like(each, 0.3) for each in stash.trained])
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), stash.trained, strict=True))


def test_masters_are_made_anew_from_loaded_weights() -> None:
    module = nn.Linear(2, 1, bias=False).bfloat16()
    stash = WeightStash(module, 2, partial(torch.optim.SGD, lr=2.0**-12), master_weights=True)
    gradient = [torch.ones(1, 2, dtype=torch.bfloat16)]
    stash.load_state({"weight": torch.ones(1, 2)})
    stash.update(gradient)
    stash.load_state({"weight": torch.full((1, 2), 2.0)})
    stash.update(gradient)
    assert stash.optimizer is not None
    ((cursor,),) = (group["params"] for group in stash.optimizer.param_groups)
    assert stash.optimizer.state[cursor]["master"].unique().tolist() == [2.0 - 2.0**-12]


def test_weights_of_another_shape_or_weights_in_use_are_not_loaded() -> None:
    stash = stash_of(nn.Linear(2, 2), 2)
    with pytest.raises(PipedreamError, match=r"weight 'bias' has shape \(3,\), but the model's has shape \(2,\)"):
        stash.load_state({"weight": torch.zeros(2, 2), "bias": torch.zeros(3)})
    assert stash.trained[0].any(), "nothing is loaded"
    stash.acquire(0)
    with pytest.raises(RuntimeError, match="while 1 microbatches hold a weight version"):
        stash.load_state({"weight": torch.zeros(2, 2)})
