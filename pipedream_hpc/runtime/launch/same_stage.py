"""Check a stage by itself, where no rank has room for the whole model.

The stage runs on random tensors in place of what earlier stages send, forward and, in training, backward, as it does in
training, where modules run whole; and once more call by call. Both must compute the same, and every call must put out
what was recorded when the model was captured. Everything is restored afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.arguments import Arguments
from pipedream_hpc.model.graph import Call, Value
from pipedream_hpc.model.partition import Partition
from pipedream_hpc.model.precision import Precision
from pipedream_hpc.model.randomness import seeding
from pipedream_hpc.model.rerun import Step
from pipedream_hpc.model.stage_module import StageModule, writable
from pipedream_hpc.model.structure import output_tensors
from pipedream_hpc.runtime.launch.same_program import Reseed, Results, difference, run_restored, seed_gradients

#: Functions that return memory without values, which a later call writes.
_EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


def check_stage(
    partition: Partition,
    index: int,
    stage: StageModule,
    arguments: Arguments,
    *,
    seed: int,
    precision: Precision | None,
    device: torch.device,
) -> str:
    """Compare a stage with its calls made one by one, and with what was recorded of them.

    Args:
        partition: the model in stages.
        index: number of the stage.
        stage: the stage's module, with its weights on `device`; the modules of other stages need none.
        arguments: arguments of the model, with values, on `device`.
        seed: seed of the random numbers.
        precision: context of the forwards.
        device: what the stage computes on.

    Returns:
        why it could not be checked; empty if it was.

    Raises:
        PipedreamError: they differ: it names the first difference.
    """
    for training in (True, False):
        inputs = [value for _, value in _in_mode(partition, stage, training)]
        boundary = [_random(value, number, device) for number, value in enumerate(inputs)]
        run = partial(_results, partition, arguments, inputs, boundary, training, seed, precision)
        problems: list[str] = []
        try:
            with partition.graph.closing():
                opened = partition.stage_module(index, whole=False)
                opened.move_tensors(device)
                opened.watch_calls(partial(_compare_with_recording, problems, training))
                expected = run(opened)
        except PipedreamError:
            raise
        except Exception as error:  # the user's code may not bear random values
            return f"stage {index} cannot run on random inputs ({str(error).strip().partition(chr(10))[0]})"
        found = run(stage)
        if not problems and training:
            problems += _unexpected_gradients(partition, index, found)
        problems += [difference(expected, found, training, ("the calls one by one", "the stage"))]
        if problem := next(filter(None, problems), ""):
            raise PipedreamError(
                f"stage {index} does not compute what its modules compute by themselves: {problem}: keep the modules "
                "whole whose forward does more than it shows, with TrainConfig(leaf_modules=[their classes])"
            )
        if not all(bool(each.isfinite().all()) for each in found.outputs):
            return f"stage {index} computes no finite numbers from random inputs"
    return ""


def _in_mode(partition: Partition, stage: StageModule, training: bool) -> list[tuple[int, Value]]:
    """Return the stage inputs as they are in training or in evaluation."""
    recording = partition.graph.training if training else partition.graph.evaluation
    values = {value.name: value for call in recording.calls for value in call.values}
    return [(source, values.get(value.name, value)) for source, value in stage.stage_inputs]


def _random(value: Value, number: int, device: torch.device) -> torch.Tensor:
    """Return a random tensor in place of a stage input: numbers between 0 and 1, zeros for integers."""
    generator = torch.Generator().manual_seed(number)
    if value.dtype is torch.bool:
        made = torch.rand(value.sent_shape, generator=generator) < 0.5
    elif value.dtype.is_floating_point or value.dtype.is_complex:
        wide = torch.promote_types(value.dtype, torch.float32)
        made = torch.rand(value.sent_shape, generator=generator, dtype=wide).to(value.dtype)
    else:  # they may be indices
        made = torch.zeros(value.sent_shape, dtype=value.dtype)
    made = made.to(device)
    return made if value.order_back is None else made.permute(value.order_back)


def _results(
    partition: Partition,
    arguments: Arguments,
    inputs: Sequence[Value],
    boundary: Sequence[torch.Tensor],
    training: bool,
    seed: int,
    precision: Precision | None,
    stage: StageModule,
) -> Results:
    """Run a stage; the gradients are those of its weights, and of its inputs under the names of these."""
    no_values = {value.name for call in partition.graph.training.calls if call.kind in _EMPTY for value in call.values}
    has_values = [value.name not in no_values for value in stage.stage_outputs]
    leaves = [
        tensor.clone().requires_grad_(value.needs_gradient and (training or stage.takes_gradients))
        for tensor, value in zip(boundary, inputs, strict=True)
    ]

    def run(reseed: Reseed) -> list[torch.Tensor]:
        stage.train(training)
        given = [
            writable(leaf) if position in stage.written_inputs and leaf.requires_grad else leaf
            for position, leaf in enumerate(leaves)
        ]
        with seeding(reseed):
            sent, returned = stage.run(arguments if stage.reads_inputs else None, given)
        outputs = [each for each, known in zip(sent, has_values, strict=True) if each is not None and known]
        outputs += output_tensors(returned)
        roots, gradients = seed_gradients(outputs)
        if training and roots:
            torch.autograd.backward(roots, gradients)
        return outputs

    results = run_restored(partition.graph, training, seed, precision or nullcontext, run)
    for value, leaf in zip(inputs, leaves, strict=True):
        if leaf.grad is not None:
            results.gradients[value.name] = leaf.grad
    return results


def _compare_with_recording(
    problems: list[str], training: bool, step: Step, outputs: Sequence[torch.Tensor | None]
) -> None:
    """Note how the outputs of a call differ from those that were recorded."""
    assert isinstance(step.item, Call)
    for value, each in zip(step.item.values, outputs, strict=True):
        if each is None:
            continue
        expected, found = (value.shape, value.dtype), (tuple(each.shape), each.dtype)
        mode = "in training" if training else "in evaluation"
        if found != expected:
            problems.append(f"{mode} '{value.name}' is {_form(*found)}, but {_form(*expected)} when it was captured")
        elif training and each.requires_grad != value.needs_gradient:
            now, before = ("depends", "did not") if each.requires_grad else ("does not depend", "did")
            problems.append(f"{mode} '{value.name}' {now} on trained weights, but {before} when it was captured")


def _form(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {shape}"


def _unexpected_gradients(partition: Partition, index: int, found: Results) -> list[str]:
    """Return which parameter has a gradient that no call of the stage passes to it."""
    graph, stage_of = partition.graph, partition.stage_of(True)
    own = [call for call in graph.training.calls if stage_of[call.number] == index]
    names = [name for call in own if any(value.needs_gradient for value in call.values) for name in call.parameters]
    expected = {partition.first_name(name) for name in [*names, *graph.training.returned_parameters]}
    expected.update(each for each in partition.sent(index) if isinstance(each, str))
    parameters = {name for name, _ in graph.module.named_parameters()}
    return [
        f"in training '{name}' gets a gradient, but no call of the stage depended on it when the model was captured"
        for name in sorted(found.gradients.keys() & parameters - expected)
    ]
