"""OpenVINO and ExecuTorch: files that their own runtimes run."""

import sys

import numpy as np
import pytest
import torch

import sosp_hub
from sosp_hub.errors import CheckpointError, ModelError
from tests.checkpoint import cuts
from tests.compare import assert_close
from tests.targets.test_cached import MODELS, expected, generated

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.mark.slow
def test_openvino_generates_the_same_tokens(tmp_path):
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    model = MODELS["llama"]()
    path = sosp_hub.export(model, "openvino", tmp_path / "model.xml", cache=True)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    compiled = openvino.compile_model(path, "CPU", EXACT)
    past = {}
    for each in compiled.inputs[2:]:
        _, heads, _, size = each.get_partial_shape()
        shape = [2, heads.get_length(), 0, size.get_length()]
        past[each.any_name] = np.zeros(shape, np.float32)
    found = generated(lambda inputs: list(compiled(inputs).values()), past, 8)
    assert torch.equal(found, expected(model, 8))


@pytest.mark.slow
def test_openvino_computes_the_same(tmp_path):
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    model = cuts.pruned_timm("test_resnet")
    path = sosp_hub.export(model, "openvino", tmp_path / "model.xml")
    images = torch.randn(3, 3, 160, 160)
    (found,) = openvino.compile_model(path, "CPU", EXACT)([images.numpy()]).values()
    assert_close(torch.from_numpy(found), model(images), relative=1e-4)


def executorch():
    pytest.importorskip("executorch.exir")
    return pytest.importorskip("executorch.runtime").Runtime.get()


@pytest.mark.slow
def test_executorch_programs_have_no_cache(tmp_path):
    executorch()
    with pytest.raises(ModelError, match=r"LlamaForCausalLM.*cache=true"):
        sosp_hub.export(cuts.pruned("llama"), "executorch", tmp_path / "model.pte")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:read_binary is deprecated:DeprecationWarning")  # its own reader
def test_executorch_computes_the_same(tmp_path):
    runtime = executorch()
    model = cuts.pruned_timm("test_resnet")
    path = sosp_hub.export(model, "executorch", tmp_path / "model.pte")
    image = torch.randn(1, 3, 160, 160)
    (found,) = runtime.load_program(path).load_method("forward").execute([image])
    assert_close(found, model(image), relative=1e-4)


@pytest.mark.parametrize(
    ("name", "family", "file"),
    [("openvino", "llama", "model.xml"), ("executorch.exir", "vit", "model.pte")],
)  # ExecuTorch takes no model that generates text
def test_a_missing_package_is_named(name, family, file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    package = name.partition(".")[0]
    with pytest.raises(CheckpointError, match=f"pip install {package}"):
        sosp_hub.export(cuts.pruned(family), package, tmp_path / file)
    assert not list(tmp_path.iterdir())
