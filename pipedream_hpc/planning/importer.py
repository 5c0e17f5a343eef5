"""Import layer profiles in the text format of PipeDream's reference code.

A file has one line per node, then one line per edge, which begins with a tab::

    node2 -- Conv2d(3, 64, ...) -- forward_compute_time=22.3, backward_compute_time=24.6,
        activation_size=1644167168.000, parameter_size=7168.000          (all on one line)
    <TAB>node1 -- node2

Times are in milliseconds and sizes in bytes, both per minibatch; a node with several outputs has
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
    """Nodes by id, in the order of the file, and the consumers of each."""

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

    The format does not record what autograd keeps; each layer's output bytes are used instead.

    Input nodes, whose time is data loading, and `__getitem__` nodes without a consumer are omitted.

    Args:
        minibatch: samples per minibatch of the measurement, which the format does not record.

    Raises:
        PipedreamError: the file cannot be read or parsed; the message names the file and the line.
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
        raise PipedreamError(f"{path}: has no layers: give a profile in PipeDream's published text format")
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
            raise PipedreamError(f"{path}: line {number}: node '{node['id']}' is defined twice")
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
    """Return the nodes in topological order, and in order of their numbers where that leaves a choice."""
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
        ready = sorted(sorter.get_ready(), key=_sort_key)
        order.extend(ready)
        sorter.done(*ready)
    return order


def _sort_key(node: str) -> tuple[int, str]:
    digits = re.sub(r"\D", "", node)
    return (int(digits) if digits else -1, node)
