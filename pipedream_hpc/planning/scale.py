"""Scaling: a profile adapted to another minibatch size, or to a slower or faster device."""

from __future__ import annotations

import dataclasses

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.profile import LayerProfile, Profile


def scale_profile(profile: Profile, *, minibatch: int | None = None, compute: float = 1.0) -> Profile:
    """Return `profile` scaled in proportion: an approximation for what could not be measured.

    Args:
        profile: the measured profile.
        minibatch: samples per minibatch; scales times, activations and stashes, but not parameters.
        compute: factor on all times, such as 1.6 for a device that takes 1.6 times as long.

    Raises:
        PipedreamError: a number is not positive.
    """
    if minibatch is not None and minibatch < 1:
        raise PipedreamError(f"--batch should be 1 or more samples, not {minibatch}")
    if not 0 < compute < float("inf"):
        raise PipedreamError(f"--compute-scale should be a positive factor, not {compute:g}")
    samples = profile.minibatch if minibatch is None else minibatch
    ratio = samples / profile.minibatch

    def layer(each: LayerProfile) -> LayerProfile:
        shape = each.output_shape
        return dataclasses.replace(
            each,
            forward_s=each.forward_s * ratio * compute,
            backward_s=each.backward_s * ratio * compute,
            update_s=each.update_s * compute,
            output_bytes=round(each.output_bytes * ratio),
            stash_bytes=round(each.stash_bytes * ratio),
            inner_bytes=round(each.inner_bytes * ratio),
            output_shape=(samples, *shape[1:]) if shape and shape[0] == profile.minibatch else shape,
        )

    return dataclasses.replace(
        profile,
        minibatch=samples,
        layers=tuple(layer(each) for each in profile.layers),
        read_s=profile.read_s * ratio * compute,
        overhead_s=profile.overhead_s * compute,
    )


def describe_scaling(profile: Profile, *, minibatch: int | None, compute: float) -> str:
    """Return a short description of what `scale_profile` changes; empty if nothing."""
    changes = []
    if minibatch is not None and minibatch != profile.minibatch:
        changes.append(f"minibatch {profile.minibatch} to {minibatch}")
    if compute != 1.0:
        changes.append(f"compute x{compute:g}")
    return ", ".join(changes)
