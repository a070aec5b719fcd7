"""Widened models are saved and load again; what claims to be one and is not is refused."""

import json

import pytest
import timm

import sosp_hub
from sosp_hub.errors import CheckpointError
from sosp_hub.inspection.examine import examine
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.widen import why_not, widen
from tests.cases import CASES
from tests.compare import assert_close
from tests.structure.oracles import fill, run
from tests.surgery.test_apply import outputs_of

pytestmark = pytest.mark.slow

CHOSEN = [c for c in CASES if c.name in {"test_resnet", "test_vit", "llama", "gpt2", "bert"}]
LLAMA = next(case for case in CASES if case.name == "llama")


def widened(case, factor=2, last=1):
    """Every group that can be, so many times; the last one so many times more."""
    model = fill(case.model())
    graph = trace(model, case.inputs(), outputs=outputs_of(case))
    copies = {
        name: (factor,) * group.size
        for name, group in graph.groups.items()
        if not why_not(graph, name) and group.kind in {"channel", "neuron", "kv_group"}
    }
    name = list(copies)[-1]
    copies[name] = (factor * last,) * graph.groups[name].size
    return widen(model, graph, copies), graph


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_it_loads_as_it_was_saved(case, tmp_path):
    wide, graph = widened(case, last=2)
    sosp_hub.save_pretrained(wide, tmp_path)
    again = sosp_hub.from_pretrained(tmp_path)
    assert type(again) is type(wide)
    assert_close(again.state_dict(), wide.state_dict(), relative=0)
    assert_close(run(again, graph), run(wide, graph), relative=1e-6)
    found = examine(tmp_path)
    assert not found.faults
    assert found.totals["params"] == sum(p.numel() for p in wide.parameters())
    if case.library == "timm":
        other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    else:
        other = type(wide).from_pretrained(tmp_path)
    assert_close(other.state_dict(), wide.state_dict(), relative=0)


def test_layers_widened_alike_need_a_plain_config_alone(tmp_path):
    wide, graph = widened(LLAMA)
    sosp_hub.save_pretrained(wide, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "sosp_hub" not in config
    assert (config["intermediate_size"], config["num_key_value_heads"]) == (192, 4)
    assert config["num_attention_heads"] == 8
    assert_close(run(sosp_hub.from_pretrained(tmp_path), graph), run(wide, graph), relative=1e-6)


def test_what_no_file_may_hold_is_not_saved(tmp_path):
    case = next(case for case in CASES if case.name == "test_resnet")
    wide, _ = widened(case, factor=5)
    with pytest.raises(CheckpointError, match="1 to 4 times"):
        sosp_hub.save_pretrained(wide, tmp_path)


@pytest.mark.parametrize("name", ["llama", "test_resnet"])
def test_sizes_are_compared_with_the_weight_files_before_anything_is_built(
    name, tmp_path, monkeypatch
):
    case = next(case for case in CASES if case.name == name)
    wide, _ = widened(case, last=2)
    sosp_hub.save_pretrained(wide, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    record = config["sosp_hub"] if name == "llama" else config["model_args"]["delta"]
    module, values = next(
        (m, v)
        for m, v in record["base"]["modules"].items()
        if {"out_features", "out_channels"} & v.keys()
    )
    key = next(iter({"out_features", "out_channels"} & values.keys()))
    values[key] += 1
    path.write_text(json.dumps(config))

    def load(*_):
        raise CheckpointError("this is too late")

    for library in ("timm", "transformers"):
        monkeypatch.setattr(f"sosp_hub.checkpoint.{library}.read.read", load)
    with pytest.raises(CheckpointError, match=f"{module}.weight.*holds"):
        sosp_hub.from_pretrained(tmp_path)


def test_growth_that_the_file_does_not_declare_is_refused(tmp_path):
    wide, _ = widened(LLAMA, last=2)
    sosp_hub.save_pretrained(wide, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["sosp_hub"]["base"].pop("growth") == 4
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expected sizes from 0 to the skeleton's"):
        sosp_hub.from_pretrained(tmp_path)
