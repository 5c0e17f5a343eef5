"""Import of profiles in PipeDream's published text format."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.planning.importer import import_profile


def node(number: int, kind: str, forward: object = 1.0, activation: object = 8.0, parameter: object = 4.0) -> str:
    return (
        f"node{number} -- {kind} -- forward_compute_time={forward}, backward_compute_time=2.500, "
        f"activation_size={activation}, parameter_size={parameter}"
    )


GOOD = "\n".join(
    [
        node(2, "Conv2d(3, 64, kernel_size=(3, 3))"),
        node(1, "Input", 600.0),
        node(4, "__getitem__(0)"),
        node(3, "LSTM(1024, 1024)", activation="[16.0; 8.0; 8.0]"),
        node(5, "Linear(4, 4)"),
        "\tnode1 -- node2",
        "\tnode2 -- node3",
        "\tnode3 -- node4",
        "\tnode3 -- node5",
    ]
)


def read(folder: Path, text: str):  # type: ignore[no-untyped-def]
    path = folder / "net.txt"
    path.write_text(text + "\n")
    return import_profile(path, minibatch=64)


def test_reads_nodes_and_edges(tmp_path: Path) -> None:
    profile = read(tmp_path, GOOD)
    assert profile.model == "net"
    assert profile.minibatch == 64
    # The Input node and the unused __getitem__ are omitted; the other layers are in topological order.
    assert [layer.name for layer in profile.layers] == ["node2", "node3", "node5"]
    assert profile.edges == ((0, 1), (1, 2))
    conv, lstm, _ = profile.layers
    assert (conv.forward_s, conv.backward_s) == (1e-3, 2.5e-3)
    assert conv.kind == "Conv2d(3, 64, kernel_size=(3, 3))"
    assert lstm.output_bytes == 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello", r"line 1 is neither a node .* nor an edge .*'hello'"),
        (GOOD + "\n\tnode5 -- node9", r"line 10: there is no node 'node9'"),
        (GOOD + "\n" + node(5, "ReLU"), r"line 10: node 'node5' is defined twice"),
        (GOOD + "\n\tnode5 -- node2", r"the edges form a cycle: node"),
        (node(1, "ReLU", forward="fast"), r"line 1: forward_compute_time should be a number of at least 0, not 'fast'"),
        (node(1, "ReLU", forward="-1"), r"line 1: forward_compute_time should be a number of at least 0, not '-1'"),
        (node(1, "ReLU", activation="[1; x]"), r"line 1: activation_size should be a number"),
        (node(1, "ReLU", parameter="nan"), r"line 1: parameter_size should be a number"),
        (node(1, "Input"), r"has no layers"),
    ],
)
def test_malformed_files(text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(PipedreamError, match=r"net\.txt: " + expected):
        read(tmp_path, text)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(PipedreamError, match="cannot be read"):
        import_profile(tmp_path / "absent.txt", minibatch=1)
