"""The run over MPI = the emulator = plain autograd with the paper's equation, bit for bit."""

from __future__ import annotations

import gc
import math
from typing import Any

import chains
import pytest
import torch
import training
from torch import nn
from training import Order, Report, assert_bitwise

from pipedream_hpc.runtime.pipeline import Pipeline
from pipedream_hpc.verification import reference
from pipedream_hpc.verification.rounding import correct_square_roots

EPOCHS_OF_40 = [40, 40, 40]
FEWER_THAN_STAGES = [[1], [2, 3], [0, 1, 0, 2]]


def order(stages: int, model: str = "plain", optimizer: str = "sgd", **more: Any) -> Order:
    return {"plan": stages, "model": model, "optimizer": optimizer, **more}


ORDERS = {
    **{f"{n} {kind}": order(n, optimizer=kind, epochs=EPOCHS_OF_40) for n in (1, 2, 3, 4) for kind in ("sgd", "adam")},
    **{f"4 {epochs}": order(4, epochs=epochs) for epochs in FEWER_THAN_STAGES},
    **{f"{n} attentive": order(n, "attentive", "adam", epochs=[6, 6], last=3) for n in (2, 3)},
    **{f"{n} rich": order(n, "rich", epochs=[9, 9], last=3) for n in (2, 4)},
    "4 draining": order(4, epochs=[7, 3, 7]),
    "4 allocating": order(4, epochs=[20, 20, 20]),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """Reports by name: one launch for all orders of so many ranks."""
    found: dict[str, Report] = {}
    for stages in (1, 2, 3, 4):
        names = [name for name, wanted in ORDERS.items() if wanted["plan"] == stages]
        reports = training.on_ranks(stages, [ORDERS[name] for name in names], tmp_path_factory.mktemp("reports"))
        found.update(zip(names, reports, strict=True))
    return found


def cut_into(stages: int) -> Pipeline:
    return Pipeline(
        chains.rich_model(),
        loss=nn.CrossEntropyLoss(),
        optimizer=chains.OPTIMIZERS["sgd"],
        example=chains.example(),
        plan=stages,
    )


def by_reference(stages: int, optimizer: str, epochs: list[int]) -> dict[str, torch.Tensor]:
    """Weights by pipedream_hpc.verification.reference."""
    pipeline = Pipeline(
        chains.plain_model(),
        loss=nn.CrossEntropyLoss(),
        optimizer=chains.OPTIMIZERS[optimizer],
        example=chains.example(),
        plan=stages,
    )
    return reference.train(
        chains.plain_model(),
        pipeline.stage_of_parameters(),
        [chains.minibatches(m) for m in epochs],
        nn.CrossEntropyLoss(),
        chains.OPTIMIZERS[optimizer],
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_three_epochs_of_forty_minibatches(stages: int, optimizer: str, launched: dict[str, Report]) -> None:
    on_ranks, emulated = launched[f"{stages} {optimizer}"], training.alone(ORDERS[f"{stages} {optimizer}"])
    assert_bitwise(emulated["weights"], by_reference(stages, optimizer, EPOCHS_OF_40))
    assert_bitwise(on_ranks["weights"], emulated["weights"])
    assert on_ranks["losses"] == emulated["losses"]
    assert on_ranks["scores"] == emulated["scores"]


@pytest.mark.parametrize("epochs", FEWER_THAN_STAGES)
def test_fewer_minibatches_than_stages(epochs: list[int], launched: dict[str, Report]) -> None:
    on_ranks, emulated = launched[f"4 {epochs}"], training.alone(ORDERS[f"4 {epochs}"])
    assert_bitwise(emulated["weights"], by_reference(4, "sgd", epochs))
    assert_bitwise(on_ranks["weights"], emulated["weights"])
    assert [math.isnan(loss) for loss in on_ranks["losses"]] == [count == 0 for count in epochs]


def test_stashing_differs_from_plain_sgd() -> None:
    """The reference would be worthless if staleness changed nothing."""
    stale, plain = by_reference(4, "sgd", [10]), by_reference(1, "sgd", [10])
    assert any(not torch.equal(stale[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(f"{n} attentive", id=f"dropout in attention and as a function, {n} stages") for n in (2, 3)),
        *(pytest.param(f"{n} rich", id=f"BatchNorm, writes in place, a short minibatch, {n} stages") for n in (2, 4)),
    ],
)
def test_random_numbers_and_buffers(name: str, launched: dict[str, Report]) -> None:
    on_ranks, emulated = launched[name], training.alone(ORDERS[name])
    assert_bitwise(on_ranks["weights"], emulated["weights"])
    assert on_ranks["losses"] == emulated["losses"]
    if "rich" in name:
        assert on_ranks["weights"]["2.num_batches_tracked"] == 18  # buffers are not weights: never rolled back


def test_one_stage_is_plain_training_with_batchnorm() -> None:
    """One stage has no staleness, so an ordinary training loop is its reference."""
    model, plain = chains.rich_model(), chains.rich_model()
    for each in (model, plain):
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # the plain loop draws other masks
            if isinstance(module, nn.ReLU):
                module.inplace = False  # dropout with p = 0 hands on its input, which is stashed
    pipeline = Pipeline(
        model,
        loss=nn.CrossEntropyLoss(),
        optimizer=chains.OPTIMIZERS["adam"],
        example=chains.example(),
        plan=1,
    )
    batches = chains.minibatches(12, last=5)
    for _ in range(2):
        pipeline.fit(batches)
    optimizer = chains.OPTIMIZERS["adam"](plain.parameters())
    with correct_square_roots():
        for inputs, target in [*batches, *batches]:
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(plain(inputs), target).backward()
            optimizer.step()
    assert_bitwise(pipeline.state_dict(), dict(plain.state_dict()))


def test_version_of_backward_is_version_of_forward_across_the_drain(launched: dict[str, Report]) -> None:
    stages, wanted = 4, ORDERS["4 draining"]
    for report in (training.alone(wanted), launched["4 draining"]):
        for count, spans in zip(wanted["epochs"], report["traces"], strict=True):
            versions = {(rank, kind, k): version for rank, kind, k, version in spans}
            for stage in range(stages):
                for k in range(count):
                    # In flight before it: as many as there are stages behind this one.
                    expected = max(0, k - (stages - 1 - stage))
                    assert versions[stage, "forward", k] == expected
                    assert versions[stage, "backward", k] == expected


def test_slabs_are_those_in_flight_and_nothing_is_allocated_after_warm_up(launched: dict[str, Report]) -> None:
    report = launched["4 allocating"]
    assert report["slabs"] == {0: 4, 1: 3, 2: 2, 3: 1}
    for rank, counts in enumerate(report["allocations"]):
        assert len(set(counts)) == 1, f"rank {rank} allocated between epochs: {counts}"


def test_dropout_masks_do_not_depend_on_the_plan() -> None:
    """With weights that never move, every plan must see the same losses."""

    def losses(stages: int) -> list[float]:
        pipeline = Pipeline(
            nn.Sequential(*chains.rich_model()[6:]),
            loss=nn.CrossEntropyLoss(),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
            example=torch.zeros(8, 4, 3, 4),
            plan=stages,
        )
        batches = [(torch.ones(8, 4, 3, 4), torch.zeros(8, dtype=torch.long))] * 5
        return [pipeline.fit(batches) for _ in range(2)]

    first = losses(1)
    assert first[0] != first[1], "each minibatch draws masks of its own"
    assert losses(2) == first == losses(3)


def test_evaluation_leaves_everything_as_it_was() -> None:
    pipeline = cut_into(3)
    batches = chains.minibatches(5)
    pipeline.fit(batches)
    before, rng = pipeline.state_dict(), torch.get_rng_state()
    assert pipeline.evaluate(batches) == pipeline.evaluate(batches)
    assert_bitwise(pipeline.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), rng)


def test_evaluation_is_that_of_the_whole_model() -> None:
    pipeline = cut_into(4)
    batches = chains.minibatches(6, last=2)
    pipeline.fit(batches)
    whole = chains.rich_model()
    whole.load_state_dict(pipeline.state_dict())
    whole.eval()
    hits = sum(int((whole(x).argmax(1) == y).sum()) for x, y in batches)
    assert pipeline.evaluate(batches) == pytest.approx(hits / sum(len(y) for _, y in batches), abs=1e-7)


def test_nothing_of_a_minibatch_is_left_behind() -> None:
    """As many tensors live after ten epochs as after two: no graph, activation or gradient stays."""
    pipeline = cut_into(4)
    batches, living = chains.minibatches(5), []
    for _ in range(10):
        pipeline.fit(batches)
        gc.collect()
        living.append(sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()))
    assert living[9] == living[1]
