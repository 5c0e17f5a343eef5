"""The run over MPI = the emulator = plain autograd with the paper's equation, bit for bit."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path
from typing import Any

import chains
import pytest
import ranks
import torch
from torch import nn

from pipedream_hpc.runtime.pipeline import Pipeline
from pipedream_hpc.verification import reference
from pipedream_hpc.verification.rounding import correct_square_roots

EPOCHS_OF_40 = [40, 40, 40]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run(folder: Path, on_ranks: int, **wanted: Any) -> dict[str, Any]:
    """What tests/programs/train_chain.py reports, on real ranks or (0) in one process."""
    out = folder / f"{on_ranks}.pt"
    wanted["plan"] = wanted.pop("stages")
    finished = ranks.python(on_ranks, "train_chain.py", json.dumps([{**wanted, "out": str(out)}]))
    assert finished.status == 0, finished.output
    report: dict[str, Any] = torch.load(out)
    assert report["ranks"] == max(1, on_ranks), "the ranks really ran"
    return report


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


def assert_bitwise(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_three_epochs_of_forty_minibatches(stages: int, optimizer: str, tmp_path: Path) -> None:
    wanted = {"stages": stages, "model": "plain", "optimizer": optimizer, "epochs": EPOCHS_OF_40}
    emulated = run(tmp_path, 0, **wanted)
    on_ranks = run(tmp_path, stages, **wanted)
    assert_bitwise(emulated["weights"], by_reference(stages, optimizer, EPOCHS_OF_40))
    assert_bitwise(on_ranks["weights"], emulated["weights"])
    assert on_ranks["losses"] == emulated["losses"]
    assert on_ranks["scores"] == emulated["scores"]


@pytest.mark.parametrize("epochs", [[1], [2, 3], [0, 1, 0, 2]])
def test_fewer_minibatches_than_stages(epochs: list[int], tmp_path: Path) -> None:
    wanted = {"stages": 4, "model": "plain", "optimizer": "sgd", "epochs": epochs}
    emulated = run(tmp_path, 0, **wanted)
    on_ranks = run(tmp_path, 4, **wanted)
    assert_bitwise(emulated["weights"], by_reference(4, "sgd", epochs))
    assert_bitwise(on_ranks["weights"], emulated["weights"])
    assert [math.isnan(loss) for loss in on_ranks["losses"]] == [count == 0 for count in epochs]


def test_stashing_differs_from_plain_sgd() -> None:
    """The reference would be worthless if staleness changed nothing."""
    stale, plain = by_reference(4, "sgd", [10]), by_reference(1, "sgd", [10])
    assert any(not torch.equal(stale[name], plain[name]) for name in plain)


@pytest.mark.parametrize("stages", [2, 3])
def test_dropout_inside_attention_and_as_a_function(stages: int, tmp_path: Path) -> None:
    wanted = {"stages": stages, "model": "attentive", "optimizer": "adam", "epochs": [6, 6], "last": 3}
    emulated, on_ranks = run(tmp_path, 0, **wanted), run(tmp_path, stages, **wanted)
    assert_bitwise(on_ranks["weights"], emulated["weights"])
    assert on_ranks["losses"] == emulated["losses"]


@pytest.mark.parametrize("stages", [2, 4])
def test_batchnorm_dropout_in_place_and_a_short_last_minibatch(stages: int, tmp_path: Path) -> None:
    wanted = {"stages": stages, "model": "rich", "optimizer": "sgd", "epochs": [9, 9], "last": 3}
    emulated, on_ranks = run(tmp_path, 0, **wanted), run(tmp_path, stages, **wanted)
    assert_bitwise(on_ranks["weights"], emulated["weights"])
    assert on_ranks["losses"] == emulated["losses"]
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


def test_version_of_backward_is_version_of_forward_across_the_drain(tmp_path: Path) -> None:
    stages, epochs = 4, [7, 3, 7]
    for on_ranks in (0, stages):
        report = run(tmp_path, on_ranks, stages=stages, model="plain", optimizer="sgd", epochs=epochs)
        for count, spans in zip(epochs, report["traces"], strict=True):
            versions = {(rank, kind, k): version for rank, kind, k, version in spans}
            for stage in range(stages):
                for k in range(count):
                    # In flight before it: as many as there are stages behind this one.
                    expected = max(0, k - (stages - 1 - stage))
                    assert versions[stage, "forward", k] == expected
                    assert versions[stage, "backward", k] == expected


def test_slabs_are_those_in_flight_and_nothing_is_allocated_after_warm_up(tmp_path: Path) -> None:
    report = run(tmp_path, 4, stages=4, model="plain", optimizer="sgd", epochs=[20, 20, 20])
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
    pipeline = Pipeline(
        chains.rich_model(),
        loss=nn.CrossEntropyLoss(),
        optimizer=chains.OPTIMIZERS["sgd"],
        example=chains.example(),
        plan=3,
    )
    batches = chains.minibatches(5)
    pipeline.fit(batches)
    before, rng = pipeline.state_dict(), torch.get_rng_state()
    assert pipeline.evaluate(batches) == pipeline.evaluate(batches)
    assert_bitwise(pipeline.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), rng)


def test_evaluation_is_that_of_the_whole_model() -> None:
    pipeline = Pipeline(
        chains.rich_model(),
        loss=nn.CrossEntropyLoss(),
        optimizer=chains.OPTIMIZERS["sgd"],
        example=chains.example(),
        plan=4,
    )
    batches = chains.minibatches(6, last=2)
    pipeline.fit(batches)
    whole = chains.rich_model()
    whole.load_state_dict(pipeline.state_dict())
    whole.eval()
    hits = sum(int((whole(x).argmax(1) == y).sum()) for x, y in batches)
    assert pipeline.evaluate(batches) == pytest.approx(hits / sum(len(y) for _, y in batches), abs=1e-7)


def test_nothing_of_a_minibatch_is_left_behind() -> None:
    """As many tensors live after ten epochs as after two: no graph, activation or gradient stays."""
    pipeline = Pipeline(
        chains.rich_model(),
        loss=nn.CrossEntropyLoss(),
        optimizer=chains.OPTIMIZERS["sgd"],
        example=chains.example(),
        plan=4,
    )
    batches, living = chains.minibatches(5), []
    for _ in range(10):
        pipeline.fit(batches)
        gc.collect()
        living.append(sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()))
    assert living[9] == living[1]
