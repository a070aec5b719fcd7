"""Budgets of what is measured, in recipes: planned from a table, without a cut."""

import json
import math

import pytest

from sosp_hub.prune import main
from sosp_hub.surgery.apply import apply

pytestmark = pytest.mark.slow


def by_weights(runs):
    """A second for each number in a layer's weight: no times, which vary."""
    return {
        key: 0.0 if key == "elements" else float(math.prod(json.loads("[" + key.split("[")[-1])))
        for key in runs
    }


def test_latency_is_planned_without_a_cut_and_its_table_is_kept(recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sosp_hub.latency._timed", by_weights)
    monkeypatch.setattr("sosp_hub.latency.measure_latency", lambda *given: [1.0])
    cuts = []

    def counted(*args, **kwargs):
        cuts.append(args)
        return apply(*args, **kwargs)

    monkeypatch.setattr("sosp_hub.pipeline.measuring.apply", counted)
    assert main([str(recipe), "budget={latency_s: 0.7}", "data.num_train=32"]) == 0
    assert len(cuts) == 1
    report = json.loads((tmp_path / "out" / "sosp_report.json").read_text())
    assert report["cost"]["after"]["macs"] < report["cost"]["before"]["macs"]
    (table,) = (tmp_path / "cache" / "sosp_hub" / "latency").iterdir()
    assert sum(map(len, json.loads(table.read_text()).values())) > 10


def test_a_model_without_tokens_has_no_prefill(recipe, capsys):
    assert main([str(recipe), "budget={prefill_s: 0.7}"]) == 2
    assert "budget.prefill_s: is of language models" in capsys.readouterr().err
