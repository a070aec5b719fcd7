"""Names in a stranger's delta: what only begins like a name is none."""

import pytest

from sosp_hub.checkpoint.format.schema import parse_delta
from sosp_hub.errors import CheckpointError

PLACES = {
    "modules": lambda name: {name: {"out_features": 3}},
    "attributes": lambda name: {"layers.0": {name: 3}},
    "tensors": lambda name: {name: [3, None]},
    "biases": lambda name: [name],
    "dropped": lambda name: [name],
    "replaced": lambda name: {name: {"as": "mlp"}},
}
NAMES = (
    "layer;x",
    "layer x",
    "layer\n",
    "layer/../x",
    "-layer",
    "l.-1",
    "läyer",
    "layer.",
    "a" * 2000,
)


def delta(place, name):
    base = {"class": "Net", place.replace("attributes", "modules"): PLACES[place](name)}
    versions = {"library_version": "1.0", "sosp_hub_version": "1.0"}
    return {"schema_version": 1, "library": "timm", **versions, "base": base}


@pytest.mark.parametrize("place", PLACES)
def test_a_plain_name_is_read(place):
    parse_delta(delta(place, "layer_1"))


@pytest.mark.parametrize("place", sorted(PLACES.keys() - {"attributes"}))
def test_a_name_of_a_module_may_hold_a_hyphen(place):
    parse_delta(delta(place, "block1.block1-0.proj"))


def test_a_name_of_an_attribute_holds_none():
    with pytest.raises(CheckpointError):
        parse_delta(delta("attributes", "layer-1"))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NAMES, ids=[repr(name)[:12] for name in NAMES])
def test_what_begins_like_a_name_is_refused(place, name):
    with pytest.raises(CheckpointError):
        parse_delta(delta(place, name))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["__class__", "layers.__class__", "layers.0.__dict__.x"])
def test_pythons_own_names_are_refused_at_every_depth(place, name):
    with pytest.raises(CheckpointError):
        parse_delta(delta(place, name))


@pytest.mark.parametrize("where", ["delta", "section"])
def test_keys_of_another_format_are_refused(where):
    record = delta("dropped", "layer_1")
    (record if where == "delta" else record["base"])["rotated"] = ["layer_1"]
    with pytest.raises(CheckpointError, match="rotated"):
        parse_delta(record)
