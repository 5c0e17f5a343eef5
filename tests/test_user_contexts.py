"""b: contexts in a forward: no_grad, detach and the like."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn
from user_programs import Decorated, Detached, NoGrad, assert_trained_alike


@pytest.mark.parametrize("plan", [1, 2, 3])
@pytest.mark.parametrize("build", [NoGrad, Decorated, Detached])
def test_gradients_stop_where_the_forward_stops_them(build: Callable[[], nn.Module], plan: int) -> None:
    assert_trained_alike(build, plan)
