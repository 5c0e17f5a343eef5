"""Running statistics of BatchNorm layers, averaged over the replicas of a stage."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pipedream_hpc.runtime.comm.allreduce import LocalGroup
from pipedream_hpc.runtime.weights.batchnorm import RunningStats, keep_running_stats


def module() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))


def tracked(module: nn.Module) -> list[torch.Tensor]:
    """Return the buffers of the layers that track running statistics."""
    layers = [each for each in module.modules() if getattr(each, "track_running_stats", False)]
    return [buffer for layer in layers for buffer in layer.buffers()]


def shared(modules: list[nn.Module]) -> list[RunningStats]:
    group = LocalGroup()
    stats = [RunningStats(tracked(each)) for each in modules]
    for each in stats:
        each.share(group.join(each.buckets), len(modules))
    return stats


def average(stats: list[RunningStats]) -> None:
    for each in stats:
        each.start_average()
    for each in stats:
        each.finish_average()


def test_means_are_averaged_and_counters_are_added_up() -> None:
    """epoch          1    2        minibatches of replica 0, then of replica 1
    replica 0       1    2
    replica 1       3    0        a replica may have none
    counter         4    6
    """
    first, second = module(), module()
    stats = shared([first, second])
    total = 0
    for counts in ((1, 3), (2, 0)):
        for each, count in zip((first, second), counts, strict=True):
            for _ in range(count):
                each(torch.randn(4, 3))
        mean = (first[1].running_mean + second[1].running_mean) / 2
        average(stats)
        total += sum(counts)
        for each in (first, second):
            torch.testing.assert_close(each[1].running_mean, mean)
            assert each[1].num_batches_tracked == total
        assert torch.equal(first[1].running_var, second[1].running_var)


def test_restored_counters_are_the_new_baseline() -> None:
    first, second = module(), module()
    stats = shared([first, second])
    for each, own in zip((first, second), stats, strict=True):
        each[1].num_batches_tracked.fill_(10)  # from a checkpoint
        own.set_baseline()
        each(torch.randn(4, 3))
    average(stats)
    assert first[1].num_batches_tracked == second[1].num_batches_tracked == 12


def test_a_single_replica_and_a_stage_without_statistics() -> None:
    alone = module()
    alone(torch.randn(4, 3))
    before = copy.deepcopy(alone.state_dict())
    average([RunningStats(tracked(alone))])
    assert all(torch.equal(value, before[name]) for name, value in alone.state_dict().items())
    assert RunningStats(tracked(nn.Linear(2, 2))).buckets == []


@pytest.mark.parametrize("error", [False, True])
def test_a_repeated_forward_changes_no_statistics(error: bool) -> None:
    layer = nn.BatchNorm1d(2)
    before, buffers = copy.deepcopy(layer.state_dict()), dict(layer.named_buffers())
    try:
        with keep_running_stats([layer]):
            layer(torch.randn(4, 2))
            if error:
                raise RuntimeError
    except RuntimeError:
        assert error
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(buffer is buffers[name] for name, buffer in layer.named_buffers()), "autograd may have saved them"
