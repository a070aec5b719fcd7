"""What vLLM does with a plugin and with transformers' models, in its order of calls.

vLLM loads the entry points of ``vllm.general_plugins`` in each of its processes and calls them;
with ``--model-impl transformers`` it builds ``AutoModel.from_config`` on the meta device, replaces
every ``nn.Linear`` by one of its own of the same sizes, and loads the weights by name (read in
``vllm/plugins`` and ``vllm/model_executor/models/transformers`` on 2026-11-29).
"""

import json
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import sosp_hub
from sosp_hub.checkpoint.format.headers import read_tensors
from tests.checkpoint import cuts

pytestmark = pytest.mark.slow


def test_the_entry_point_turns_the_loader_on():
    (plugin,) = entry_points(group="vllm.general_plugins", name="sosp_hub")
    assert plugin.load() is sosp_hub.enable


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_process_that_calls_the_plugin_builds_the_pruned_sizes(family, tmp_path):
    sosp_hub.save_pretrained(cuts.pruned(family), tmp_path / "small")
    code = f"""
import json, sys
from importlib.metadata import entry_points
for plugin in entry_points(group="vllm.general_plugins"):
    if plugin.name == "sosp_hub":
        plugin.load()()
import torch, transformers
config = transformers.AutoConfig.from_pretrained({str(tmp_path / "small")!r})
with torch.device("meta"):
    model = transformers.AutoModel.from_config(config, dtype=torch.bfloat16)
sizes = {{
    name: [module.out_features, module.in_features]
    for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
}}
assert all(tensor.is_meta for tensor in model.parameters())
print(json.dumps(sizes))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    sizes = json.loads(done.stdout.splitlines()[-1])
    held = {
        name.removeprefix("model.").removesuffix(".weight"): list(tensor.shape)
        for name, tensor in read_tensors(tmp_path / "small").items()
        if "_proj.weight" in name
    }
    assert sizes == held
    widths = {tuple(size) for name, size in sizes.items() if name.endswith("up_proj")}
    assert len(widths) == 3  # one for each layer
