"""What ``inspect`` says of a target is what ``export`` does: families and targets, all with all.

Whether torch's exporter takes the code of a model is seen by writing alone; ``inspect`` says
"perhaps" there, and nowhere else.
"""

import pytest
import torch
import transformers

import sosp_hub
from sosp_hub.checkpoint.inputs import made_up_inputs
from sosp_hub.errors import SospHubError
from sosp_hub.inspection.examine import examine
from sosp_hub.recipe.targets import TARGETS
from tests.bench.families import FAMILIES
from tests.compare import assert_close

pytestmark = pytest.mark.slow

NAMES = (
    "llama_gqa", "llama_mqa", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "stablelm",
    "gpt2", "gpt_neox", "opt", "falcon_gqa", "bloom", "mixtral", "qwen3_moe", "deepseek_v3",
    "mamba", "bert", "albert", "modernbert", "distilbert", "t5_gated", "bart", "vit", "swin",
    "resnet", "convnext", "clip", "whisper", "wav2vec2",
)  # fmt: skip
NOT_FILLED_UP = ("wav2vec2", "resnet")  # their configs do not tell how inputs look
SEEN_BY_WRITING = {"torch_export", "onnx", "openvino", "executorch"}
KINDS = ("channel", "head", "kv_group", "neuron")


def small(name):
    """A tiny model of a family that kept seven of ten structures, other numbers in each layer."""
    (family,) = [each for each in FAMILIES if each.name == name]
    torch.manual_seed(0)
    model = family.build()
    graph = sosp_hub.trace(model, family.inputs())
    saliency = {
        n: torch.rand(g.size) for n, g in graph.groups.items() if g.kind in KINDS and g.exact
    }
    return sosp_hub.apply(model, graph, sosp_hub.allocate(graph, saliency, structures=0.7), "fast")


def said(folder):
    return {each.target: each for each in examine(folder).readers if each.target}


def written(folder, target, place):
    """Whether ``export`` writes the folder; what it says where not."""
    try:
        return True, sosp_hub.export(folder, target, place)
    except SospHubError as error:
        return False, str(error)


@pytest.mark.parametrize("name", NAMES)
def test_export_does_what_inspect_says(name, tmp_path):
    model = small(name)
    folder = sosp_hub.save_pretrained(model, tmp_path / "small")
    found = said(folder)
    assert {key for key, each in found.items() if each.loads is None} <= SEEN_BY_WRITING
    for target, each in found.items():
        if target not in SEEN_BY_WRITING:
            place = tmp_path / f"out-{target}{TARGETS.known()[target].suffix}"
            done, result = written(folder, target, place)
            assert done is each.loads, (target, each.why, result)
            if not done:
                assert each.why in result
    assert found["executorch"].loads is (False if model.can_generate() else None)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NOT_FILLED_UP])
def test_zeros_change_nothing_in_any_of_them(name, tmp_path):
    """A plain config builds it, plain transformers loads it, and it computes the same."""
    model = small(name)
    wide = sosp_hub.export(model, "padded", tmp_path / "wide")
    sosp_hub.disable()
    try:
        loaded = type(model).from_pretrained(wide)
    finally:
        sosp_hub.enable()
    inputs = made_up_inputs(model)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model(**inputs)[0]
        torch.manual_seed(0)
        assert_close(loaded(**inputs)[0], expected, relative=1e-5)


def test_a_family_is_not_left_out_because_transformers_lacks_it():
    assert all(hasattr(transformers, f.model) for f in FAMILIES if f.name in NAMES)
