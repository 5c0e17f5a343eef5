"""Scale: a profile as it would be with another minibatch, or on a slower or faster device."""

from __future__ import annotations

import dataclasses

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.profile import LayerProfile, Profile


def scaled(profile: Profile, *, minibatch: int | None = None, compute: float = 1.0) -> Profile:
    """`profile` in proportion: a stand-in for measuring, which stays better.

    Args:
        minibatch: samples; times, activations and stashes change with it, parameters do not.
        compute: factor on all times: 1.6 for a device that takes 1.6 times as long.

    Raises:
        PipedreamError: a number is not positive.
    """
    if minibatch is not None and minibatch < 1:
        raise PipedreamError(f"--batch should be 1 or more samples, not {minibatch}")
    if not 0 < compute < float("inf"):
        raise PipedreamError(f"--compute-scale should be a positive factor, not {compute:g}")
    samples = profile.minibatch if minibatch is None else minibatch
    part = samples / profile.minibatch

    def layer(each: LayerProfile) -> LayerProfile:
        shape = each.output_shape
        return dataclasses.replace(
            each,
            forward_s=each.forward_s * part * compute,
            backward_s=each.backward_s * part * compute,
            update_s=each.update_s * compute,
            output_bytes=round(each.output_bytes * part),
            stash_bytes=round(each.stash_bytes * part),
            inner_bytes=round(each.inner_bytes * part),
            output_shape=(samples, *shape[1:]) if shape and shape[0] == profile.minibatch else shape,
        )

    return dataclasses.replace(
        profile,
        minibatch=samples,
        layers=tuple(layer(each) for each in profile.layers),
        read_s=profile.read_s * part * compute,
        beside_s=profile.beside_s * compute,
    )


def describe(profile: Profile, *, minibatch: int | None, compute: float) -> str:
    """What `scaled` does to `profile`, in a few words; empty if nothing."""
    changes = []
    if minibatch is not None and minibatch != profile.minibatch:
        changes.append(f"minibatch {profile.minibatch} to {minibatch}")
    if compute != 1.0:
        changes.append(f"compute x{compute:g}")
    return ", ".join(changes)
