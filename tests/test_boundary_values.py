"""Whatever crosses a boundary between stages, and its gradient, trains the bits of plain torch; or is refused."""

from __future__ import annotations

import boundary_values
import pytest
import ranks
import torch
from torch import nn

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.runtime.weights.optimizer_step import StageOptimizer

ALL = [*boundary_values.KINDS, "complex weights"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", ALL)
def test_in_one_process(kind: str) -> None:
    assert same(boundary_values.piped(kind), boundary_values.plain(kind))


def test_on_two_ranks() -> None:
    """MPI sends memory: a conjugate's memory has the numbers of what it is a view of."""
    weights = ranks.call(2, boundary_values.piped_all, ALL)
    assert [kind for kind in ALL if not same(weights[kind], boundary_values.plain(kind))] == []


def test_sparse_tensors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(boundary_values.KINDS, "sparse", (lambda h: h.relu().to_sparse(), lambda v: v.to_dense()))
    words = "'0' puts out a tensor of layout torch.sparse_coo, which stage 0 cannot send to stage 1: keep both"
    with pytest.raises(PipedreamError, match=words):
        boundary_values.piped("sparse")


def test_complex_gradients_are_clipped_by_their_absolute_values() -> None:
    model, data = boundary_values.case("complex weights")
    nn.functional.cross_entropy(model(data[0][0]), data[0][1]).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    expected = nn.utils.get_total_norm(gradients)
    squares, overflow = StageOptimizer(None).squared_norm(gradients)
    assert (squares, overflow) == (pytest.approx(float(expected) ** 2), False)
