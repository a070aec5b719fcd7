"""``python -m sosp_hub.expand``: three models of one size, made the same way."""

import json

import pytest
import timm
from safetensors.torch import load_file

import sosp_hub
from sosp_hub import expand
from sosp_hub.pipeline import after_cut, training
from sosp_hub.report.expansion import VARIANTS
from tests.compare import assert_close

pytestmark = pytest.mark.slow

RECIPE = """
model:
  library: timm
  id: cifar_resnet20
  task: image-classification
  pretrained: false
  train: {epochs: 1, learning_rate: 3.0e-3, num_samples: 64, batch_size: 16}
data: {id: sklearn/digits, num_train: 128, num_test: 60}
structure: {only: ["layer[23].?.conv1:*"], verify: fast}
criterion: {num_samples: 64, batch_size: 32}
budget: {params: 0.7}
finetune: {epochs: 1, batch_size: 16, num_samples: 32}
evaluate: {metrics: [accuracy, loss], latency: false}
expand: {threshold: 0.9, keep: [1.0], seeds: [0, 1]}
output: {dir: OUTPUT}
"""
CELLS = 2 * len(VARIANTS)


def run(folder, *arguments):
    """The command, in this process; its output goes to ``folder/out``."""
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("OUTPUT", str(folder / "out")))
    return expand.main([str(path), *arguments])


def read(folder):
    return json.loads((folder / "out" / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Stopped in the middle of the second seed, then run again."""
    folder = tmp_path_factory.mktemp("finished")
    trained = []

    def counted(patch, calls, most):
        """Every training is one of the two; the one after ``most`` does not begin."""
        for module, name in ((training, "train_model"), (after_cut, "recover")):
            real = getattr(module, name)

            def call(*args, real=real, **kwargs):
                if len(calls) == most:
                    raise KeyboardInterrupt
                calls.append(real)
                return real(*args, **kwargs)

            patch.setattr(module, name, call)

    with pytest.MonkeyPatch.context() as patch:
        counted(patch, trained, 9)
        assert run(folder) == 130
    with pytest.MonkeyPatch.context() as patch:
        counted(patch, again := [], None)
        assert run(folder) == 0
    # for each seed the base once, then for each variant once before the cut and once after
    assert len(trained) + len(again) == 2 * (1 + 3 * 2)
    return folder


def test_all_have_the_cost_of_the_bases_share(finished):
    results = read(finished)
    assert len(results["cells"]) == CELLS
    dense = sum(p.numel() for p in timm.create_model("cifar_resnet20", in_chans=1).parameters())
    for cell in results["cells"]:
        share = float(cell["budget"].removeprefix("params "))
        before, after = (cell["cost"][when]["params"] for when in ("before", "after"))
        assert 0.97 * share * dense < after <= share * dense
        assert before == dense if cell["criterion"] == "base" else before > 1.02 * dense
    sizes = {c["criterion"]: c["cost"]["before"]["params"] for c in results["cells"][:3]}
    assert sizes["all widened"] == pytest.approx(sizes["bottlenecks widened"], rel=0.01)


def test_the_widest_are_those_that_lost_least(finished):
    for seed in read(finished)["found"]:
        lost = {g["name"]: 1 - g["kept"] / g["size"] for g in seed["groups"]}
        whole = sum(g["size"] for g in seed["groups"])
        limit = 0.9 * (sum(g["size"] - g["kept"] for g in seed["groups"]) / whole)
        assert seed["bottlenecks"] == [name for name, share in lost.items() if share < limit]
        assert seed["limit"] == pytest.approx(limit)
        assert 1 < seed["factor"] < 2


def test_the_base_at_its_own_size_loses_nothing(finished):
    for cell in read(finished)["cells"]:
        if (cell["criterion"], cell["budget"]) == ("base", "params 1"):
            assert cell["cost"]["before"] == cell["cost"]["after"]
            assert set(cell["ratios"].values()) == {0.0}


def test_the_files(finished):
    output = finished / "out"
    assert {path.name for path in output.iterdir()} == {
        "model",
        "parameters.png",
        "ratios.png",
        "report.html",
        "results.json",
        "table.md",
    }
    table = (output / "table.md").read_text()
    assert table.count("| params") == len(VARIANTS)
    assert "the seed spread" in table
    assert sorted(path.name for path in finished.iterdir()) == ["out", "recipe.yaml"]


def test_differences_are_what_widened_bottlenecks_win(finished):
    results = read(finished)
    final = {
        (cell["criterion"], cell["seed"]): cell["metrics"]["final"]["accuracy"]["value"]
        for cell in results["cells"]
    }
    assert {told["worse"] for told in results["differences"]} == {VARIANTS[0], VARIANTS[2]}
    for told in results["differences"]:
        assert told["better"] == VARIANTS[1]
        gains = [final[VARIANTS[1], seed] - final[told["worse"], seed] for seed in (0, 1)]
        assert told["mean"] == pytest.approx(sum(gains) / 2)


def test_the_expanded_model_loads_and_is_wider_where_it_was_widened(finished):
    results = read(finished)
    folder = finished / "out" / "model"
    model = sosp_hub.from_pretrained(folder)
    assert_close(dict(model.state_dict()), load_file(folder / "model.safetensors"), relative=0)
    dense = timm.create_model("cifar_resnet20")
    widths = {
        name: (model.get_submodule(name).out_channels, dense.get_submodule(name).out_channels)
        for name in (n.partition(":")[0] for n in results["found"][0]["bottlenecks"])
    }
    assert any(now > before for now, before in widths.values())
    cell = next(c for c in results["cells"] if c["criterion"] == "bottlenecks widened")
    assert sum(p.numel() for p in model.parameters()) == cell["cost"]["after"]["params"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["expand=null"], ["expand: missing", "write expand:"]),
        (["expand.widen=5"], ["expand.widen", "got 5", "at most 4"]),
        (["expand.init=zeros"], ["expand.init", "net2net"]),
        (["budget.params=null", "budget.structures=0.5"], ["budget.structures", "write one of"]),
        (["budget.macs=0.5"], ["expand.keep", "params"]),
        (["push={repo_id: a/b}"], ["push", "prune"]),
        (["expand.threshold=0.001"], ["expand.threshold", "raise it"]),
    ],
    ids=lambda value: value[0].partition("=")[0] if "=" in value[0] else "",
)
def test_bad_input_is_explained(tmp_path, capsys, overrides, words, monkeypatch):
    monkeypatch.setattr(training, "train_model", lambda *a, **k: [])
    assert run(tmp_path, "expand.seeds=[0]", *overrides) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error, error
    assert not (tmp_path / "out").exists()


def test_where_norms_stay_every_row_has_the_stage_all_the_same(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(after_cut, "_renormed", lambda *_: len(asked.append(1) or asked) % 2 == 0)
    assert run(tmp_path, "expand.seeds=[0]") == 0
    cells = read(tmp_path)["cells"]
    assert len(asked) == len(cells) == len(VARIANTS)
    for cell in cells:  # where nothing is cut, nothing is rebuilt
        assert [name for name in cell["metrics"] if name != "rebuilt"] == [
            *("dense", "cut", "recalibrated", "final")
        ]


def test_a_finished_run_is_left_alone(finished, capsys):
    before = read(finished)
    assert run(finished) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert read(finished) == before
