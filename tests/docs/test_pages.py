"""Every block of code on a page runs, on a small model where the page names one."""

import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
import transformers
import yaml

import sosp_hub
from sosp_hub.recipe.schema import BudgetSection
from tests.checkpoint import cuts

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page):
    return _BLOCK.findall((DOCS / page).read_text())


@pytest.fixture
def my_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sosp_hub.save_pretrained(cuts.pruned("llama"), "runs/my-model")


@pytest.mark.parametrize(
    ("page", "commands", "programs"), [("serving.md", 7, 4), ("how-to/quantise.md", 1, 2)]
)
def test_a_page_about_serving(page, commands, programs, my_model, tmp_path, capsys):
    for package in ("bitsandbytes", "gguf", "onnxruntime", "openvino", "torchao"):
        pytest.importorskip(package)
    kinds = []
    for number, (kind, text) in enumerate(blocks(page)):
        kinds.append(kind)
        if kind == "bash":
            for line in text.splitlines():
                python, _, module, *arguments = shlex.split(line)
                assert python == "python"
                command = importlib.import_module(module)
                assert command.main(arguments) == 0, capsys.readouterr().err
        elif kind == "python":
            file = tmp_path / f"block_{number}.py"
            file.write_text(text)
            runpy.run_path(str(file))
        elif kind == "yaml":
            BudgetSection.model_validate(yaml.safe_load(text)["budget"])
        else:  # commands of engines that are not here
            assert kind == "text"
    assert (kinds.count("bash"), kinds.count("python")) == (commands, programs)
    if page != "serving.md":
        return
    padded = transformers.AutoModelForCausalLM.from_pretrained("runs/my-model-padded")
    tokens = torch.arange(3, 13)[None]
    torch.testing.assert_close(padded(tokens).logits, cuts.pruned("llama")(tokens).logits)
