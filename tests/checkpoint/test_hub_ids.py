"""Models by hub id, through the real clients, from a hub on this machine."""

import json
import os
import subprocess
import sys

import pytest

import sosp_hub
from tests.checkpoint import cuts
from tests.hub.loopback import Hub

pytestmark = pytest.mark.slow

CODE = """
import json, sys
import sosp_hub, timm, torch, transformers
from sosp_hub import inspect
from sosp_hub.errors import HubError

def num(model):
    return sum(parameter.numel() for parameter in model.parameters())

print(json.dumps({
    "from_pretrained": num(sosp_hub.from_pretrained("me/llama")),
    "AutoModelForCausalLM": num(transformers.AutoModelForCausalLM.from_pretrained("me/llama")),
    "from_pretrained timm": num(sosp_hub.from_pretrained("me/resnet")),
    "create_model": num(timm.create_model("hf-hub:me/resnet", pretrained=True)),
    "from_pretrained shards": num(sosp_hub.from_pretrained("me/shards")),
    "create_model shards": num(timm.create_model("hf-hub:me/shards", pretrained=True)),
}))
inspect.main(["me/llama", "--json"])
try:
    sosp_hub.from_pretrained("me/none")
except HubError as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    models = {"llama": cuts.pruned("llama"), "resnet": cuts.pruned_timm("test_resnet")}
    with Hub(root / "store") as hub:
        for name, model in {**models, "shards": models["resnet"]}.items():
            size = "100KB" if name == "shards" else "5GB"
            folder = sosp_hub.save_pretrained(model, root / name, max_shard_size=size)
            assert (folder / "model.safetensors").is_file() == (name != "shards")
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
            hub.add_repo(f"me/{name}", files=files)
        environment = os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(root / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        answer = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CODE],
            capture_output=True, text=True, check=True, env=environment,
        )  # fmt: skip
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    decoder, text, found = json.JSONDecoder(), answer.stdout, []
    while text := text.strip():
        record, end = decoder.raw_decode(text)
        found.append(record)
        text = text[end:]
    return sizes, *found


def test_every_loader_takes_a_hub_id(answers):
    sizes, loaded, _, _ = answers
    assert loaded == {
        "from_pretrained": sizes["llama"],
        "AutoModelForCausalLM": sizes["llama"],
        "from_pretrained timm": sizes["resnet"],
        "create_model": sizes["resnet"],
        "from_pretrained shards": sizes["resnet"],
        "create_model shards": sizes["resnet"],
    }


def test_inspect_takes_a_hub_id(answers):
    sizes, _, found, _ = answers
    assert found["faults"] == []
    assert found["totals"]["params"] == sizes["llama"]
    assert found["totals"]["bytes"] == 4 * sizes["llama"]


def test_no_such_model_says_so(answers):
    assert "me/none" in answers[3]
