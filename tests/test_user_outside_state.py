"""i: state that a forward changes, and that no module holds: globals, classes, closures, objects of other kinds."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from user_programs import Net, assert_trained_alike, minibatches, pipeline_of

from pipedream_hpc import PipedreamError
from pipedream_hpc.model.outside_state import OutsideState, Replayed

STEP = 0
LATE: Any = None
COUNTS = {"calls": 0}
TOTAL = torch.zeros(())
SEEN: list[int] = []
THIS = sys.modules[__name__]


class Config:
    calls = 0


class Slotted:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class Ticking:
    """Its method changes a global."""

    def tick(self) -> int:
        COUNTS["calls"] += 1
        return COUNTS["calls"]


TICKING = Ticking()


class Owner(nn.Module):
    """What the ways of counting find on a module."""

    calls = 0

    def __init__(self, tick: Callable[[Any], Any]) -> None:
        super().__init__()
        self.tick, self.layer = tick, nn.Linear(16, 16)
        self.box, self.array, self.numbers = Slotted(), numpy.zeros(1), itertools.count(1)
        self.drawn, self.names = random.Random(3), SimpleNamespace(calls=0)
        self.endless = (number for number in itertools.count(1))


def of_global(_: Any) -> int:
    global STEP
    STEP += 1
    return STEP


def of_late_global(_: Any) -> int:
    global LATE
    LATE = 1 if LATE is None else LATE + 1
    return int(LATE)


def of_python_module(_: Any) -> int:
    THIS.STEP += 1  # type: ignore[attr-defined]
    return int(THIS.STEP)  # type: ignore[attr-defined]


def of_own_class(module: Any) -> int:
    type(module).calls += 1
    return int(type(module).calls)


def of_config(_: Any) -> int:
    Config.calls += 1
    return Config.calls


def of_function(_: Any) -> int:
    of_function.calls = getattr(of_function, "calls", 0) + 1  # type: ignore[attr-defined]
    return int(of_function.calls)  # type: ignore[attr-defined]


def of_default(_: Any, kept: list[int] = []) -> int:  # noqa: B006 - what is tested
    kept.append(1)
    return len(kept)


def of_dict(_: Any) -> int:
    COUNTS["calls"] += 1
    return COUNTS["calls"]


def of_new_key(_: Any) -> int:
    COUNTS["new"] = COUNTS.get("new", 0) + 1
    return COUNTS["new"]


def of_list(_: Any) -> int:
    SEEN.append(1)
    return len(SEEN)


def of_method(_: Any) -> int:
    return TICKING.tick()


def of_slots(module: Any) -> int:
    module.box.calls += 1
    return int(module.box.calls)


def of_array(module: Any) -> float:
    module.array += 1
    return float(module.array[0])


def of_iterator(module: Any) -> int:
    return int(next(module.numbers))


def of_generator(module: Any) -> int:
    return int(next(module.endless))


def of_random(module: Any) -> float:
    return float(module.drawn.random())


def of_namespace(module: Any) -> int:
    module.names.calls += 1
    return int(module.names.calls)


def of_submodule(module: Any) -> int:
    module.layer.calls = getattr(module.layer, "calls", 0) + 1
    return int(module.layer.calls)


def of_tensor(_: Any) -> float:
    TOTAL.add_(1)
    return float(TOTAL)


def of_tensor_as_one(_: Any) -> torch.Tensor:
    with torch.no_grad():
        TOTAL.add_(1)
    return TOTAL.clone()


def closure() -> Callable[[Any], int]:
    calls = 0

    def of_closure(_: Any) -> int:
        nonlocal calls
        calls += 1
        return calls

    return of_closure


WAYS: list[Callable[[Any], Any]] = [
    *(of_global, of_late_global, of_python_module, of_own_class, of_config, of_function, of_default, of_dict),
    *(of_new_key, of_list, of_method, of_slots, of_array, of_iterator, of_generator, of_random, of_namespace),
    *(of_submodule, of_tensor, of_tensor_as_one),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    forget()
    yield
    forget()


def forget() -> None:
    """Let the program begin again."""
    global STEP, LATE
    STEP, LATE, Config.calls = 0, None, 0
    COUNTS.clear()
    COUNTS["calls"] = 0
    SEEN.clear()
    vars(of_function).pop("calls", None)
    of_default.__defaults__[0].clear()  # type: ignore[index]
    TOTAL.zero_()
    Warmed.calls = Whole.calls = 0


class Warmed(Owner):
    """Is opened, and weighs what its layers compute by the number of its call."""

    def __init__(self, tick: Callable[[Any], Any]) -> None:
        torch.manual_seed(0)
        super().__init__(tick)
        self.a, self.c = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer(self.a(x)).tanh()
        return self.c(h * (self.tick(self) / 4))  # type: ignore[no-any-return]


class Whole(Owner):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * (self.tick(self) / 4)  # type: ignore[no-any-return]


def around(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), make(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def trained_alike(build: Callable[[], nn.Module], plan: Any, **options: Any) -> None:
    """As assert_trained_alike; the second program that it trains begins as the first one."""
    built: list[nn.Module] = []

    def build_anew() -> nn.Module:
        if built:
            forget()
        built.append(build())
        return built[-1]

    assert_trained_alike(build_anew, plan, **options)


@pytest.mark.parametrize("way", [*WAYS, None])
def test_a_model_that_counts_its_forwards_is_not_cut(way: Callable[[Any], Any] | None) -> None:
    trained_alike(lambda: Warmed(way or closure()), 1)
    forget()
    with pytest.raises(PipedreamError, match=r"cannot be cut, because its forward (changes|writes) .*: put what does"):
        pipeline_of(Warmed(way or closure()), 3, minibatches())


@pytest.mark.parametrize(("leaf", "recompute"), [(True, False), (False, True)])
@pytest.mark.parametrize("way", [*WAYS, None])
def test_a_module_that_counts_its_forwards_trains_in_stages(
    way: Callable[[Any], Any] | None, leaf: bool, recompute: bool
) -> None:
    leaves = (Whole,) if leaf else ()
    trained_alike(lambda: around(lambda: Whole(way or closure())), 3, leaf_modules=leaves, recompute=recompute)


def test_making_a_pipeline_leaves_the_state_of_the_program() -> None:
    for way in WAYS:
        model = around(partial(Whole, way))
        pipeline_of(model, 3, minibatches())
        forwards = [float(way(model[2])) for _ in range(2)]  # type: ignore[index]
        forget()
        fresh = Whole(way)
        assert forwards == [float(way(fresh)) for _ in range(2)], way.__name__
        forget()


@pytest.mark.parametrize("way", [of_global, of_slots, of_iterator, of_tensor])
def test_replicas_of_it_are_refused(way: Callable[[Any], Any]) -> None:
    with pytest.raises(PipedreamError, match=r"module '2' changes its own state .* 2 replicas of stage 0"):
        pipeline_of(around(partial(Whole, way)), "2-1", minibatches())


@pytest.mark.parametrize("leaf", [False, True])
def test_a_number_on_a_weight_is_refused(leaf: bool) -> None:
    def of_weight(module: Any) -> int:
        module.layer.weight.calls = getattr(module.layer.weight, "calls", 0) + 1
        return int(module.layer.weight.calls)

    trained_alike(lambda: Warmed(of_weight), 1)
    with pytest.raises(PipedreamError, match=r"sets 'calls' of weight '2.layer.weight', but each version"):
        pipeline_of(around(partial(Whole, of_weight)), 2, minibatches(), leaf_modules=(Whole,) if leaf else ())


class Reads(Owner):
    """Reads what another module changes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * (1 + STEP / 4)  # type: ignore[no-any-return]


@pytest.mark.parametrize("leaf_modules", [(), (Whole, Reads)])
@pytest.mark.parametrize("second", [Whole, Reads])
def test_modules_that_share_state_are_in_one_stage(second: Any, leaf_modules: Any) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        first, last = Whole(of_global), second(of_global)
        return nn.Sequential(nn.Linear(6, 16), first, nn.Linear(16, 16), last, nn.Linear(16, 3))

    trained_alike(build, 3, leaf_modules=leaf_modules)
    pipeline = pipeline_of(build(), 3, minibatches(), leaf_modules=leaf_modules)
    homes = pipeline.stage_of_parameters()
    assert homes["1.layer.weight"] == homes["3.layer.weight"]
    with pytest.raises(PipedreamError, match=r"'1' and '3' stay in one stage, because a forward changes global 'STEP'"):
        pipeline_of(build(), 4, minibatches(), leaf_modules=leaf_modules)


def test_a_model_that_reads_what_a_module_changes_is_not_cut() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = around(partial(Whole, of_global))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * (1 + STEP / 4)  # type: ignore[no-any-return]

    trained_alike(Outer, 1)
    with pytest.raises(PipedreamError, match=r"reads global 'STEP', which the forward of 'inner\.2' changes"):
        pipeline_of(Outer(), 2, minibatches())


WARNED = False
TABLE: dict[int, Any] = {}


class Caching(Net):
    """Fills caches, says things once, and leaves notes: that is no state."""

    def forward(self, x: torch.Tensor) -> Any:
        global WARNED, LATE
        if not WARNED:
            WARNED = True
        if LATE is None:
            LATE = torch.arange(16.0)
        TABLE.setdefault(x.shape[0], len(TABLE))
        self.b.samples = x.shape[0]  # type: ignore[assignment]
        return self.c(self.b(self.a(x)).tanh() * LATE)


def test_caches_are_no_state() -> None:
    global WARNED, LATE
    pipeline = assert_trained_alike(Caching, 3)
    assert len(set(pipeline.stage_of_parameters().values())) == 3
    WARNED, LATE = False, None
    TABLE.clear()


def test_iterators_go_back_and_keep_no_more_than_that_needs() -> None:
    model = around(partial(Whole, of_iterator))
    whole: Any = model[2]  # type: ignore[index]
    state = OutsideState(model)
    assert isinstance(whole.numbers, Replayed)
    assert [next(whole.numbers) for _ in range(3)] == [1, 2, 3]
    state.restore()
    assert [next(whole.numbers) for _ in range(5)] == [1, 2, 3, 4, 5]
    del state
    OutsideState(model)
    assert len(whole.numbers._items) == 0
    assert next(whole.numbers) == 6
