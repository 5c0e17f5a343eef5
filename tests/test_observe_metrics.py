"""Metrics of traces that are drawn in each test, one column per millisecond."""

from __future__ import annotations

from dataclasses import replace

import pictures
import pytest

from pipedream_hpc.observe.metrics import bubble, minibatch_s, split
from pipedream_hpc.schedule.trace import Trace


def test_where_the_time_of_each_rank_went() -> None:
    first, last = split(
        pictures.trace(
            """
            rank 0  F0 S0 F1 S1 R0 R0 B0 B0 U  B1 B1 U
            rank 1  .  .  F0 B0 B0 U  F1 B1 B1 U  .  .
            """
        )
    )
    ms = {kind: round(seconds * 1e3) for kind, seconds in first.seconds.items()}
    assert ms == {
        "forward": 2, "backward": 4, "backward-input": 0, "backward-weight": 0, "recv": 2, "send": 2,
        "reduce-gradients": 0, "all-reduce-grad-norm": 0, "optimizer-step": 2, "idle": 0,
    }  # fmt: skip
    assert (last.rank, last.stages) == (1, (1,))
    # Rank 1 is idle before its first microbatch arrives and after its last one has left.
    assert last.seconds["idle"] == pytest.approx(4e-3)
    assert last.span_s == pytest.approx(12e-3)
    assert (first.busy, last.busy) == (pytest.approx(8 / 12), pytest.approx(8 / 12))
    assert bubble([first, last]) == pytest.approx(1 / 3)


def test_waiting_for_the_gradient_norm_is_no_work() -> None:
    (only,) = split(pictures.trace("rank 0  F0 B0 B0 A G G G U"))
    assert only.seconds["all-reduce-grad-norm"] == pytest.approx(3e-3)
    assert only.busy == pytest.approx(5 / 8)


def test_a_backward_in_two_parts_is_one_backward() -> None:
    (only,) = split(pictures.trace("rank 0  F0 B0 B0 B0 F1 I1 W1 W1 U"))
    assert only.backward_s == pytest.approx(3e-3)
    assert only.seconds["backward-weight"] == pytest.approx(2e-3)
    assert only.busy == pytest.approx(1)


def test_times_per_minibatch_are_medians() -> None:
    (only,) = split(pictures.trace("rank 0  F0 B0 B0 F1 B1 B1 F2 F2 F2 F2 B2 B2 B2"))
    assert (only.forward_s, only.backward_s) == (pytest.approx(1e-3), pytest.approx(2e-3))


def test_seconds_per_minibatch_leave_start_up_and_drain_out() -> None:
    # Every 3 ms while forwards and backwards take turns, every 1 ms at the end.
    picture = "rank 0  F0 F1 . . . B0 F2 . B1 F3 . B2 F4 . B3 F5 . B4 F6 . B5 F7 . B6 B7 B8\nrank 1  ." + " ." * 25
    assert minibatch_s(pictures.trace(picture)) == pytest.approx(3e-3)


def test_replicas_that_finish_together_are_counted_together() -> None:
    # Two replicas, 4 ms each per minibatch: one minibatch every 2 ms, though ends come in pairs.
    picture = """
        rank 0  F0 B0 B0 B0 F2 B2 B2 B2 F4 B4 B4 B4 F6 B6 B6 B6 F8 B8 B8 B8
        rank 1  F1 B1 B1 B1 F3 B3 B3 B3 F5 B5 B5 B5 F7 B7 B7 B7 F9 B9 B9 B9
        """
    assert minibatch_s(pictures.trace(picture, layout=((0, 1),))) == pytest.approx(2e-3)


def test_microbatches_make_up_minibatches() -> None:
    # Two per minibatch, with one flush.
    trace = pictures.trace("rank 0  F0 F1 . B0 B1 U F2 F3 . B2 B3 U F4 F5 . B4 B5 U F6 F7 . B6 B7 U")
    assert minibatch_s(replace(trace, n_microbatches=2)) == pytest.approx(6e-3)


def test_a_single_minibatch_takes_what_it_took() -> None:
    assert minibatch_s(pictures.trace("rank 0  F0 F0 B0 B0 B0 U")) == pytest.approx(6e-3)


def test_an_empty_trace_has_no_times() -> None:
    empty = Trace("measured", ((0,), (1,)), 0, ())
    assert minibatch_s(empty) == 0
    assert [each.busy for each in split(empty)] == [0, 0]
