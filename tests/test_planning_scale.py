"""Scaling of profiles, and plans for other devices and networks (what-if)."""

from __future__ import annotations

import dataclasses

import pytest

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.profile import LayerProfile, Profile
from pipedream_hpc.planning.scale import describe_scaling, scale_profile
from pipedream_hpc.planning.solver import Request
from pipedream_hpc.planning.topology import Level, Topology
from pipedream_hpc.planning.what_if import NETWORKS, what_if

LAYER = LayerProfile("a", "Linear", 1e-3, 2e-3, 800, 5000, 1600, (8, 25), "float32", update_s=1e-4)
PROFILE = Profile("net", "cpu", 8, (LAYER, dataclasses.replace(LAYER, name="b")), ((0, 1),), read_s=4e-4)


def test_the_minibatch_scales_times_and_activations_but_not_parameters() -> None:
    found = scale_profile(PROFILE, minibatch=16)
    layer = found.layers[0]
    assert (found.minibatch, found.read_s) == (16, pytest.approx(8e-4))
    assert (layer.forward_s, layer.backward_s) == (pytest.approx(2e-3), pytest.approx(4e-3))
    assert (layer.output_bytes, layer.stash_bytes, layer.output_shape) == (1600, 3200, (16, 25))
    assert (layer.parameter_bytes, layer.update_s) == (5000, 1e-4)


def test_the_compute_factor_scales_all_times_and_no_bytes() -> None:
    found = scale_profile(PROFILE, compute=1.6)
    assert found.total_s == pytest.approx(1.6 * PROFILE.total_s)
    assert found.layers[0].output_bytes == LAYER.output_bytes


def test_scaling_back_restores_the_profile() -> None:
    assert scale_profile(scale_profile(PROFILE, minibatch=32), minibatch=8) == PROFILE


def test_the_scaling_is_described() -> None:
    assert describe_scaling(PROFILE, minibatch=16, compute=1.6) == "minibatch 8 to 16, compute x1.6"
    assert describe_scaling(PROFILE, minibatch=8, compute=1.0) == ""


@pytest.mark.parametrize(
    ("arguments", "message"), [({"minibatch": 0}, "--batch"), ({"compute": float("nan")}, "--compute")]
)
def test_numbers_that_are_not_positive_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(PipedreamError, match=message):
        scale_profile(PROFILE, **arguments)  # type: ignore[arg-type]


def test_more_devices_or_a_faster_network_never_make_a_plan_slower() -> None:
    cases = what_if(PROFILE, Topology((Level("node", 6, 0.0, 2e9),), "cpu"), Request(fewer=True))
    assert sorted({case.devices for case in cases}) == [1, 2, 4, 6]
    assert sorted({case.bandwidth for case in cases}) == sorted([*NETWORKS, 2e9])
    seconds = {(case.devices, case.bandwidth): case.plan.bottleneck_s for case in cases if case.plan}
    assert len(seconds) == len(cases)
    for (devices, bandwidth), bottleneck_s in seconds.items():
        for (more, faster), other_s in seconds.items():
            if more >= devices and faster >= bandwidth:
                assert other_s <= bottleneck_s * (1 + 1e-9)


def test_a_case_without_a_plan_names_the_reason() -> None:
    cases = what_if(PROFILE, Topology((Level("node", 4, 0.0, 2e9),), "cpu"), Request(straight=True))
    assert [case.plan is None for case in cases if case.bandwidth == 2e9] == [False, False, True]
    assert "cannot be cut into 4 stages" in cases[-1].why_not
