"""Where a checkpoint loads without the package: every rule of another runtime, case by case."""

import copy
import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

import sosp_hub
from sosp_hub.checkpoint.format.standins import RemovedAttention
from sosp_hub.errors import HubError, SospHubError
from sosp_hub.hub.contents import check_weights
from sosp_hub.inspect import _show, main
from sosp_hub.inspection.examine import Findings, Layer, examine
from sosp_hub.inspection.readers import readers
from sosp_hub.report import listing
from sosp_hub.targets.writers.gguf import to_gguf
from sosp_hub.targets.writers.padded import filling
from tests.checkpoint import cuts

SIZES = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32,
}  # fmt: skip


def dense(family="Llama", **sizes):
    with torch.device("meta"):
        config = getattr(tf, f"{family}Config")(**{**SIZES, **sizes})
        return getattr(tf, f"{family}ForCausalLM")(config)


def narrow(model, width, layer=1):
    """Another width of one MLP."""
    mlp = model.model.layers[layer].mlp
    for name, shape in (("gate_proj", (width, 256)), ("up_proj", (width, 256))):
        setattr(mlp, name, nn.Linear(shape[1], shape[0], bias=False, device="meta"))
    mlp.down_proj = nn.Linear(width, 256, bias=False, device="meta")


def without_attention(model, layer):
    model.model.layers[layer].self_attn = RemovedAttention(layer_idx=layer)


# Sizes of the dense model, the cut, and what is said of a reader: loads, and words of the reason.
CASES = {
    "plain": ({}, None, {
        "transformers": (True, "plain config"),
        "vLLM": (None, "llama"),
        "vLLM, tensor parallel 8": (None, "divide"),
        "GGUF (llama.cpp)": (True, "--to gguf"),
        "GGUF K-quants": (True, "256"),
        "DeciLM (mlx-lm, TensorRT-LLM, vLLM, SGLang)": (True, "one width"),
        "ONNX": (None, "--to onnx"),
    }),
    "one narrow layer": ({}, lambda m: narrow(m, 480), {
        "transformers": (False, "import sosp_hub"),
        "vLLM": (False, "model.layers.1.mlp.gate_proj is 480x256, model.layers.0.mlp.gate_proj is"),
        "vLLM, tensor parallel 8": None,
        "GGUF (llama.cpp)": (True, "deci"),
        "GGUF K-quants": (False, "layers.1.mlp.down_proj have 480 values, no multiple of 256; "
                          "fill=true rounds the neurons of layer 1 up: +1."),
        "transformers, padded": (True, "one width for all layers: +1."),
        "OpenVINO": (None, "--to openvino"),
        "ExecuTorch": (False, "generates text"),
        "DeciLM (mlx-lm, TensorRT-LLM, vLLM, SGLang)": (True, "layer 1: width 480 to 512, ...: +"),
        "GGUF Q8_0, Q5_0, Q4_0": (True, "32"),
    }),
    "ragged rows": ({}, lambda m: narrow(m, 500), {
        "vLLM, tensor parallel 4": None,
        "vLLM, tensor parallel 8": (False, "model.layers.1.mlp.gate_proj has 500 neurons"),
        "GGUF Q8_0, Q5_0, Q4_0": (False, "layers.1.mlp.down_proj have 500 values"),
    }),
    "odd neurons": ({"intermediate_size": 511}, None, {
        "vLLM": (None, "llama"),
        "vLLM, tensor parallel 2": (False, "model.layers.0.mlp.gate_proj has 511 neurons"),
    }),
    "all layers narrow": ({}, lambda m: (narrow(m, 256, 0), narrow(m, 256, 1)), {
        "vLLM": (False, "model.layers.0.mlp.gate_proj is 256x256, the plain config says 512x256"),
    }),
    "six heads": ({"family": "Mistral", "num_attention_heads": 6, "num_key_value_heads": 3}, None, {
        "vLLM, tensor parallel 2": (False, "model.layers.0.self_attn has 3 KV heads"),
        "vLLM, tensor parallel 4": (False, "model.layers.0.self_attn has 6 heads"),
    }),
    "one KV head is copied": ({"num_key_value_heads": 1}, None, {
        "vLLM, tensor parallel 8": (None, "divide"),
    }),
    "two KV heads are copied": ({"num_key_value_heads": 2}, None, {
        "vLLM, tensor parallel 4": (None, "divide"),
    }),
    "attention taken out": ({}, lambda m: without_attention(m, 1), {
        "vLLM": (False, "model.layers.1.self_attn was taken out"),
        "GGUF (llama.cpp)": (True, "deci"),
    }),
    "first attention taken out": ({}, lambda m: without_attention(m, 0), {
        "GGUF (llama.cpp)": (True, "deci"),
    }),
    "all attention taken out": ({}, lambda m: [without_attention(m, i) for i in range(2)], {
        "GGUF (llama.cpp)": (False, "attention of every layer was taken out"),
        "DeciLM (mlx-lm, TensorRT-LLM, vLLM, SGLang)": (False, "here they have none"),
        "GGUF K-quants": None,
    }),
    "qwen3 cut": ({"family": "Qwen3"}, lambda m: narrow(m, 480), {
        "DeciLM (mlx-lm, TensorRT-LLM, vLLM, SGLang)": (False, "not qwen3"),
        "GGUF (llama.cpp)": (True, "arch qwen3, zeros fill up to one width"),
    }),
    "smollm3 plain": ({"family": "SmolLM3", "pad_token_id": 0}, None, {
        "GGUF (llama.cpp)": (False, "not smollm3"),
        "GGUF by llama.cpp's script": (None, "knows its family"),
        "transformers, padded": None,
    }),
    "smollm3 cut": ({"family": "SmolLM3", "pad_token_id": 0}, lambda m: narrow(m, 480), {
        "GGUF (llama.cpp)": (False, "not smollm3"),
    }),
    "sliding window": ({"family": "Mistral", "sliding_window": 16}, lambda m: narrow(m, 480), {
        "GGUF (llama.cpp)": (False, "sliding_window 16"),
    }),
    "experts": ({"family": "Mixtral", "intermediate_size": 500, "num_local_experts": 4}, None, {
        "vLLM, tensor parallel 4": (None, "divide"),
        "vLLM, tensor parallel 8": (False, "model.layers.0.mlp.experts has"),
        "GGUF Q8_0, Q5_0, Q4_0": (False, "model.layers.0.mlp.experts have 500 values"),
    }),
}  # fmt: skip


def said(model, skeleton, **given):
    options = {"library": "transformers", "num_bytes": 1000, "obstacle": None, **given}
    return {found.name: found for found in readers(model, skeleton, **options)}


@pytest.mark.parametrize("case", CASES)
def test_the_constraint_and_the_first_layer_where_it_breaks(case):
    sizes, cut, expected = CASES[case]
    skeleton = dense(**sizes)
    model = copy.deepcopy(skeleton)
    if cut:
        cut(model)
    found = said(model, skeleton if cut else None)
    for name, answer in expected.items():
        if answer is None:
            assert name not in found
        else:
            assert found[name].loads is answer[0]
            assert answer[1] in found[name].why


@pytest.mark.slow
def test_one_width_is_that_of_the_widest_layer():
    model = cuts.pruned("llama")  # layer 0 has all heads and most neurons
    own, first = (sum(p.numel() for p in m.parameters()) for m in (model, model.model.layers[0]))
    layers = sum(p.numel() for p in model.model.layers.parameters())
    assert filling(model).share == pytest.approx((3 * first - layers) / own)


@pytest.mark.parametrize(
    ("given", "name", "loads", "words"),
    [
        ({"num_bytes": 2**31}, "ONNX", False, "2 GiB"),
        ({"num_bytes": 2**31}, "torch.export", None, "--to torch-export"),
        ({"obstacle": "its config"}, "ONNX", None, "without data: its config"),
    ],
)
def test_exports(given, name, loads, words):
    found = said(dense(), None, **given)[name]
    assert found.loads is loads
    assert words in found.why


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt2", "opt"])
def test_gguf_is_promised_where_it_is_written(family, tmp_path):
    pytest.importorskip("gguf")
    model = cuts.pruned(family)
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    found = {each.name: each for each in examine(folder).readers}
    try:
        to_gguf(model, tmp_path / "small.gguf")
        written = True
    except SospHubError:
        written = False
    assert found["GGUF (llama.cpp)"].loads is written


def test_what_generates_no_text_has_no_word_on_runtimes_of_text(tmp_path):
    found = examine(sosp_hub.save_pretrained(cuts.pruned("vit"), tmp_path / "small"))
    names = [each.name for each in found.readers]
    assert names == [
        *("transformers", "transformers, padded", "torch.export", "ONNX", "OpenVINO", "ExecuTorch"),
        *("vLLM", "GGUF (llama.cpp)", "DeciLM (mlx-lm, TensorRT-LLM, vLLM, SGLang)"),
    ]
    assert [each.loads for each in found.readers[-2:]] == [False, False]


@pytest.mark.parametrize("columns", [80, 140])
@pytest.mark.parametrize("end", ["q", "self.a_projection_with_a_long_name"])
def test_a_screen_tells_layers_with_long_names_apart(columns, end, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(listing, "_WIDTH", columns)
    names = [f"bert.encoder.layer.{i}.attention.{end}" for i in range(3)]
    findings = Findings("x", "delta", "transformers", "BertModel", "62 tokens")
    findings.layers = [
        Layer(name, "", (48, 64), (64, 64), 3_120, 190_000, 12_500) for name in names
    ]
    findings.totals = {"params": 230_000, "dense_params": 268_000, "macs": 2_850_000,
                       "dense_macs": 5_050_000, "bytes": 921_000}  # fmt: skip
    _show(findings, whole=False)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    if len(end) == 1:
        shown = [line.split()[0] for line in lines if "48x64 of 64x64" in line]
        assert len(set(shown)) == 3
        for name, ending in zip(names, shown, strict=True):
            assert name.endswith(ending.lstrip("…"))
    else:  # ends of which layers are alike: whole names, on several lines
        joined = "".join(line.split()[0] for line in lines[2:])
        assert all(name in joined for name in names)


@pytest.mark.parametrize(("positions", "tokens"), [(2048, 128), (66, 64)])
def test_costs_are_those_of_a_text_of_usual_length(positions, tokens, tmp_path, capsys):
    small = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 4, "max_position_embeddings": positions}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**SIZES, **small}))
    model.save_pretrained(tmp_path)
    found = examine(tmp_path)
    assert found.sample == f"{tokens} tokens"
    weights = sum(
        p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n
    )
    attention = 2 * 2 * 32 * tokens  # scores and values, of two layers, a token
    assert found.totals["macs"] == tokens * (weights + attention)
    assert main([str(tmp_path)]) == 0
    assert f"MACs are for one sample of {tokens} tokens" in capsys.readouterr().out


@pytest.mark.slow
def test_a_quantised_folder_is_sound_and_not_for_export(tmp_path):
    """Whatever library packed its weights: inspect and push compare what is as it was."""
    folder = sosp_hub.save_pretrained(cuts.pruned("llama"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[f"{name}_packed"] = tensors.pop(name).to(torch.int8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = examine(folder)
    assert not found.faults
    assert found.packed
    for reader in found.readers:
        if reader.target or reader.name.startswith("GGUF"):
            assert not reader.loads
            assert "quantised (compressed-tensors)" in reader.why
    check_weights(folder)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HubError, match=r"model\.norm\.weight"):
        check_weights(folder)
