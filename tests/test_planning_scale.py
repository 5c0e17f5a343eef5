"""Profiles rescaled, and plans for other devices and networks."""

from __future__ import annotations

import dataclasses

import pytest

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.profile import LayerProfile, Profile
from pipedream_hpc.planning.scale import describe, scaled
from pipedream_hpc.planning.solver import Request
from pipedream_hpc.planning.topology import Level, Topology
from pipedream_hpc.planning.what_if import NETWORKS, what_if

LAYER = LayerProfile("a", "Linear", 1e-3, 2e-3, 800, 5000, 1600, (8, 25), "float32", update_s=1e-4)
PROFILE = Profile("net", "cpu", 8, (LAYER, dataclasses.replace(LAYER, name="b")), ((0, 1),), read_s=4e-4)


def test_what_changes_with_the_minibatch_and_what_does_not() -> None:
    found = scaled(PROFILE, minibatch=16)
    layer = found.layers[0]
    assert (found.minibatch, found.read_s) == (16, pytest.approx(8e-4))
    assert (layer.forward_s, layer.backward_s) == (pytest.approx(2e-3), pytest.approx(4e-3))
    assert (layer.output_bytes, layer.stash_bytes, layer.output_shape) == (1600, 3200, (16, 25))
    assert (layer.parameter_bytes, layer.update_s) == (5000, 1e-4)


def test_a_slower_device_takes_longer_for_everything() -> None:
    found = scaled(PROFILE, compute=1.6)
    assert found.total_s == pytest.approx(1.6 * PROFILE.total_s)
    assert found.layers[0].output_bytes == LAYER.output_bytes


def test_there_and_back() -> None:
    assert scaled(scaled(PROFILE, minibatch=32), minibatch=8) == PROFILE


def test_what_was_done_in_words() -> None:
    assert describe(PROFILE, minibatch=16, compute=1.6) == "minibatch 8 to 16, compute x1.6"
    assert describe(PROFILE, minibatch=8, compute=1.0) == ""


@pytest.mark.parametrize(("asked", "words"), [({"minibatch": 0}, "--batch"), ({"compute": float("nan")}, "--compute")])
def test_nonsense(asked: dict[str, float], words: str) -> None:
    with pytest.raises(PipedreamError, match=words):
        scaled(PROFILE, **asked)  # type: ignore[arg-type]


def test_what_if_counts_up_and_is_monotone() -> None:
    cases = what_if(PROFILE, Topology((Level("node", 6, 0.0, 2e9),), "cpu"), Request(fewer=True))
    assert sorted({case.devices for case in cases}) == [1, 2, 4, 6]
    assert sorted({case.bandwidth for case in cases}) == sorted([*NETWORKS, 2e9])
    seconds = {(case.devices, case.bandwidth): case.plan.bottleneck_s for case in cases if case.plan}
    assert len(seconds) == len(cases)
    for (devices, bandwidth), bottleneck_s in seconds.items():
        for (more, faster), other_s in seconds.items():
            if more >= devices and faster >= bandwidth:
                assert other_s <= bottleneck_s * (1 + 1e-9)


def test_what_if_says_why_there_is_no_plan() -> None:
    cases = what_if(PROFILE, Topology((Level("node", 4, 0.0, 2e9),), "cpu"), Request(straight=True))
    assert [case.plan is None for case in cases if case.bandwidth == 2e9] == [False, False, True]
    assert "4 stages were asked for" in cases[-1].why_not
