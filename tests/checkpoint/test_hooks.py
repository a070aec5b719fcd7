"""The hooks: cheap, lazy, and without effect on models that are not pruned."""

import subprocess
import sys

import pytest
import timm
import torch
import transformers

import sosp_hub
from sosp_hub.checkpoint.transformers import load as adapter
from sosp_hub.errors import CheckpointError
from tests.checkpoint import cuts
from tests.checkpoint.test_families import output
from tests.compare import assert_close

pytestmark = pytest.mark.slow

TOKENS = {"input_ids": torch.arange(3, 13).reshape(2, 5)}


def said(code):
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    return answer.stdout.split()


def test_import_loads_no_library():
    code = (
        "import sys; before = set(sys.modules); import sosp_hub; new = set(sys.modules) - before;"
        "print(*sorted(n for n in new if n.partition('.')[0] not in sys.stdlib_module_names))"
    )
    assert said(code) == ["sosp_hub", "sosp_hub.checkpoint", "sosp_hub.checkpoint.hooks"]


@pytest.mark.parametrize(
    "order",
    [
        "from transformers import modeling_utils; import timm; import sosp_hub",
        "import sosp_hub.checkpoint.transformers.load, sosp_hub.checkpoint.timm.load, timm",
    ],
)
def test_hooks_in_any_order(order):
    code = (
        f"{order}; from transformers.modeling_utils import PreTrainedModel;"
        "print(PreTrainedModel.post_init.__module__.startswith('sosp_hub'));"
        "print(timm.is_model('sosp_hub_pruned'), timm.is_model('cifar_resnet20'))"
    )
    assert said(code) == ["True", "True", "True"]


def test_disable_leaves_both_libraries_as_they_come(tmp_path):
    folder = sosp_hub.save_pretrained(cuts.pruned("llama"), tmp_path / "small")
    small = sosp_hub.save_pretrained(cuts.pruned_timm("test_resnet"), tmp_path / "timm")
    sosp_hub.disable()
    try:
        assert transformers.PreTrainedModel.post_init.__module__ == "transformers.modeling_utils"
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            transformers.AutoModelForCausalLM.from_pretrained(folder)
        with pytest.raises(RuntimeError, match="sosp_hub_pruned"):
            timm.create_model(f"local-dir:{small}")
    finally:
        sosp_hub.enable()
    sosp_hub.enable()  # harmless
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert timm.create_model(f"local-dir:{small}")


def test_unpruned_models_load_as_before(tmp_path):
    cls, config, _ = cuts.FAMILIES["llama"]
    model = cls(config).eval()
    model.save_pretrained(tmp_path)
    hooked = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    sosp_hub.disable()
    try:
        stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        ignoring = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path, num_labels=5, ignore_mismatched_sizes=True
        )
    finally:
        sosp_hub.enable()
    assert_close(hooked.state_dict(), stock.state_dict(), relative=0)
    assert_close(output(hooked, TOKENS), output(stock, TOKENS), relative=0)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True
    )
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in ignoring.state_dict().items()
    }


def test_delta_of_another_library_is_refused():
    record = {
        "schema_version": 1, "sosp_hub_version": "0.1.0", "library": "timm",
        "library_version": "1.0.31", "base": {"class": "LlamaModel"},
    }  # fmt: skip
    config = transformers.LlamaConfig(**cuts.GQA, sosp_hub=record)
    with pytest.raises(CheckpointError, match="library: 'timm'"):
        transformers.LlamaModel(config)
    assert adapter.plain_config(config).to_dict().get("sosp_hub") is None
