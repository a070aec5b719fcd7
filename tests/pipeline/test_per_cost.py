"""A recipe whose scores are divided by what structures cost."""

import json

import pytest
import torch
from safetensors.torch import load_file

import sosp_hub
from sosp_hub.cost import unit_costs
from sosp_hub.prune import main
from tests.compare import assert_close

KEYS = ("criterion.name=magnitude", "criterion.per=macs")


@pytest.mark.slow
def test_what_is_stored_is_divided(recipe, tmp_path):
    assert main([str(recipe), *KEYS]) == 0
    report = json.loads((tmp_path / "out" / "sosp_report.json").read_text())
    assert report["plan"]["provenance"]["criterion"]["per"] == "macs"
    divided = load_file(tmp_path / "out" / "saliency.safetensors")
    assert main([str(recipe), "--overwrite", *KEYS, "criterion.per=null"]) == 0
    report = json.loads((tmp_path / "out" / "sosp_report.json").read_text())
    assert "per" not in report["plan"]["provenance"]["criterion"]
    plain = load_file(tmp_path / "out" / "saliency.safetensors")
    dense = sosp_hub.from_pretrained(tmp_path / "out" / "dense")
    graph = sosp_hub.trace(dense, torch.randn(2, 1, 8, 8))
    costs = unit_costs(graph, "macs")
    mean = [cost for name in plain for cost in costs[name]]
    units = {name: torch.tensor(costs[name]) / (sum(mean) / len(mean)) for name in plain}
    assert_close(divided, {name: plain[name] / units[name] for name in plain}, relative=1e-5)


def test_signed_scores_are_refused_before_the_long_work(recipe, tmp_path, capsys):
    assert main([str(recipe), *KEYS, "criterion.name=grasp", "model.train={epochs: 1000}"]) == 2
    assert "these have a sign" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
