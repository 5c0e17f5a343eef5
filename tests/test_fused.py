"""Fused steps from one weight version to the next: bitwise torch's own optimizers, and no write out of bounds.

Where Adam is compared, torch takes correctly rounded square roots (verification.rounding): its own may be off by one
unit in the last place. `test_adam_with_the_square_roots_of_torch` bounds the effect of that.
"""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pipedream_hpc.core import load_weights
from pipedream_hpc.runtime.weights import stash as stash_module
from pipedream_hpc.runtime.weights.fused import FusedStep, fused_from
from pipedream_hpc.runtime.weights.stash import WeightStash
from pipedream_hpc.verification.rounding import correct_square_roots

Make = Callable[[Any], torch.optim.Optimizer]

SGDS = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.01, "maximize": True},
    {"lr": 0.037, "momentum": 0.9},
    {"lr": 0.037, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
    {"lr": 0.037, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "maximize": True},
    {"lr": 1, "momentum": 0.5, "nesterov": True},
]
ADAMS = [
    {"lr": 0.0037},
    {"lr": 0.0037, "weight_decay": 0.01},
    {"lr": 0.01, "betas": (0.3, 0.99), "eps": 1e-6, "maximize": True},
    {"lr": 0.01, "betas": (0.5, 0.9), "weight_decay": 0.1, "maximize": True},
]
CASES: dict[str, Make] = {
    f"{kind.__name__} {', '.join(f'{key}={value}' for key, value in options.items())}": partial(kind, **options)
    for kind, all_options in ((SGD, SGDS), (Adam, ADAMS), (AdamW, ADAMS))
    for options in all_options
}
every_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
GUARD = 12345.5


@pytest.fixture(autouse=True)
def restore_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bits(values: Tensor) -> Tensor:
    return values.detach().contiguous().view(torch.int16 if values.dtype == torch.bfloat16 else torch.int32)


def assert_bitwise(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    """Compare bit patterns: zeros of different sign are different."""
    different = [i for i, (a, b) in enumerate(zip(left, right, strict=True)) if not torch.equal(bits(a), bits(b))]
    assert not different


def parameters_of(tensors: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(tensor.clone()) for tensor in tensors]


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [value for parameter in owned for _, value in sorted(optimizer.state[parameter].items())]


def plain_step(optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor | None]) -> None:
    owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, gradient in zip(owned, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    with correct_square_roots():
        optimizer.step()


class Versions:
    """Weights in a buffer with guard values around each; every fused step writes them into a new buffer."""

    def __init__(self, make: Make, start: Sequence[Tensor], shift: int = 0, master: bool = False) -> None:
        self.optimizer = make(parameters_of(start))
        self._master, self._shift, self._shapes = master, shift, [tensor.shape for tensor in start]
        self.dtype = start[0].dtype if start else torch.float32
        self._allocate()
        for value, tensor in zip(self.now, start, strict=True):
            value.copy_(tensor)

    def _allocate(self) -> None:
        """Allocate tensors one after the other, `shift` numbers past alignment, with guards between them."""
        self.buffer = torch.full((8 + sum(s.numel() + 3 for s in self._shapes) + self._shift,), GUARD, dtype=self.dtype)
        self.now, at = [], 5 + self._shift
        for shape in self._shapes:
            self.now.append(self.buffer[at : at + shape.numel()].view(shape))
            at += shape.numel() + 3

    def guards(self) -> int:
        return int((self.buffer == torch.tensor(GUARD, dtype=self.dtype)).sum())

    def step(self, gradients: Sequence[Tensor | None], streaming: bool | None = None) -> None:
        step = fused_from(self.optimizer, gradients=gradients, master=self._master)
        assert step is not None
        step.streaming = streaming
        old, buffer = self.now, self.buffer
        before = buffer.clone()
        self._allocate()
        step.step(old, self.now, gradients)
        assert_bitwise([buffer], [before])  # the old version is unchanged
        assert self.guards() >= self.buffer.numel() - sum(shape.numel() for shape in self._shapes)


def drawn(seed: int, shapes: Sequence[tuple[int, ...]], spread: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(torch.randn(s, generator=generator), torch.randn(s, generator=generator)) for s in shapes]
    return [value * 10 ** (spread * power) for value, power in sizes]


@every_case
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("streaming", [False, True, None])
def test_bits_of_torch(make: Any, foreach: bool, streaming: bool | None) -> None:
    shapes = [(0,), (1,), (7,), (), (33, 3), (128,), (1025,), (40_000,)]
    start = drawn(0, shapes)
    plain, versions = make(parameters_of(start), foreach=foreach), Versions(make, start)
    for minibatch in range(4):
        gradients = drawn(minibatch + 1, shapes)
        gradients[5][::2] = 0.0
        gradients[5][1::4] = -0.0
        plain_step(plain, gradients)
        versions.step(gradients, streaming)
        assert_bitwise(plain.param_groups[0]["params"], versions.now)
        assert_bitwise(state_of(plain), state_of(versions.optimizer))


shapes_of_tensors = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 70)),
        st.tuples(st.integers(0, 9), st.integers(0, 9)),
        st.sampled_from([(), (1,), (127,), (129,), (1023,), (33_000,)]),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shapes_groups_and_missing_gradients(data: st.DataObject) -> None:
    shapes = data.draw(shapes_of_tensors)
    make = data.draw(st.sampled_from(list(CASES.values())))
    groups = data.draw(st.lists(st.integers(0, 2), min_size=len(shapes), max_size=len(shapes)))
    start = drawn(data.draw(st.integers(0, 99)), shapes)

    def grouped(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        made = [
            {"params": [p for p, of in zip(parameters, groups, strict=True) if of == group], "lr": 0.01 * (group + 1)}
            for group in sorted(set(groups))
        ]
        return make(made)

    order = sorted(range(len(shapes)), key=lambda index: groups[index])  # that of optimizer.param_groups
    start = [start[index] for index in order]
    shapes = [shapes[index] for index in order]
    groups = sorted(groups)
    plain, versions = grouped(parameters_of(start)), Versions(grouped, start, shift=data.draw(st.integers(0, 20)))
    owned = [parameter for group in plain.param_groups for parameter in group["params"]]
    for _ in range(3):
        gradients: list[Tensor | None] = list(drawn(data.draw(st.integers(0, 99)), shapes))
        for index in data.draw(st.sets(st.integers(0, len(shapes) - 1))):
            gradients[index] = None
        torch.set_num_threads(data.draw(st.sampled_from([1, 2])))
        plain_step(plain, gradients)
        versions.step(gradients, data.draw(st.sampled_from([True, False])))
        assert_bitwise(owned, versions.now)
        assert_bitwise(state_of(plain), state_of(versions.optimizer))


@every_case
def test_threads_and_streaming_stores_do_not_change_bits(make: Make) -> None:
    shapes = [(200_001,), (3,), (77_777,)]
    start, *gradients = (drawn(minibatch, shapes) for minibatch in range(3))
    results = []
    for threads, streaming in ((1, False), (2, False), (2, True), (5, None)):
        torch.set_num_threads(threads)
        versions = Versions(make, start, shift=3)
        for each in gradients:
            versions.step(each, streaming)
        results.append([*versions.now, *state_of(versions.optimizer)])
    for result in results[1:]:
        assert_bitwise(results[0], result)


@every_case
def test_in_place(make: Make) -> None:
    start, gradients = drawn(0, [(1000,), (10,)]), [*drawn(1, [(1000,)]), None]
    versions = Versions(make, start)
    versions.step(gradients)
    optimizer = make(parameters_of(start))
    step = fused_from(optimizer)
    assert step is not None
    values = [tensor.clone() for tensor in start]
    step.step(values, values, gradients)
    assert_bitwise(values, versions.now)


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_adam_with_the_square_roots_of_torch(kind: Any) -> None:
    """From the same weights and state: moments equal, weights within 1 ulp plus 4 ulp of the change."""
    shapes = [(50_000,)]
    plain, versions = kind(parameters_of(drawn(0, shapes)), lr=0.01), Versions(partial(kind, lr=0.01), drawn(0, shapes))
    for minibatch in range(20):
        gradients = drawn(minibatch + 1, shapes)
        before = versions.now[0].clone()
        plain.param_groups[0]["params"][0].grad = gradients[0].clone()
        plain.step()
        versions.step(gradients)
        theirs, ours = plain.param_groups[0]["params"][0].data, versions.now[0]
        assert_bitwise(state_of(plain), state_of(versions.optimizer))
        ulp = 2.0**-23
        allowed = ulp * torch.maximum(theirs.abs(), ours.abs()) + 4 * ulp * (ours - before).abs()
        assert ((theirs - ours).abs() <= allowed).all()
        theirs.copy_(ours)


@every_case
def test_learning_rate_schedule(make: Make, recwarn: pytest.WarningsRecorder) -> None:
    shapes = [(100,), (3, 5)]
    plain, versions = make(parameters_of(drawn(0, shapes))), Versions(make, drawn(0, shapes))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.7) for each in (plain, versions.optimizer)]
    for minibatch in range(5):
        gradients = drawn(minibatch + 1, shapes)
        plain_step(plain, gradients)
        versions.step(gradients)
        for scheduler in schedulers:
            scheduler.step()
    assert versions.optimizer.param_groups[0]["lr"] < 0.2 * make(parameters_of(drawn(0, shapes))).param_groups[0]["lr"]
    assert_bitwise(plain.param_groups[0]["params"], versions.now)
    assert not [str(warning.message) for warning in recwarn if "lr_scheduler" in str(warning.message)]


@every_case
def test_state_moves_between_fused_and_plain_steps(make: Make) -> None:
    """fused, fused | saved | plain, fused | saved | fused, plain: the same as six plain steps."""
    shapes = [(300,), (4, 4)]
    plain, versions = make(parameters_of(drawn(0, shapes))), Versions(make, drawn(0, shapes))
    for minibatch, fused in enumerate([True, True, False, True, True, False]):
        gradients = drawn(minibatch + 1, shapes)
        plain_step(plain, gradients)
        if fused:
            versions.step(gradients)
        else:
            for parameter, value in zip(versions.optimizer.param_groups[0]["params"], versions.now, strict=True):
                parameter.data = value
            plain_step(versions.optimizer, gradients)
        assert_bitwise(plain.param_groups[0]["params"], versions.now)
        assert_bitwise(state_of(plain), state_of(versions.optimizer))
        if minibatch % 2:
            file = io.BytesIO()
            torch.save(versions.optimizer.state_dict(), file)
            versions.optimizer = make(parameters_of(versions.now))
            versions.optimizer.load_state_dict(torch.load(io.BytesIO(file.getvalue())))


def test_state_in_another_memory_layout_is_converted() -> None:
    """Moments of a channels-last model, loaded where weights are contiguous."""
    start = drawn(0, [(2, 3, 4, 5)])
    plain, versions = Adam(parameters_of(start)), Versions(Adam, start)
    for optimizer in (plain, versions.optimizer):
        (parameter,) = optimizer.param_groups[0]["params"]
        average, square = drawn(1, [(2, 3, 4, 5)] * 2, spread=0)
        optimizer.state[parameter] = {
            "step": torch.tensor(3.0),
            "exp_avg": average.to(memory_format=torch.channels_last),
            "exp_avg_sq": square.abs().to(memory_format=torch.channels_last),
        }
    gradients = [drawn(2, [(5, 4, 3, 2)])[0].permute(3, 2, 1, 0)]
    plain_step(plain, gradients)
    versions.step(gradients)
    assert_bitwise(plain.param_groups[0]["params"], versions.now)


# --- bfloat16 weights with a float32 master --------------------------------------------------------


@every_case
def test_the_step_updates_the_master_and_weights_are_the_master_rounded(make: Make) -> None:
    shapes = [(0,), (1,), (1000,), (33, 3)]
    start = [tensor.bfloat16() for tensor in drawn(0, shapes)]
    plain = make(parameters_of([tensor.float() for tensor in start]))
    versions = Versions(make, start, shift=1, master=True)
    for minibatch in range(4):
        gradients = [tensor.bfloat16() for tensor in drawn(minibatch + 1, shapes)]
        plain_step(plain, [gradient.float() for gradient in gradients])
        versions.step(gradients, streaming=bool(minibatch % 2))
        masters = [versions.optimizer.state[p]["master"] for p in versions.optimizer.param_groups[0]["params"]]
        assert_bitwise(plain.param_groups[0]["params"], masters)
        assert_bitwise([master.bfloat16() for master in masters], versions.now)


def test_rounding_to_bfloat16_as_torch() -> None:
    """Ties, overflow to infinity, infinities, NaN and the smallest numbers."""
    patterns = [
        0x3F808000,
        0x3F818000,
        0x3F808001,
        0x3F807FFF,
        0x7F7FFFFF,
        0x7F800000,
        0x00000001,
        0x00008000,
        0x7FC00001,
    ]
    masters = torch.tensor([*patterns, 0], dtype=torch.int32).view(torch.float32)
    masters = torch.cat((masters, -masters))
    versions = Versions(partial(SGD, lr=0.0), [masters.bfloat16()], master=True)
    (parameter,) = versions.optimizer.param_groups[0]["params"]
    versions.optimizer.state[parameter]["master"] = masters.clone()
    versions.step([torch.full_like(masters, -0.0, dtype=torch.bfloat16)])
    after = versions.optimizer.state[parameter]["master"].bfloat16()
    numbers = ~after.isnan()
    assert_bitwise([after[numbers]], [versions.now[0][numbers]])
    assert versions.now[0][~numbers].isnan().all()


def test_a_checkpoint_keeps_masters_in_float32() -> None:
    shapes = [(100,)]
    start = [tensor.bfloat16() for tensor in drawn(0, shapes)]
    versions = Versions(Adam, start, master=True)
    versions.step([tensor.bfloat16() for tensor in drawn(1, shapes)])
    saved = copy.deepcopy(versions.optimizer.state_dict())
    resumed = Versions(Adam, versions.now, master=True)
    assert fused_from(resumed.optimizer, master=True) is not None  # loading keeps float32 from now on
    resumed.optimizer.load_state_dict(saved)
    assert_bitwise(state_of(versions.optimizer), state_of(resumed.optimizer))
    for each in (versions, resumed):
        each.step([tensor.bfloat16() for tensor in drawn(2, shapes)])
    assert_bitwise(versions.now, resumed.now)


# --- optimizers without a fused step ---------------------------------------------------------------


class Subclass(SGD):
    pass


@pytest.mark.parametrize(
    "make",
    [
        RMSprop,
        Subclass,
        partial(Adam, amsgrad=True),
        partial(Adam, capturable=True),
        partial(Adam, differentiable=True),
        partial(SGD, lr=torch.tensor(0.1)),
    ],
    ids=["another class", "subclass", "amsgrad", "capturable", "differentiable", "tensor as learning rate"],
)
def test_other_optimizers_have_no_fused_step(make: Make) -> None:
    assert fused_from(make(parameters_of(drawn(0, [(3,)])))) is None


def test_no_fused_step_where_a_call_of_step_has_effects_of_its_own() -> None:
    parameters = parameters_of(drawn(0, [(3,)]))
    optimizer = SGD(parameters)
    handle = optimizer.register_step_post_hook(lambda *_: None)
    assert fused_from(optimizer) is None
    handle.remove()
    assert fused_from(optimizer) is not None
    everywhere = register_optimizer_step_pre_hook(lambda *_: None)
    assert fused_from(optimizer) is None
    everywhere.remove()
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign]
    assert fused_from(optimizer) is None


def test_no_fused_step_for_other_dtypes_layouts_or_parameters() -> None:
    (single,) = drawn(0, [(3,)])
    assert fused_from(SGD([nn.Parameter(single.double())])) is None
    assert fused_from(SGD([nn.Parameter(single.bfloat16())])) is None, "torch steps it without a master"
    assert fused_from(SGD([nn.Parameter(single.bfloat16())]), master=True) is not None
    assert fused_from(SGD([nn.Parameter(single)]), gradients=[single.to_sparse()]) is None
    parameters = parameters_of([single, single])
    assert fused_from(SGD(parameters), parameters[:1]) is None, "one of its parameters is not among them"


def test_fma_without_the_instructions_is_refused() -> None:
    memory = load_weights()
    rule = memory.Sgd(
        rate=-1.0, weight_decay=0.0, momentum=0.0, undampened=1.0, first=False, nesterov=False, maximize=False
    )
    if not memory.cpu_has_fma():
        with pytest.raises(ValueError, match="cannot multiply and add with one rounding"):
            memory.fused_step(rule, [], fma=True)
    if not memory.cuda_compiled():
        with pytest.raises(RuntimeError, match="install it again where nvcc is on PATH"):
            memory.fused_step(rule, [], stream=0)


# --- the stash -------------------------------------------------------------------------------------


def release(stash: WeightStash, microbatch: int) -> list[Tensor | None]:
    """Release the microbatch's version and return its gradients."""
    slab = stash.slab_of(microbatch)
    stash.release(microbatch)
    return stash.take_gradients(slab)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3))


@every_case
@pytest.mark.parametrize("slabs", [1, 2, 3])
def test_twenty_updates_of_a_stash_are_twenty_plain_steps(slabs: int, make: Make) -> None:
    module, plain = network(), network()
    for each in (module, plain):
        each[2].weight.requires_grad_(False)
    stash = WeightStash(module, slabs, lambda p: make(list(p)))
    optimizer = make([parameter for parameter in plain.parameters() if parameter.requires_grad])
    for minibatch, inputs in enumerate(drawn(1, [(4, 7)] * 20, spread=0)):
        stash.acquire(minibatch, stash.version)
        module(inputs).tanh().sum().backward()
        stash.update(release(stash, minibatch))
        optimizer.zero_grad()
        plain(inputs).tanh().sum().backward()
        with correct_square_roots():
            optimizer.step()
        stash.use_newest()
        assert_bitwise(list(plain.parameters()), list(module.parameters()))


@pytest.mark.parametrize(
    ("make", "fused"),
    [(SGD, True), (Adam, True), (AdamW, True), (RMSprop, False), (partial(Adam, amsgrad=True), False)],
)
def test_the_stash_uses_the_fused_step_if_there_is_one(
    make: Make, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[FusedStep | None] = []

    def recorded(*arguments: Any, **options: Any) -> FusedStep | None:
        steps.append(fused_from(*arguments, **options))
        return steps[-1]

    module, plain = network(), network()
    stash, optimizer = WeightStash(module, 2, make), make(plain.parameters())
    monkeypatch.setattr(stash_module, "fused_from", recorded)
    for minibatch, inputs in enumerate(drawn(1, [(4, 7)] * 3, spread=0)):
        stash.acquire(minibatch, stash.version)
        module(inputs).sum().backward()
        optimizer.zero_grad()
        plain(inputs).sum().backward()
        with correct_square_roots():
            stash.update(release(stash, minibatch))
            optimizer.step()
    assert [step is not None for step in steps] == [fused] * 3
    stash.use_newest()
    assert_bitwise(list(plain.parameters()), list(module.parameters()))


def test_the_stash_with_reordered_groups_and_a_parameter_left_out() -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        _, *rest = parameters
        weights = [{"params": [p for p in rest if p.ndim == 2], "weight_decay": 0.1}]
        return SGD([{"params": [p for p in rest if p.ndim == 1]}, *weights], lr=0.1, momentum=0.9)

    module, plain = network(), network()
    stash, optimizer = WeightStash(module, 3, make), make(plain.parameters())
    for minibatch, inputs in enumerate(drawn(1, [(4, 7)] * 5, spread=0)):
        stash.acquire(minibatch, stash.version)
        module(inputs).sum().backward()
        stash.update(release(stash, minibatch))
        optimizer.zero_grad()
        plain(inputs).sum().backward()
        optimizer.step()
    stash.use_newest()
    assert_bitwise(list(plain.parameters()), list(module.parameters()))


WITHOUT_TORCH = """
import importlib.util, sys
import numpy as np

spec = importlib.util.spec_from_file_location("pipedream_hpc._weights", sys.argv[1])
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)
numbers = dict(rate=-0.5, weight_decay=0.0, momentum=0.0, undampened=1.0)
rule = memory.Sgd(**numbers, first=False, nesterov=False, maximize=False)
count = 200_003
weights, target, gradient = np.arange(count, dtype="f4"), np.zeros(count, "f4"), np.ones(count, "f4")
memory.fused_step(rule, [(count, weights.ctypes.data, target.ctypes.data, gradient.ctypes.data, 0, 0)], threads=3)
assert (target == weights - np.float32(0.5)).all()
assert "torch" not in sys.modules
"""


def test_the_core_starts_its_own_threads_without_torch() -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, load_weights().__file__]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stderr
