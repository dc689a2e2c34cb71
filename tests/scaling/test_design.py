"""Whatever lies where a sweep's files should, it is read or refused in a sentence."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.scaling.design import read_design
from experiments.scaling.results import read_prediction

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
READERS = {"plan.json": lambda path: read_design(path.parent), "prediction.json": read_prediction}


def refused_or_read(path):
    try:
        READERS[path.name](path)
    except ValueError as error:
        assert str(error).startswith(f"{path} holds no p") and "put back the file that the sweep wrote" in str(error)


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_in_its_place_are_refused_in_a_sentence(tmp_path_factory, name, content):
    path = tmp_path_factory.mktemp("any") / name
    path.write_bytes(content)
    refused_or_read(path)


@pytest.mark.thorough
@pytest.mark.parametrize("name", READERS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.data(), value=JSON)
def test_any_value_in_the_place_of_another_is_read_or_refused(make_sweep, tmp_path_factory, name, drawn, value):
    folder = tmp_path_factory.mktemp("sweep") / "s"
    make_sweep({"reference": {}}, kinds=("fit",)).write(folder)
    content = json.loads((folder / name).read_text())
    node, key = content, drawn.draw(st.sampled_from(sorted(content)))
    while isinstance(node[key], dict) and node[key] and drawn.draw(st.booleans()):
        node = node[key]
        key = drawn.draw(st.sampled_from(sorted(node)))
    node[key] = value
    (folder / name).write_text(json.dumps(content))
    refused_or_read(folder / name)
