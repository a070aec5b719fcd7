"""A SentenceTransformer's own layout, by its documented rules.

sentence-transformers is not among the packages of the tests. What stands for it here keeps its
rules: ``modules.json`` lists the modules in order, each with the subfolder it wrote itself (that of
the first one is the folder), and the constructor reads them back. The library itself was tried by
hand, version 6.2.0: its folder loads in it, and embeds the same.
"""

import json
import sys
import types

import pytest
import torch
import transformers
from torch import nn

import sosp_hub
from sosp_hub.errors import CheckpointError


class Transformer(nn.Module):
    """The transformers model."""

    def __init__(self, folder):
        super().__init__()
        self.model = transformers.AutoModel.from_pretrained(folder)

    def forward(self, features):
        states = self.model(**features).last_hidden_state
        return {**features, "token_embeddings": states}

    def save(self, folder):
        self.model.save_pretrained(folder)


class Pooling(nn.Module):
    """The mean over the tokens."""

    def __init__(self, folder):
        super().__init__()
        self.dimension = json.loads((folder / "config.json").read_text())["dimension"]

    def forward(self, features):
        return {**features, "sentence_embedding": features["token_embeddings"].mean(1)}

    def save(self, folder):
        (folder / "config.json").write_text(json.dumps({"dimension": self.dimension}))


class SentenceTransformer(nn.Sequential):
    """Its modules, in order."""

    def __init__(self, folder, device=None):
        from pathlib import Path

        folder = Path(folder)
        listed = json.loads((folder / "modules.json").read_text())
        kinds = {"Transformer": Transformer, "Pooling": Pooling}
        super().__init__(*(kinds[each["type"]](folder / each["path"]) for each in listed))
        self.to(device)

    @property
    def config(self):  # of the first module, as in the library
        return self[0].model.config

    def save_pretrained(self, folder, create_model_card=True):
        from pathlib import Path

        listed = []
        for i, module in enumerate(self):
            path = "" if i == 0 else f"{i}_{type(module).__name__}"
            (Path(folder) / path).mkdir(parents=True, exist_ok=True)
            module.save(Path(folder) / path)
            listed.append({"idx": i, "path": path, "type": type(module).__name__})
        (Path(folder) / "modules.json").write_text(json.dumps(listed))
        if create_model_card:
            (Path(folder) / "README.md").write_text("# A card")


@pytest.fixture
def model(tmp_path, monkeypatch):
    stands = types.ModuleType("sentence_transformers")
    stands.SentenceTransformer = SentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", stands)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24,
    )  # fmt: skip
    folder = tmp_path / "dense"
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"dimension": 16}')
    listed = [{"path": "", "type": "Transformer"}, {"path": "1_Pooling", "type": "Pooling"}]
    (folder / "modules.json").write_text(json.dumps(listed))
    return SentenceTransformer(folder).eval()


def features():
    tokens = torch.arange(3, 13).reshape(2, 5)
    return ({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},)


@pytest.mark.slow
def test_its_own_folder_holds_the_cut_model(model, tmp_path):
    graph = sosp_hub.trace(model, features(), outputs="sentence_embedding")
    scores = sosp_hub.score(model, graph, [], "magnitude")
    small = sosp_hub.apply(model, graph, sosp_hub.allocate(graph, scores, macs=0.7), strict=True)
    folder = sosp_hub.save_pretrained(small, tmp_path / "small", report={"task": "x"})
    names = {path.name for path in folder.iterdir()}
    assert {"modules.json", "1_Pooling", "config.json", "model.safetensors"} <= names
    card = folder / "README.md"  # made from the report, not by the library
    assert not card.exists() or card.read_text() != "# A card"
    loaded = SentenceTransformer(folder).eval()
    embedding = loaded(*features())["sentence_embedding"]
    assert torch.equal(embedding, small(*features())["sentence_embedding"])
    inner = sosp_hub.from_pretrained(folder)  # the model alone
    assert type(inner) is transformers.BertModel
    assert sum(p.numel() for p in inner.parameters()) == sum(p.numel() for p in small.parameters())
    small.save_pretrained(tmp_path / "own")
    again = SentenceTransformer(tmp_path / "own").eval()
    assert torch.equal(again(*features())["sentence_embedding"], embedding)


def test_a_folder_that_loads_otherwise_is_not_kept(model, tmp_path, monkeypatch):
    def save(self, folder):
        (folder / "config.json").write_text(json.dumps({"dimension": self.dimension}))
        with torch.no_grad():
            next(model[0].parameters()).zero_()

    monkeypatch.setattr(Pooling, "save", save)
    with pytest.raises(CheckpointError, match="is another one when it is loaded again"):
        sosp_hub.save_pretrained(model, tmp_path / "small")
    assert not (tmp_path / "small").exists()
