"""Import layer profiles in the text format published with PipeDream's reference code.

One line per node, then one line per edge, which begins with a tab::

    node2 -- Conv2d(3, 64, ...) -- forward_compute_time=22.3, backward_compute_time=24.6,
        activation_size=1644167168.000, parameter_size=7168.000          (all on one line)
    <TAB>node1 -- node2

Times are milliseconds and sizes bytes, both of a whole minibatch; a node with several outputs has
`activation_size=[a; b; c]`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.profile import LayerProfile, Profile

_NODE = re.compile(
    r"(?P<id>\S+) -- (?P<kind>.+) -- "
    r"forward_compute_time=(?P<forward>[^,]+), backward_compute_time=(?P<backward>[^,]+), "
    r"activation_size=(?P<activation>\[[^\]]*\]|[^,]+), parameter_size=(?P<parameter>[^,]+)"
)
_EDGE = re.compile(r"\t(?P<producer>\S+) -- (?P<consumer>\S+)")


@dataclass
class _Graph:
    """Nodes by id, in the order of the file, and what each feeds."""

    layers: dict[str, LayerProfile] = field(default_factory=dict)
    consumers: dict[str, list[str]] = field(default_factory=dict)

    def remove(self, node: str) -> None:
        del self.layers[node]
        del self.consumers[node]
        for consumers in self.consumers.values():
            if node in consumers:
                consumers.remove(node)


def import_profile(path: str | Path, *, minibatch: int) -> Profile:
    """Read a published profile.

    The format does not say what autograd keeps: a layer's output stands for it.

    The Input nodes, whose time is that of loading data, are left out, and so are `__getitem__`
    nodes whose value nobody uses.

    Args:
        minibatch: samples per minibatch it was measured with; the format does not say.

    Raises:
        PipedreamError: names the file and the line that cannot be understood.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PipedreamError(f"{path}: cannot be read: {error}") from None
    graph = _parse(path, text)
    for node in [n for n, layer in graph.layers.items() if re.fullmatch(r"Input\d*", layer.kind)]:
        graph.remove(node)
    for node in [n for n, layer in graph.layers.items() if layer.kind.startswith("__getitem__")]:
        if not graph.consumers[node]:
            graph.remove(node)
    order = _in_order(path, graph)
    index = {node: position for position, node in enumerate(order)}
    edges = sorted((index[node], index[consumer]) for node in order for consumer in graph.consumers[node])
    if not order:
        raise PipedreamError(f"{path}: has no layers: is it a profile in the published text format?")
    return Profile(
        model=path.stem,
        device="imported",
        minibatch=minibatch,
        layers=tuple(graph.layers[node] for node in order),
        edges=tuple(edges),
    )


def _parse(path: Path, text: str) -> _Graph:
    graph = _Graph()
    edges: list[tuple[int, str, str]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        if edge := _EDGE.fullmatch(line.rstrip()):
            edges.append((number, edge["producer"], edge["consumer"]))
            continue
        node = _NODE.fullmatch(line.strip())
        if node is None:
            raise PipedreamError(
                f"{path}: line {number} is neither a node ('id -- description -- forward_compute_time=..., "
                f"...') nor an edge (a tab, then 'id -- id'): {line.strip()[:60]!r}"
            )
        if node["id"] in graph.layers:
            raise PipedreamError(f"{path}: line {number}: node '{node['id']}' is defined a second time")
        activation = node["activation"].strip("[]").split(";")
        output_bytes = round(sum(_number(path, number, "activation_size", part) for part in activation))
        graph.layers[node["id"]] = LayerProfile(
            name=node["id"],
            kind=node["kind"],
            forward_s=_number(path, number, "forward_compute_time", node["forward"]) / 1e3,
            backward_s=_number(path, number, "backward_compute_time", node["backward"]) / 1e3,
            output_bytes=output_bytes,
            parameter_bytes=round(_number(path, number, "parameter_size", node["parameter"])),
            stash_bytes=output_bytes,
        )
        graph.consumers[node["id"]] = []
    for number, producer, consumer in edges:
        for end in (producer, consumer):
            if end not in graph.layers:
                raise PipedreamError(f"{path}: line {number}: there is no node '{end}'")
        graph.consumers[producer].append(consumer)
    return graph


def _number(path: Path, line: int, field_name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise PipedreamError(
            f"{path}: line {line}: {field_name} should be a number of at least 0, not {text.strip()!r}"
        )
    return value


def _in_order(path: Path, graph: _Graph) -> list[str]:
    """Topological order; among nodes that could come next, the order of their numbers."""
    sorter: TopologicalSorter[str] = TopologicalSorter(dict.fromkeys(graph.layers, ()))
    for node, consumers in graph.consumers.items():
        for consumer in consumers:
            sorter.add(consumer, node)
    order: list[str] = []
    try:
        sorter.prepare()
    except CycleError as error:
        raise PipedreamError(f"{path}: the edges form a cycle: {' -> '.join(error.args[1])}") from None
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=_numbered)
        order.extend(ready)
        sorter.done(*ready)
    return order


def _numbered(node: str) -> tuple[int, str]:
    digits = re.sub(r"\D", "", node)
    return (int(digits) if digits else -1, node)
