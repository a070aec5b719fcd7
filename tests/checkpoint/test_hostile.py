"""Damaged and hostile files: a typed error that names the place, before anything large happens."""

import copy
import json
import struct

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import sosp_hub
from sosp_hub.checkpoint.format import headers
from sosp_hub.checkpoint.format.delta import apply_section
from sosp_hub.checkpoint.format.schema import SCHEMA_VERSION, parse_delta
from sosp_hub.checkpoint.transformers import load as adapter
from sosp_hub.errors import CheckpointError
from sosp_hub.inspection.examine import examine
from tests.checkpoint import cuts, mutations
from tests.checkpoint.mutations import GOOD, header


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sosp_hub.save_pretrained(
        cuts.pruned("llama"), tmp_path_factory.mktemp("hostile") / "llama"
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    cls, config, _ = cuts.FAMILIES["llama"]
    cls(config).save_pretrained(folder := tmp_path_factory.mktemp("dense"))
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return json.loads((folder / "config.json").read_text())


def put(record, path, value):
    """A copy of a record with one place changed."""
    record = copy.deepcopy(record)
    *ahead, last = path
    place = record
    for key in ahead:
        place = place.setdefault(key, {})
    place[last] = value
    return record


MLP = ("base", "modules", "layers.0.mlp")
UP = ("base", "modules", "layers.0.mlp.up_proj", "out_features")
HOSTILE = {
    "unknown module": (("base", "modules", "layers.0.none"), {"in_features": 1}, "0.none"),
    "no layer": (("base", "modules", "layers.9.mlp"), {"intermediate_size": 1}, r"layers\.9\.mlp"),
    "dunder attribute": ((*MLP, "__class__"), 3, "__class__"),
    "dunder name": (("base", "modules", "layers.__init__"), {"a": 3}, "__init__"),
    "unknown attribute": ((*MLP, "nothing"), 3, "nothing"),
    "method": ((*MLP, "forward"), 3, "forward"),
    "training": ((*MLP, "training"), 1, "training"),
    "private torch state": ((*MLP, "_parameters"), 1, "_parameters"),
    "growth": (UP, 49, r"layers\.0\.mlp\.up_proj"),
    "growth of 5": (("base", "growth"), 5, "expected 1 to 4"),
    "growth of nothing": (("base", "growth"), 0, "expected 1 to 4"),
    "growth as a share": (("base", "growth"), 1.5, "whole number"),
    "10^12": (UP, 10**12, "1000000000000"),
    "10^5000": (UP, 10**5000, "bits"),
    "negative": (UP, -1, "-1"),
    "float": (UP, 3.5, "3.5"),
    "bool": (UP, True, "True"),
    "NaN": ((*MLP, "intermediate_size"), float("nan"), "nan"),
    "infinity": ((*MLP, "intermediate_size"), float("inf"), "inf"),
    "string": ((*MLP, "intermediate_size"), "38", "'38'"),
    "null": ((*MLP, "intermediate_size"), None, "None"),
    "nested": ((*MLP, "intermediate_size"), {"a": {"b": 1}}, "whole number"),
    "list for a number": ((*MLP, "intermediate_size"), [3], "intermediate_size"),
    "modules as a list": (("base", "modules"), [1], "JSON object"),
    "unknown key": (("base", "code"), "import os", "unknown key 'code'"),
    "unknown top key": (("auto_map",), {}, "unknown key 'auto_map'"),
    "unknown config key": (("base", "configs", "layers.0.self_attn"), {"nothing": 3}, "nothing"),
    "config of a module without": (("base", "configs", "norm"), {"hidden_size": 3}, "no config"),
    "delta in the delta": (("base", "configs", "layers.0.self_attn"), {"sosp_hub": 3}, "sosp_hub"),
    "tensor that is not there": (("base", "tensors", "layers.0.mlp.extra"), [3], "no such tensor"),
    "tensor of another rank": (("base", "tensors", "norm.weight"), [3, 3], "2 sizes"),
    "tensor that grows": (("base", "tensors", "norm.weight"), [33], "33"),
    "shape of nothing": (("base", "tensors", "norm.weight"), [], "1 to 8 sizes"),
    "stand-in of another kind": (("base", "replaced", "layers.0.mlp"), {"as": "eval"}, "'eval'"),
    "stand-in with a bad tombstone": (
        ("base", "replaced", "layers.0.mlp"), {"as": "mlp", "tombstone": "../../x"}, "tombstone",
    ),
    "dropped in the middle": (("base", "dropped"), ["layers.0"], "takes this module out"),
    "dropped twice": (("base", "dropped"), ["layers.2", "layers.2"], "twice"),
    "bias where none can be": (("base", "biases"), ["norm"], "cannot take a bias"),
    "buffer that is not there": (("base", "buffers"), ["norm.nothing"], "no buffer"),
    "feature channels": (("feature_channels",), ["a"], "feature_channels"),
    "no schema version": (("schema_version",), None, "schema_version"),
    "next schema version": (("schema_version",), SCHEMA_VERSION + 1, "pip install -U sosp_hub"),
    "schema version as text": (("schema_version",), "1", "schema_version"),
    "other library": (("library",), "keras", "'keras'"),
    "class that is no name": (("base", "class"), "os.system('x')", "name of a class"),
    "no base": (("base",), None, r"sosp_hub\.base"),
    "long name": (("base", "modules", "a" * 1000), {"a": 1}, "expected a name"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_delta_names_its_place(case, config):
    path, value, words = HOSTILE[case]
    record = put(config["sosp_hub"], path, value)
    plain = transformers.LlamaConfig(**{**config, "sosp_hub": record})
    with pytest.raises(CheckpointError, match=words), torch.device("meta"):
        transformers.LlamaForCausalLM(plain)


def write(tmp_path, folder, name, content):
    """A copy of a folder with one file changed."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting"),
        ("[1]", "JSON object"),
        ('{"a": 1, "a": 2}', "given twice"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "recursion"),
        (b"\xff\xfe", "config.json"),
        ('{"architectures": ["os.system"], "model_type": "llama"}', "no model class"),
        ('{"architectures": ["LlamaTokenizer"], "model_type": "llama"}', "no model class"),
        (
            '{"architecture": "sosp_hub_pruned", "pretrained_cfg": {}, '
            '"model_args": {"base_architecture": "resnet18", "delta": 3}}',
            "delta",
        ),
        ('{"architecture": "sosp_hub_pruned", "pretrained_cfg": {}}', "base_architecture"),
    ],
)
def test_damaged_config(text, words, folder, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        sosp_hub.from_pretrained(write(tmp_path, folder, "config.json", text))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("num_hidden_layers",), 10**9, "num_hidden_layers: 1000000000, the weight files hold"),
        (("num_hidden_layers",), 60, "more than half of the model is missing"),
        (("num_labels",), 10**9, "no size above 96"),
        (("num_labels",), 10**6, "no size above 96"),
        (("num_experts",), 10**9, "num_experts: 1000000000, the weight files have no size above"),
        (("head_dim",), 10**7, r"k_proj\.weight'.*\[16, 32\].*\[20000000, 32\]"),
        (("vocab_size",), 10**7, r"\[10000000, 32\]"),
        (("vocab_size",), -1, "-1"),
    ],
)
@pytest.mark.parametrize("is_pruned", [True, False])
def test_config_that_builds_more_than_the_files_hold(
    path, value, words, is_pruned, folder, dense, tmp_path
):
    folder = folder if is_pruned else dense
    record = put(json.loads((folder / "config.json").read_text()), path, value)
    write(tmp_path, folder, "config.json", json.dumps(record))
    with mutations.little_memory(), pytest.raises(CheckpointError, match=words):
        sosp_hub.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("embed_dim", 30_000, r"holds \[64\], the config builds \[30000\]"),
        ("in_chans", 10**7, r"\[64, 10000000, 16, 16\]"),
        ("img_size", 10**5, "pos_embed"),
        ("mlp_ratio", 1e6, r"mlp\.fc1"),
        ("depth", 10**9, r"model_args\.depth: 1000000000, the weight files hold"),
        ("num_classes", 10**9, "num_classes: 1000000000, the weight files have no size above"),
    ],
)
def test_timm_arguments_that_build_more_than_the_files_hold(key, value, words, tmp_path):
    folder = sosp_hub.save_pretrained(cuts.pruned_timm("test_vit"), tmp_path / "vit")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(put(config, ("model_args", key), value)))
    with mutations.little_memory(), pytest.raises(CheckpointError, match=words):
        sosp_hub.from_pretrained(folder)


@pytest.mark.parametrize(
    "key",
    [
        *("block_size", "expert_token_id", "stage_token", "layer_index"),
        *(
            "vocab_size_per_layer_input",
            "stage_out_channels",
            "share_expert_dim",
        ),  # Gemma 3n, HGNet
        *("depthwise_separable_out_channel", "embed_dim_per_stage", "layer_rope_theta"),
    ],
)
def test_large_numbers_that_count_nothing_are_no_fault(key, dense, tmp_path):
    config = json.loads((dense / "config.json").read_text()) | {key: 10**6}
    write(tmp_path, dense, "config.json", json.dumps(config))
    assert getattr(sosp_hub.from_pretrained(tmp_path).config, key) == 10**6


def test_every_loader_stops_before_it_makes_up_tensors(folder, config, tmp_path):
    write(tmp_path, folder, "config.json", json.dumps(put(config, ("head_dim",), 10**7)))
    with mutations.little_memory(), pytest.raises(CheckpointError, match="the files hold"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    write(tmp_path, folder, "config.json", json.dumps(put(config, ("num_layers",), 10**9)))
    with mutations.little_memory(), pytest.raises(CheckpointError, match="the weight files hold"):
        examine(tmp_path)


def test_no_config(folder, tmp_path):
    write(tmp_path, folder, "other", "")
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        sosp_hub.from_pretrained(tmp_path)


TWICE = b"{" + b",".join([b'"a": ' + json.dumps(GOOD).encode()] * 2) + b"}"


def test_every_dtype_of_safetensors_is_read(tmp_path):
    for dtype in ("F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E4M3", "C64", "BOOL"):
        num_bytes = 8 if dtype == "C64" else 1
        entry = {"dtype": dtype, "shape": [1], "data_offsets": [0, num_bytes]}
        (tmp_path / headers.WEIGHTS).write_bytes(header({"a": entry}, b"\x00" * num_bytes))
        expected = headers.TensorHeader(dtype, (1,), num_bytes, headers.WEIGHTS)
        assert headers.read_tensors(tmp_path) == {"a": expected}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "header too small.*cut short"),
        (b"\x00" * 8, "invalid JSON in header"),
        (struct.pack("<Q", 2**63) + b"{}", "header too large"),
        (header(b"{]"), "invalid JSON in header"),
        (header([1]), "invalid type: sequence"),
        (header({"a": GOOD}), "file not fully covered"),
        (header({"a": GOOD}, b"\x00" * 9), "file not fully covered"),
        (header({"a": {**GOOD, "shape": [10**12]}}, b"\x00" * 8), "invalid shape"),
        (header({"a": {**GOOD, "shape": [-2]}}, b"\x00" * 8), "integer `-2`"),
        (header({"a": {**GOOD, "shape": [2.0]}}, b"\x00" * 8), "floating point `2.0`"),
        (header({"a": {**GOOD, "dtype": "OBJECT"}}, b"\x00" * 8), "unknown variant `OBJECT`"),
        (header({"a": {**GOOD, "data_offsets": [8, 0]}}, b"\x00" * 8), "invalid offset"),
        # two at one place: the library names either, in the order of its hash table
        (header({"a": GOOD, "b": GOOD}, b"\x00" * 8), "invalid offset for tensor `[ab]`"),
        (header({"a": 3}, b"\x00" * 8), "integer `3`"),
        (header(TWICE, b"\x00" * 8), "given twice"),
    ],
)
def test_damaged_weights(content, words, folder, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        sosp_hub.from_pretrained(write(tmp_path, folder, "model.safetensors", content))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return sosp_hub.save_pretrained(
        cuts.pruned("llama"), tmp_path_factory.mktemp("shards") / "llama", max_shard_size="20KB"
    )


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("../../etc/passwd", "name of a weight file"),
        ("/etc/model.safetensors", "name of a weight file"),
        ("..", "name of a weight file"),
        ("model.bin", "name of a weight file"),
        (3, "name of a weight file"),
        ("gone.safetensors", "missing"),
    ],
)
def test_damaged_index(file, words, shards, tmp_path):
    index = json.loads((shards / headers.INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    with pytest.raises(CheckpointError, match=words):
        sosp_hub.from_pretrained(write(tmp_path, shards, headers.INDEX, json.dumps(index)))


def test_missing_and_truncated_shard(shards, tmp_path):
    name = sorted(path.name for path in shards.glob("model-*.safetensors"))[1]
    cut = write(tmp_path, shards, name, (shards / name).read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        sosp_hub.from_pretrained(cut)
    (cut / name).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        sosp_hub.from_pretrained(cut)


def test_weights_of_another_size(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(7)
    write(tmp_path, folder, "other", "")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        sosp_hub.from_pretrained(tmp_path)


def test_a_failed_delta_changes_nothing(config):
    """Everything is checked before the first change: the last entry of this delta is wrong."""
    record = put(config["sosp_hub"], ("base", "tensors", "norm.weight"), [33])
    model = adapter.build_meta(
        transformers.LlamaModel, transformers.LlamaConfig(**{**config, "sosp_hub": None})
    )
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        apply_section(model, parse_delta(record).base, "sosp_hub.base")
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before
    assert model.layers[0].mlp.intermediate_size == 48


@pytest.mark.slow
@pytest.mark.parametrize("target", mutations.TARGETS)
def test_mutated_files_raise_nothing_else(target):
    mutations.TARGETS[target]()
