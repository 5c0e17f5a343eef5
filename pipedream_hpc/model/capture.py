"""Capture a torch model as a graph of layers.

    model ──► its own forward, recorded ──► layers ──► LayerGraph
              (training and evaluation)

The graph may be cut through any edges, as long as data flows only forward over the cut.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_leaves

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.arguments import Arguments, bind_inputs
from pipedream_hpc.model.batch_dims import BatchDims
from pipedream_hpc.model.calls import unwatched
from pipedream_hpc.model.graph import Key, LayerGraph, Modes, Notes, Recording, Value, modes_restored
from pipedream_hpc.model.layers import group_into_layers
from pipedream_hpc.model.originals import Originals
from pipedream_hpc.model.precision import Autocast, Precision
from pipedream_hpc.model.recipe import ModelFactory, ModelRecipe, build_model
from pipedream_hpc.model.record import NEED_VALUES, CannotOpenError, NeedsValuesError, is_list, record

#: Modules of torch.nn that are opened; all others of torch.nn are kept whole.
_CONTAINERS = (nn.Sequential, nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer)


def capture(
    model: nn.Module | ModelFactory,
    example_inputs: Any,
    leaf_modules: Sequence[type[nn.Module]] = (),
    precision: Precision | None = None,
    *,
    batch_dims: BatchDims | None = None,
    n_microbatches: int = 1,
) -> LayerGraph:
    """Capture `model` as a graph of layers.

    The forward runs in training and in evaluation mode, on tensors without values wherever the model allows it.
    Weights, buffers, attributes and random number generators are left unchanged.

    Args:
        model: any module; or a function without arguments that builds it. The parameters of a model given as a
            function are on the meta device until `materialize` creates those of some stages.
        example_inputs: one minibatch of inputs of the largest size that will occur: a tensor, a sequence of
            arguments, or a mapping from the argument names of forward.
        leaf_modules: module classes that are kept whole.
        precision: context of the forward passes, such as autocast, which changes the dtypes of outputs.
        batch_dims: where samples are in the inputs; the first dimension by default.
        n_microbatches: the model is captured with the first of so many microbatches of the example.

    Raises:
        PipedreamError: the model does not accept the example inputs, has sparse gradients, weights of no shape yet, or
            no module of a class in `leaf_modules`.
    """
    recipe = None
    if not isinstance(model, nn.Module) and callable(model):
        recipe = ModelRecipe(model)
        model = recipe.model
    model = build_model(model)
    _refuse(model)
    originals = Originals(model) if recipe is None else recipe.originals
    batch_dims = batch_dims or BatchDims()
    bound = bind_inputs(model, example_inputs)
    batch_dims.check(bound)
    bound, _ = batch_dims.split(bound, None, n_microbatches)[0]
    modes = Modes.of(model)
    # Autograd nodes around all that a module computes: no stage has them if it computes a part of it.
    closed = {name: "it has backward hooks" for name, module in model.named_modules() if _has_backward_hooks(module)}
    if isinstance(model, tuple(leaf_modules)):
        closed[""] = f"leaf_modules has its class {type(model).__name__}"
    classes: set[type[nn.Module]] = set()
    real, is_meta = False, any(parameter.is_meta for parameter in model.parameters())

    def keep_whole(module: nn.Module, name: str) -> bool:
        whole = name in closed or type(module) in classes
        return whole or isinstance(module, tuple(leaf_modules)) or is_leaf(module)

    with modes_restored(model):
        while True:
            try:
                training, notes = _record(model, keep_whole, modes, precision, bound, training=True, real=real)
                evaluation, others = _record(model, keep_whole, modes, precision, bound, training=False, real=real)
                break
            except CannotOpenError as error:
                whole = model.get_submodule(error.name)
                worth = not error.name or any(map(is_list, whole.modules()))
                if error.needs_values and not real and not is_meta and worth:
                    real = True
                    continue
                closed[error.name] = error.reason
                # Others of the same class are alike, and need not be tried one by one.
                kind = type(whole)
                if error.name and not kind.__module__.startswith("torch.nn"):
                    classes.add(kind)
            except NeedsValuesError as error:
                if real or is_meta:
                    raise _not_accepted(error, bound.tensors(), model) from error
                real = True
    notes.merge(others)
    layers, edges = group_into_layers(model, training, notes.stateful(), [names for _, names in notes.sharing()])
    if len(layers) == 1 and any(call.differentiates for call in training.calls):
        closed.setdefault("", "its forward takes gradients of all of it (torch.autograd.grad)")
    return LayerGraph(
        module=model,
        layers=layers,
        edges=edges,
        training=training,
        evaluation=evaluation,
        inputs=bound.on_meta(),
        batch_dims=batch_dims,
        modes=modes,
        notes=notes,
        device=_device_of(precision),
        shapes={
            mode: _Shapes(
                partial(_record, model, keep_whole, modes, precision, training=mode, watch=False),
                bound,
                recording,
                real=real,
            )
            for mode, recording in ((True, training), (False, evaluation))
        },
        originals=originals,
        closed=closed,
        recipe=recipe,
        modules=dict(model.named_modules()),
    )


def _record(
    model: nn.Module,
    keep_whole: Callable[[nn.Module, str], bool],
    modes: Modes,
    precision: Precision | None,
    bound: Arguments,
    *,
    training: bool,
    real: bool,
    partial: bool = False,
    watch: bool = True,
) -> tuple[Recording, Notes]:
    modes.set(model, training)
    bound = bound.copied() if real else bound  # the forward may write into them
    return record(
        model,
        bound.args,
        bound.kwargs,
        keep_whole,
        training=training,
        precision=precision or nullcontext,
        # In a run on a GPU, shapes are asked for with arguments that are there.
        device=next((each.device for each in bound.tensors() if each.is_cuda), _device_of(precision)),
        real=real,
        partial=partial,
        watch=watch,
    )


def _device_of(precision: Precision | None) -> torch.device:
    """Return the device that tensors without values claim to be on: autocast depends on it."""
    return torch.device(precision.kind if isinstance(precision, Autocast) else "cpu")


class _Shapes:
    """Tells the outputs of calls for any arguments; remembers what follows from the shapes of the arguments alone.

    Args:
        record: records the forward with some arguments.
        example: the arguments of the recording that was made.
        recording: that one.
        real: whether it was made with values, on which shapes may depend.
    """

    def __init__(
        self, record: Callable[..., tuple[Recording, Notes]], example: Arguments, recording: Recording, *, real: bool
    ) -> None:
        self._record, self._real = record, real
        self._known = {} if real else {_described(example.args, example.kwargs): _values(recording)}

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any], key: Key) -> Value:
        described = _described(args, kwargs)
        arguments = Arguments(tuple(args), dict(kwargs))
        with unwatched():
            if described not in self._known:
                recording, _ = self._record(arguments, real=False, partial=self._real)
                self._known[described] = _values(recording)
            values = self._known[described]
            if key[0] >= len(values):
                values = _values(self._record(arguments, real=True)[0])
        return values[key[0]][key[1]]


def _described(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what the shapes in a forward depend on."""
    return tuple(
        (leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else repr(leaf)
        for leaf in tree_leaves((tuple(args), dict(kwargs)))
    )


def _values(recording: Recording) -> list[tuple[Value, ...]]:
    return [call.values for call in recording.calls]


def _refuse(model: nn.Module) -> None:
    """Refuse a model that no stages can train."""
    if nn.modules.module._global_backward_hooks or nn.modules.module._global_backward_pre_hooks:
        raise PipedreamError(
            "torch has a backward hook for all modules (register_module_full_backward_hook or the like), which would "
            "not run for modules that are cut: register it on the modules that need it"
        )
    _refuse_wrapped(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise PipedreamError(
                f"module '{name}' has sparse gradients, which stages can neither add up nor send: create it with "
                "sparse=False"
            )
        if any(isinstance(each, UninitializedParameter) for each in module._parameters.values()):
            raise PipedreamError(
                f"module '{name}' of class {type(module).__name__} has no weights yet: run the model once on a "
                "minibatch before"
            )


def _refuse_wrapped(model: nn.Module) -> None:
    """Refuse what stands for a module, and would train it in its own way."""
    if _is_from(model, "torch._dynamo"):
        raise PipedreamError(
            "the model is compiled (torch.compile, OptimizedModule) and cannot be cut: give the module itself, and let "
            "its stages be compiled, with TrainConfig(compile_backend='inductor')"
        )
    quantized = False
    for name, module in model.named_modules():
        kind = type(module)
        what = f"module '{name}'" if name else "the model"
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise PipedreamError(
                f"{what} is wrapped in {kind.__name__}: give the module in it (.module); the plan says how many "
                "replicas stages have, such as '2-1'"
            )
        if _is_from(module, "torch.distributed.fsdp"):
            raise PipedreamError(
                f"{what} is sharded by FSDP ({kind.__name__}): give it as it is before; each rank keeps the weights of "
                "its own stages only if the model is given as a function"
            )
        if _is_from(module, "torch.export"):
            raise PipedreamError(
                f"{what} is a program of torch.export, which computes in one mode: give the module that it was made of"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise PipedreamError(
                f"{what} is TorchScript ({kind.__name__}, from torch.jit.script or trace), whose weights cannot be "
                "exchanged for other versions: give the Python module that it was made of"
            )
        quantized |= _is_from(module, "torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
        for weight, tensor in module._parameters.items():
            if tensor is not None and _is_from(tensor, "torch.distributed.tensor"):
                raise PipedreamError(
                    f"weight '{weight}' of {what} is a DTensor, sharded over devices: give the model with plain tensors"
                )
    if quantized and not any(parameter.requires_grad for parameter in model.parameters()):
        raise PipedreamError(
            f"the model ({type(model).__name__}) is quantized and has no weights to train: give it as it was before"
        )


def _is_from(value: object, *modules: str) -> bool:
    """Return whether a class of an object is defined in one of these modules, which take seconds to import."""
    return any(base.__module__.startswith(modules) for base in type(value).__mro__)


def _has_backward_hooks(module: nn.Module) -> bool:
    return bool(module._backward_hooks or module._backward_pre_hooks)


def is_leaf(module: nn.Module) -> bool:
    """Return whether a module is kept whole because of its class."""
    if isinstance(module, _CONTAINERS):
        return False
    return type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))


def _not_accepted(error: NeedsValuesError, tensors: Sequence[torch.Tensor], model: nn.Module) -> PipedreamError:
    hint = ""
    if any(parameter.is_meta for parameter in model.parameters()):
        if isinstance(error.__cause__, NEED_VALUES):
            return PipedreamError(
                f"a model given as a function is captured without values, but {_place(error.__cause__, model)} needs "
                "them: pass the built model"
            )
        hint = "; a model given as a function is captured without values: if it needs them, pass the built model"
    shapes = " and ".join(f"{tuple(x.shape)} and dtype {str(x.dtype).removeprefix('torch.')}" for x in tensors)
    return PipedreamError(f"the model does not accept example_inputs of shape {shapes}: {error.reason}{hint}")


def _place(error: BaseException, model: nn.Module) -> str:
    """Return where in the user's code a forward failed: the module, and the line."""
    names = {id(module): name for name, module in model.named_modules()}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    owners = (names.get(id(frame.f_locals.get("self")), "") for frame in reversed(frames))
    name = next(filter(None, owners), "")
    foreign = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    lines = [each.line for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith(foreign)]
    what = lines[-1] if lines and lines[-1] else str(error).partition("\n")[0]
    return f"`{what}` in module '{name}'" if name else f"`{what}` in its forward"
