"""Names of a stranger's files are shown by ``inspect``, and a terminal obeys none of them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import sosp_hub
from sosp_hub.inspect import main
from tests.checkpoint import cuts

NAME = "[/red]\x1b]0;owned\x07[link=https://x.y]"


@pytest.fixture
def folder(tmp_path):
    return sosp_hub.save_pretrained(cuts.pruned("llama"), tmp_path / "small")


@pytest.mark.slow
def test_a_tensor_that_is_left_over_is_named(folder, capsys):
    file = folder / "model.safetensors"
    save_file({**load_file(file), NAME: torch.zeros(2)}, file, metadata={"format": "pt"})
    assert main([str(folder)]) == 1
    shown = capsys.readouterr().out
    assert "[/red]" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown


@pytest.mark.parametrize("key", ["architectures", "model_type"])
def test_a_config_of_strange_words_is_no_surprise(key, folder, capsys):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, key: [NAME] if key == "architectures" else NAME}))
    assert main([str(folder)]) in (0, 1, 2)
    assert "\x1b" not in "".join(capsys.readouterr())
