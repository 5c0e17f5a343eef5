"""What only a GPU can show; run by all.sh, or by itself: python -m pytest -rs benchmarks/gpu

The same things are tested on every machine with stand-ins for the device (tests/test_on_gpus.py,
csrc/tests/test_device_channel.cpp).
"""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import training
from torch import nn
from training import Training

from pipedream_hpc import Pipeline, RunConfig, ScheduleConfig, TrainConfig
from pipedream_hpc.core import load_weights
from pipedream_hpc.runtime.weights.stash import WeightStash

HERE = Path(__file__).resolve().parent
GPU = torch.device("cuda", 0)
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not load_weights().cuda_compiled(), reason="needs a GPU and a core built with nvcc"
)


@pytest.fixture(autouse=True)
def sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPEDREAM_SHARE_GPUS", "1")


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.1),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
        partial(torch.optim.Adam, lr=0.01),
        partial(torch.optim.AdamW, lr=0.01),
    ],
)
def test_pool_steps_as_torch_does(optimizer: Any) -> None:
    """Ten updates on the GPU beside torch's optimizer on the GPU: equal within some units in the last place."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(301, 77), nn.Linear(77, 1))
    copies = [nn.Parameter(each.detach().to(GPU)) for each in module.parameters()]
    stash, plain = WeightStash(module, 3, optimizer, device=GPU), optimizer(copies)
    for _ in range(10):
        gradients = [torch.randn_like(each) for each in copies]
        for copy, gradient in zip(copies, gradients, strict=True):
            copy.grad = gradient.clone()
        plain.step()
        stash.update(list(gradients))
        for ours, theirs in zip(stash.trained, copies, strict=True):
            torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=2e-6, atol=1e-7)


def test_pool_keeps_masters() -> None:
    """bfloat16 weights are the float32 master, rounded; the master is stepped by torch's own numbers."""
    module = nn.Linear(65, 33).bfloat16()
    master = nn.Parameter(module.weight.detach().float().to(GPU))
    make = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
    stash, plain = WeightStash(module, 2, make, master_weights=True, device=GPU), make([master])
    for _ in range(10):
        gradients: list[torch.Tensor | None] = [torch.randn_like(each) for each in stash.trained]
        assert gradients[0] is not None
        master.grad = gradients[0].float()
        plain.step()
        stash.update(gradients)
        torch.testing.assert_close(stash.trained[0].detach(), master.detach().bfloat16(), rtol=8e-3, atol=0)


def test_pool_allocates_nothing_after_warm_up() -> None:
    stash = WeightStash(nn.Linear(512, 512), 3, partial(torch.optim.Adam, lr=0.01), device=GPU)
    gradients: list[torch.Tensor | None] = [torch.ones_like(each) for each in stash.trained]
    stash.update(gradients)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), load_weights().allocations()
    for microbatch in range(20):
        stash.acquire(microbatch)
        stash.update(gradients)
        stash.release(microbatch)
    assert (torch.cuda.memory_allocated(), load_weights().allocations()) == before


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_pool_steps_tensors_that_begin_anywhere(offset: int) -> None:
    """Four numbers at a time where all tensors begin at multiples of 16 bytes, one by one where they do not."""
    core, count = load_weights(), 10_007
    whole = [torch.randn(count + 4, device=GPU) for _ in range(2)]
    weights, gradient = (each[offset : offset + count] for each in whole)
    target = torch.full((count + 8,), 99.0, device=GPU)
    rule = core.Sgd(
        rate=-0.5, weight_decay=0.0, momentum=0.0, undampened=1.0, first=False, nesterov=False, maximize=False
    )
    place = (weights.data_ptr(), target[4:].data_ptr(), gradient.data_ptr(), 0, 0)
    core.fused_step(rule, [(count, *place)], stream=torch.cuda.current_stream().cuda_stream)
    assert torch.equal(target[4:-4], torch.addcmul(weights, gradient, torch.tensor(-0.5, device=GPU)))
    assert (target[:4] == 99).all()
    assert (target[-4:] == 99).all()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("route", ["direct", "staged"])
def test_channel_between_ranks_on_one_gpu(count: int, route: str) -> None:
    """Random sizes, several tensors of several dtypes, and a kernel that the copy must wait for."""
    done = ranks.mpirun(count, sys.executable, HERE / "exchange.py", route)
    if "cannot take device memory" in done.output:
        pytest.skip(done.output.split("cannot take device memory: ")[1].splitlines()[0])
    assert done.status == 0, done.output
    assert done.output.count("all as sent") == count


@pytest.mark.parametrize("route", ["direct", "staged"])
def test_channel_without_the_wait_sends_what_was_there_before(route: str) -> None:
    """The wait for the compute stream is what makes it right: told of an idle stream, the channel is too early."""
    done = ranks.mpirun(1, sys.executable, HERE / "exchange.py", route, "no-wait")
    if "cannot take device memory" in done.output:
        pytest.skip(done.output.split("cannot take device memory: ")[1].splitlines()[0])
    assert done.status == 0, done.output
    assert "too early" in done.output


@pytest.mark.parametrize(
    ("plan", "schedule", "precision"),
    [
        ((1, 1), ScheduleConfig("1f1b"), None),
        ((2, 1), ScheduleConfig("1f1b"), None),
        ((1, 1, 1), ScheduleConfig("gpipe", n_microbatches=2), None),
        ((1, 1, 1), ScheduleConfig("zb-h1", n_microbatches=2), None),
        ((1, 1), ScheduleConfig("zb-h2", n_microbatches=4), None),
        ((1, 1), ScheduleConfig("gpipe-split", n_microbatches=2), None),
        ((1, 1), ScheduleConfig("1f1b"), "bf16"),
    ],
)
def test_training_on_ranks_as_in_one_process(
    plan: tuple[int, ...], schedule: ScheduleConfig, precision: str | None, tmp_path: Path
) -> None:
    config = TrainConfig(precision=precision)
    wanted = Training(plan, schedule, config, model="rich", optimizer="adam", epochs=(9, 7))
    (report,) = training.on_ranks(sum(plan), [wanted], tmp_path)
    for name, value in training.in_one_process(wanted).weights.items():
        torch.testing.assert_close(report.weights[name], value, rtol=1e-4, atol=1e-5)


def test_no_minibatch_waits_for_the_gpu() -> None:
    """torch tells of every call that makes the host wait: in an epoch it is the one that reads its losses."""

    def waits(minibatches: int) -> int:
        data = [(torch.randn(8, 16), torch.randint(0, 4, (8,))) for _ in range(minibatches)]
        pipeline = Pipeline(
            nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4)),
            loss_fn=nn.CrossEntropyLoss(),
            optimizer=partial(torch.optim.Adam, lr=0.01),
            example_inputs=data[0][0],
            plan="1-1",
            run_config=RunConfig(device="cuda"),
        )
        pipeline.fit(data)  # allocates, and makes the optimizer's state
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                pipeline.fit(data)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        pipeline.close()
        return sum("synchroniz" in str(each.message) for each in told)

    waits(5)  # a process begins with some of its own
    assert waits(25) == 1


def test_masters_on_ranks(tmp_path: Path) -> None:
    wanted = Training((1, 1), train_config=TrainConfig(master_weights=True), model="half", epochs=(9,))
    (report,) = training.on_ranks(2, [wanted], tmp_path)
    for name, value in training.in_one_process(wanted).weights.items():
        torch.testing.assert_close(report.weights[name], value, rtol=2e-2, atol=1e-3)


def test_two_ranks_on_one_gpu_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if torch.cuda.device_count() > 1:
        pytest.skip("there are several GPUs")
    monkeypatch.setenv("PIPEDREAM_SHARE_GPUS", "0")
    job = HERE.parents[1] / "examples" / "classifier.py"
    done = ranks.pipedream(2, "train", job, "--plan", "1-1", "--device", "cuda", "--out", tmp_path)
    assert done.status == 2
    assert "would both train on GPU 0" in done.output


def test_verify_on_the_gpu() -> None:
    job = HERE.parents[1] / "examples" / "classifier.py"
    done = ranks.pipedream(2, "verify", job, "--plan", "1-1", "--device", "cuda", timeout=240)
    assert done.status == 0, done.output
