"""Mutated deltas, configs and weight headers: nothing but errors of this package may come out.

`test_hostile` draws the mutations at random, ``fuzz.py`` lets coverage lead them.
"""

import atexit
import collections
import contextlib
import copy
import functools
import importlib
import json
import os
import shutil
import struct
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import sosp_hub
from sosp_hub.checkpoint.format import headers
from sosp_hub.checkpoint.format.delta import apply_section
from sosp_hub.checkpoint.format.schema import parse_delta
from sosp_hub.checkpoint.transformers import load as adapter
from sosp_hub.errors import SospHubError
from tests.checkpoint import cuts

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
ENDED: collections.Counter[str] = collections.Counter()
_MOST_MB = 256  # that one input may take


def header(entries, data=b""):
    """A weight file with this header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


# --------------------------------------------------------------------------------------- mutations

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-2, 100), st.floats(),
    st.text(max_size=12),
    st.sampled_from(["layers.0.mlp", "__class__", "", "norm.weight", "as", "identity", 10**12, -1]),
)  # fmt: skip
JUNK = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.text(max_size=8) | st.sampled_from(["layers.1", "norm", "__init__", "modules"])


def places(record, path=()):
    """Every place of a record."""
    yield path
    items = (
        record.items()
        if isinstance(record, dict)
        else enumerate(record)
        if isinstance(record, list)
        else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


@st.composite
def mutated(draw, record):
    """A record with one to three places changed, removed or renamed."""
    record = copy.deepcopy(record)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(record))))
        if not path:
            continue
        place = record
        for key in path[:-1]:
            place = place[key]
        action = draw(st.sampled_from(["set", "remove", "rename"]))
        if action == "set":
            place[path[-1]] = draw(JUNK)
        elif isinstance(place, dict):
            value = place.pop(path[-1])
            if action == "rename":
                place[draw(NAMES)] = value
    return record


@st.composite
def damaged(draw, content):
    """A file of which some bytes changed, and perhaps the end is gone."""
    content = bytearray(draw(content))
    for _ in range(draw(st.integers(0, 3))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.just(len(content)) | st.integers(0, len(content)))])


# ------------------------------------------------------------------------------------------- files


def _record():
    record = json.loads(json.dumps(adapter.delta_of(cuts.pruned("llama")).to_json()))
    record["base"]["tensors"] = {"norm.weight": [None]}
    record["base"]["replaced"] = {
        "layers.1.post_attention_layernorm": {"as": "identity", "tombstone": "weight"}
    }
    record["base"]["buffers"] = ["rotary_emb.inv_freq"]
    return record


RECORD = _record()
SKELETON = adapter.build_meta(transformers.LlamaModel, cuts.FAMILIES["llama"][1])
ENTRIES = {"a": GOOD, "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]}}
MODELS = {
    "transformers": lambda: cuts.pruned("llama"),
    "timm": lambda: cuts.pruned_timm("test_vit"),
    "torch": lambda: cuts.pruned_plain(),
}


@functools.cache
def folder(library=None):
    """A folder for the mutated file; with a pruned model of a library."""
    path = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path if library is None else sosp_hub.save_pretrained(MODELS[library](), path / "small")


@functools.cache
def config_of(library):
    """The config there, before anything mutates it."""
    return json.loads((folder(library) / headers.CONFIG).read_text())


@functools.cache
def stored_in(library):
    """The tensors of the weight file there."""
    return load_file(folder(library) / headers.WEIGHTS)


CONFIGS = st.sampled_from(sorted(MODELS)).flatmap(
    lambda library: st.tuples(
        st.just(library),
        damaged(mutated(config_of(library)).map(lambda record: json.dumps(record).encode())),
    )
)


# ----------------------------------------------------------------------------------------- targets


def target(inputs):
    """A function that takes one mutated input, as a test over many of them."""
    return lambda function: settings(
        max_examples=int(os.environ.get("SOSP_HUB_FUZZ", "150")),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )(given(inputs)(_is_modest(function)))


def _peak_mb() -> float:
    if sys.platform == "win32":  # it has none of this
        return 0.0
    resource = importlib.import_module("resource")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


@contextlib.contextmanager
def little_memory():
    """Fails where what is done inside takes much memory, even if it gives it back."""
    before = _peak_mb()
    yield
    taken_mb = _peak_mb() - before
    assert taken_mb < _MOST_MB, f"{taken_mb:.0f} MB"


def _is_modest(function):
    """The function, with only our errors let pass, and only so much memory."""

    def run(given_input):
        with little_memory():
            try:
                function(given_input)
                ENDED["accepted"] += 1
            except SospHubError as error:
                ENDED["refused"] += 1
                assert "allocate" not in str(error), error  # noqa: PT017

    return run


@target(mutated(RECORD))
def _fuzz_delta(record):
    delta = parse_delta(record)
    model = copy.deepcopy(SKELETON)
    before = sum(parameter.numel() for parameter in model.parameters())
    apply_section(model, delta.base, "base")
    assert sum(parameter.numel() for parameter in model.parameters()) <= before + 1000  # biases


@target(CONFIGS)
def _fuzz_config(given_input):
    library, content = given_input
    stored = stored_in(library)
    (folder(library) / headers.CONFIG).write_bytes(content)
    built = {"model": cuts.Plain()} if library == "torch" else {}
    loaded = sosp_hub.from_pretrained(folder(library), **built).state_dict()
    assert loaded.keys() == stored.keys()
    for name, tensor in loaded.items():  # what is accepted holds the numbers of the files
        assert torch.equal(tensor, stored[name].to(tensor.dtype)), name


@target(damaged(mutated(ENTRIES).map(lambda entries: header(entries, b"\x00" * 16))))
def _fuzz_header(content):
    (folder() / headers.WEIGHTS).write_bytes(content)
    headers.read_tensors(folder())


TARGETS = {"delta": _fuzz_delta, "config": _fuzz_config, "header": _fuzz_header}
