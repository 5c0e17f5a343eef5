"""Cut points: the modules with which the user lets stages begin, as layers of the captured model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from torch import nn

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.model.capture import is_leaf
from pipedream_hpc.model.graph import Call, LayerGraph, Scope


def first_layers(graph: LayerGraph, cut_points: Sequence[str]) -> list[int]:
    """Return the number of the layer that each of the named modules begins with, in the order given.

    A module that is called more than once begins with its first call.

    Args:
        graph: the captured model.
        cut_points: qualified names of modules, in the order in which the forward calls them.

    Raises:
        PipedreamError: no boundary can lie before one of them, or a stage would be empty.
    """
    found: list[int] = []
    for position, name in enumerate(cut_points):
        number = _first_layer(graph, name)
        if number == 0:
            raise PipedreamError(
                f"cut point '{name}' begins with the first layer of the model, so that no layer is left for the stage "
                "before it: leave it out"
            )
        if found and number == found[-1]:
            raise PipedreamError(
                f"cut points '{cut_points[position - 1]}' and '{name}' both begin with layer "
                f"'{graph.layers[number].name}', so that no layer is left for the stage between them: leave one out"
            )
        if found and number < found[-1]:
            raise PipedreamError(
                f"cut point '{name}' comes before '{cut_points[position - 1]}' in the forward: give cut points in the "
                "order of the forward"
            )
        found.append(number)
    return found


def _first_layer(graph: LayerGraph, name: str) -> int:
    modules = dict(graph.module.named_modules(remove_duplicate=False))
    if not name or name not in modules:
        near = ", ".join(map(repr, get_close_matches(name, list(modules)[1:], n=3)))
        known = ", ".join(repr(each) for each in list(modules)[1:4]) + ", ..."
        hint = f"near are {near}" if near else f"its modules are {known}"
        raise PipedreamError(f"the model has no module '{name}' to cut at: {hint}")
    item = next((each for each in _items(graph.training.root) if each.module is modules[name]), None)
    if item is None:
        raise PipedreamError(_why_not_seen(graph, name, modules[name]))
    calls = {call.number: call for call in ([item] if isinstance(item, Call) else item.calls())}
    if not calls:
        raise PipedreamError(
            f"no stage can begin with module '{name}': it depends on the model's arguments alone, and every stage "
            "that needs it computes it: name a module after it"
        )
    begins = [number for number, layer in enumerate(graph.layers) if layer.calls[0].number in calls]
    for layer in graph.layers:
        # A function without weights may stay with the layer before; it computes the same there.
        inner = [calls[call.number] for call in layer.calls if call.number in calls]
        if layer.calls[0].number not in calls and ((inner and not begins) or any(map(_has_weights, inner))):
            part = layer.calls[0].checkpoint
            why = "whose calls share a tensor that is written in place, a state, or weights"
            if part is not None and all(call.checkpoint == part for call in layer.calls):
                why = "which torch.utils.checkpoint keeps whole, because it runs again in backward"
            raise PipedreamError(
                f"no stage can begin with module '{name}': it begins within layer '{layer.name}', {why}: name another "
                "module"
            )
    return begins[0]


def _items(scope: Scope) -> Iterator[Call | Scope]:
    """Yield everything in a scope, in the order of the forward; a scope before what is in it."""
    yield scope
    for item in scope.items:
        if isinstance(item, Scope):
            yield from _items(item)
        else:
            yield item


def _has_weights(call: Call) -> bool:
    return call.module is not None or bool(call.parameters)


def _why_not_seen(graph: LayerGraph, name: str, module: nn.Module) -> str:
    """Return a sentence that says why the recorded forward has no call of a module."""
    whole = {id(each.module): each for each in graph.training.calls if each.module is not None}
    parts = name.split(".")
    for length in range(len(parts)):
        outer = ".".join(parts[:length])
        owner = graph.module.get_submodule(outer)
        if id(owner) in whole:
            which = f"module '{outer}'" if outer else "the model itself"
            remedy = f"name '{outer}', or a module after it" if outer else "train it in one stage"
            return (
                f"no stage can begin with module '{name}': {which} is kept whole, because {_why_whole(graph, owner)}: "
                f"{remedy}"
            )
    children = [f"{name}.{each}" for each, _ in module.named_children()]
    other = f"name a module that is, such as '{children[0]}'" if children else "name a module that is"
    return f"no stage can begin with module '{name}': it is not called by the forward in training: {other}"


def _why_whole(graph: LayerGraph, module: nn.Module) -> str:
    kind = type(module).__name__
    if is_leaf(module):
        return f"modules of class {kind} always are"
    closed = {graph.module.get_submodule(name): reason for name, reason in graph.closed.items()}
    # Others of the class of a module that cannot be opened were not tried.
    alike = (reason for other, reason in closed.items() if type(other) is type(module))
    return closed.get(module) or next(alike, f"leaf_modules has its class {kind}")
