"""Profile, topology and plan files: reading is strict, writing is atomic, every error is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipedream_hpc.errors import PipedreamError
from pipedream_hpc.files import Document, atomic_write, load, save
from pipedream_hpc.observe import explain
from pipedream_hpc.planning.plan import Plan
from pipedream_hpc.planning.profile import LayerProfile, Profile
from pipedream_hpc.planning.solver import Request, solve
from pipedream_hpc.planning.topology import Level, Topology

LAYERS = (
    LayerProfile("conv", "Conv2d", 0.1, 0.2, 64, 32, 8, (4, 4), "float32"),
    LayerProfile("fc", "Linear", 0.1, 0.2, 16, 8, 8, (4, 1), "float32"),
)
PROFILE = Profile("net", "cpu", 4, LAYERS, ((0, 1),))
TOPOLOGY = Topology((Level("node", 2, 1e-6, 1e9),), "cpu", 1 << 30, ("a", "a"))
PLAN = solve(PROFILE, TOPOLOGY, Request(straight=True))
DOCUMENTS: dict[type[Any], Any] = {Profile: PROFILE, Topology: TOPOLOGY, Plan: PLAN}


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=lambda document: type(document).__name__)
def test_round_trip(document: Document, tmp_path: Path) -> None:
    save(document, tmp_path / "document.json")
    assert load(type(document), tmp_path / "document.json") == document


def load_error(cls: type[Any], path: Path, change: Any) -> str:
    """Return the error of `load` for a file whose JSON was modified by `change`."""
    save(DOCUMENTS[cls], path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(PipedreamError) as caught:
        load(cls, path)
    text = str(caught.value)
    assert text.startswith(f"{path}: "), "the message names the file"
    assert "\n" not in text, "one sentence"
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("cls", "change", "expected"),
    [
        (Profile, lambda d: d.update(colour=1), "unknown field 'colour': remove it"),
        (Profile, lambda d: d["layers"][1].update(colour=1), "unknown field 'layers[1].colour': remove it"),
        (Profile, lambda d: d.pop("model"), "field 'model' is missing"),
        (Profile, lambda d: d["layers"][0].update(forward_s=-1.0), "field 'layers[0].forward_s': input should be g"),
        (Profile, lambda d: d["layers"][0].update(forward_s="1"), "field 'layers[0].forward_s': input should be a v"),
        (Profile, lambda d: d["layers"][0].update(output_bytes=1.5), "field 'layers[0].output_bytes'"),
        (Profile, lambda d: d["layers"][1].update(name="conv"), "layers[1].name: 'conv' is also the name of layer 0"),
        (Profile, lambda d: d.update(edges=[[1, 0]]), "edges[0]: (1, 0) does not run forwards"),
        (Profile, lambda d: d.update(layers=[]), "a profile needs at least one layer"),
        (Profile, lambda d: d.update(version=99), "field 'version' is 99, but this pipedream reads version 2"),
        (Profile, lambda d: d.update(format="pipedream-plan"), "field 'format' should be 'pipedream-profile'"),
        (Topology, lambda d: d["levels"][0].update(bandwidth=0.0), "field 'levels[0].bandwidth'"),
        (Topology, lambda d: d["levels"][0].update(count=3), "hosts names 2 ranks but the levels multiply to 3"),
        (Plan, lambda d: d.update(version=1), "field 'version' is 1, but this pipedream reads version 2"),
        (Plan, lambda d: d["stages"][0].update(ranks=[7]), "stages: the ranks should be 0 to 1, each once"),
        (Plan, lambda d: d["stages"][0].update(in_flight=0), "field 'stages[0].in_flight'"),
        (Plan, lambda d: d.update(stages=[]), "a plan needs at least one stage"),
    ],
)  # fmt: skip
def test_each_error_is_one_sentence(cls: type[Any], change: Any, expected: str, tmp_path: Path) -> None:
    assert load_error(cls, tmp_path / "document.json", change).startswith(expected)


def test_a_missing_file_and_invalid_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PipedreamError, match=r"absent\.json: cannot be read: No such file"):
        load(Profile, tmp_path / "absent.json")
    (tmp_path / "cut.json").write_text('{"format": "pipedream-pro')
    with pytest.raises(PipedreamError, match=r"cut\.json: is not JSON"):
        load(Profile, tmp_path / "cut.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), cls=st.sampled_from(list(DOCUMENTS)))
def test_any_value_in_any_field_is_accepted_or_refused_in_one_sentence(
    data: st.DataObject, cls: type[Any], tmp_path: Path
) -> None:
    path = tmp_path / "document.json"
    save(DOCUMENTS[cls], path)
    content = json.loads(path.read_text())
    place: Any = content
    while True:  # walk to a random field and replace it
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not (isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans())):
            place[key] = data.draw(json_values)
            break
        place = place[key]
    path.write_text(json.dumps(content))
    try:
        use(load(cls, path))
    except PipedreamError as error:
        assert "\n" not in str(error)


def use(document: Profile | Topology | Plan) -> None:
    """Use the document as the commands do."""
    if isinstance(document, Plan):
        explain.report(document)
        explain.stages_table(document)
        explain.sentences(document)
    else:
        profile, topology = (document, TOPOLOGY) if isinstance(document, Profile) else (PROFILE, document)
        use(solve(profile, topology, Request(fewer=True)))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    save(PROFILE, path)
    with pytest.raises(RuntimeError, match="power cut"), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError("power cut")
    assert load(Profile, path) == PROFILE
    assert [each.name for each in tmp_path.iterdir()] == ["profile.json"]
