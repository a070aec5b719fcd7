"""``python -m sosp_hub.compare``: each cell is a run of ``prune``, nothing is done twice."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from sosp_hub import compare, prune, scoring
from sosp_hub.pipeline import after_cut, training
from sosp_hub.pipeline import compare as pipeline
from sosp_hub.pipeline.ranks import rank_correlations
from tests.compare import assert_close

pytestmark = pytest.mark.slow

RECIPE = """
model:
  library: timm
  id: cifar_resnet20
  task: image-classification
  pretrained: false
  train: {epochs: 1, learning_rate: 3.0e-3, num_samples: 32}
data: {id: sklearn/digits, num_train: 128, num_test: 100}
structure: {only: ["layer1.*.conv1:*", "layer2.?.conv1:*"], verify: fast}
criterion: {num_samples: 64, batch_size: 32}
finetune: {epochs: 1, batch_size: 16, num_samples: 32}
evaluate: {metrics: [accuracy, loss], latency: false}
compare:
  criteria: [{name: random, compensate: true}, {name: taylor, form: squared}]
  budgets: [{structures: 0.5}, {macs: 0.8}]
  seeds: [0, 1]
output: {dir: OUTPUT, figures: false}
"""


def run(folder, *arguments, verb=compare):
    """The command, in this process; its output goes to ``folder/out``."""
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("OUTPUT", str(folder / "out")))
    return verb.main([str(path), *arguments])


def read(folder):
    return json.loads((folder / "out" / "results.json").read_text())


def numbers(results):
    """What does not depend on how fast the machine is."""
    cells = [{k: v for k, v in cell.items() if k != "scoring"} for cell in results["cells"]]
    return {"cells": cells, "ranks": results["rank_correlations"], "dense": results["dense"]}


def counted(monkeypatch, module, name, calls):
    real = getattr(module, name)

    def call(*args, **keywords):
        calls.append(name)
        return real(*args, **keywords)

    monkeypatch.setattr(module, name, call)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished comparison, and how often it trained and scored."""
    folder, calls = tmp_path_factory.mktemp("finished"), []
    with pytest.MonkeyPatch.context() as patch:
        counted(patch, scoring, "score", calls)
        counted(patch, training, "train_model", calls)
        counted(patch, after_cut, "recover", calls)
        assert run(folder) == 0
    return folder, calls


def test_scores_are_shared_between_budgets_and_the_dense_model_between_criteria(finished):
    folder, calls = finished
    assert calls.count("score") == 2 * 2  # criteria x seeds
    assert calls.count("train_model") == 2  # seeds
    assert calls.count("recover") == 2 * 2 * 2  # cells
    results = read(folder)
    assert len(results["cells"]) == 8
    assert results["budgets"] == ["structures 0.5", "macs 0.8"]
    for cell in results["cells"]:
        assert list(cell["metrics"]) == ["cut", "rebuilt", "recalibrated", "final"]
        assert cell["scoring"]["seconds"] > 0
        assert cell["structures"]["before"] == 3 * 16 + 3 * 32
    rows = list(csv.DictReader((folder / "out" / "results.csv").read_text().splitlines()))
    assert len(rows) == 8
    assert sorted(path.name for path in folder.iterdir()) == ["out", "recipe.yaml"]


def test_a_cell_has_the_numbers_of_prune(finished, tmp_path):
    keys = ["compare=null", "criterion.name=taylor", "criterion.form=squared", "seed=1"]
    assert run(tmp_path, *keys, "budget.structures=0.5", verb=prune) == 0
    report = json.loads((tmp_path / "out" / "sosp_report.json").read_text())
    results = read(finished[0])
    (cell,) = (
        cell
        for cell in results["cells"]
        if (cell["criterion"], cell["budget"], cell["seed"])
        == ("taylor squared", "structures 0.5", 1)
    )
    told = {"recalibrated": report["metrics"]["rebuilt"]} | report["metrics"]  # where norms stay
    assert {**cell["metrics"], "dense": results["dense"]["1"]} == told
    assert cell["cost"] == report["cost"]
    cut = [len(kept) for kept in report["plan"]["kept"].values()]
    whole = sum(size for size in report["plan"]["sizes"].values())
    assert cell["structures"]["after"] == cell["structures"]["before"] - whole + sum(cut)


def test_a_stopped_comparison_goes_on_cell_by_cell(finished, tmp_path, monkeypatch, capsys):
    rows = []

    def stop_at_the_third(*args):
        rows.append(args)
        if len(rows) == 3:
            raise KeyboardInterrupt
        return real(*args)

    real, seeds = pipeline._row, "compare.seeds=[1]"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_row", stop_at_the_third)
        assert run(tmp_path, seeds) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "recipe.yaml"]
    assert not list((tmp_path / "out.partial").glob("final-*.safetensors"))  # numbers are enough
    calls = []
    counted(monkeypatch, scoring, "score", calls)
    counted(monkeypatch, training, "train_model", calls)
    counted(monkeypatch, after_cut, "recover", calls)
    capsys.readouterr()
    assert run(tmp_path, seeds) == 0
    assert "2 of 4 cells" in capsys.readouterr().err
    assert calls == ["recover", "recover"]  # of the two cells that were not done
    whole = numbers(read(finished[0]))["cells"]
    assert numbers(read(tmp_path))["cells"] == [cell for cell in whole if cell["seed"] == 1]


def test_a_finished_comparison_is_left_as_it_is(finished, capsys):
    before = (finished[0] / "out" / "results.json").stat().st_mtime_ns
    assert run(finished[0]) == 2
    error = capsys.readouterr().err
    assert "holds a finished run" in error
    assert "--overwrite" in error
    assert (finished[0] / "out" / "results.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["compare.criteria=[random, tailor]"], ["compare.criteria.1.name", "'tailor'", "taylor"]),
        (["compare.criteria=[random, random]"], ["compare.criteria.1", "same as criteria.0"]),
        (
            ["compare.criteria=[random, {name: taylor, kinds: [head]}]"],
            ["head", "it has channel"],
        ),
        (["compare.budgets=[{macs: 0.9}, {macs: 0.01}]"], ["macs=0.01", "least that can be"]),
        (["structure.only=['layer9*']"], ["structure.only", "'layer9*'", "layer1.0.conv1:channel"]),
        (
            ["data.id=null", "data.path=FOLDER/images", "data.test=null", "data.label=class"],
            ["class", "label"],
        ),
        (["compare=null"], ["compare: missing"]),
    ],
    ids=lambda value: value[0] if "=" in value[0] else "",
)
def test_bad_cells_are_refused_before_anything_is_trained(
    tmp_path, monkeypatch, capsys, overrides, words
):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train.csv").write_text("image,label\na.png,1\n")
    counted(monkeypatch, training, "train_model", calls := [])
    overrides = [override.replace("FOLDER", str(tmp_path)) for override in overrides]
    assert run(tmp_path, *overrides) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error, error
    assert calls == []
    assert not (tmp_path / "out.partial").exists()


def test_prune_says_whose_recipe_it_is(tmp_path, capsys):
    assert run(tmp_path, verb=prune) == 2
    assert "run python -m sosp_hub.compare instead" in capsys.readouterr().err


def test_two_processes_compare_like_one(tmp_path):
    keys = ["model.train=null", "finetune.epochs=0", "compare.seeds=[0]"]
    keys += [
        "compare.budgets=[{structures: 0.5}]",
        "compare.criteria=[taylor, lamp]",
        "data.num_test=51",
        "criterion.num_samples=61",
    ]
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
    assert run(tmp_path / "one", *keys) == 0
    path = tmp_path / "two" / "recipe.yaml"
    path.write_text(RECIPE.replace("OUTPUT", str(tmp_path / "two" / "out")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "sosp_hub.compare", str(path), *keys]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("results.csv") == 1
    assert sorted(f.name for f in (tmp_path / "two").iterdir()) == ["out", "recipe.yaml"]
    one, two = (numbers(read(tmp_path / name)) for name in ("one", "two"))
    for cell, alone in zip(two["cells"], one["cells"], strict=True):
        assert cell["cost"] == alone["cost"]
        assert_close(cell["metrics"]["cut"], alone["metrics"]["cut"])  # norms have other batches
    assert_close(two["ranks"][0]["matrix"], one["ranks"][0]["matrix"])


def test_rank_correlations_are_spearmans():
    generator = np.random.default_rng(0)
    a, b = generator.permutation(9) + 0.0, generator.permutation(9) + 0.0
    by_hand = float(1 - 6 * ((a - b) ** 2).sum() / (9 * (81 - 1)))  # the formula for distinct ranks

    def saliency(values):
        return {"x": torch.tensor(values[:4]).exp(), "y": torch.tensor(values[4:]).exp()}

    part = {"y": -saliency(a)["y"], "z": torch.ones(3, dtype=torch.float64)}
    flat = {"x": torch.ones(4, dtype=torch.float64), "y": torch.ones(5, dtype=torch.float64)}
    scores = {
        (("channel",), seed): {"a": saliency(a), "b": saliency(b), "part": part, "flat": flat}
        for seed in (0, 1)
    }
    scores[("layer",), 0] = {"alone": saliency(a)}
    (found,) = rank_correlations(scores)
    assert found["kinds"] == ["channel"]
    assert found["criteria"] == ["a", "b", "part", "flat"]
    assert_close(found["matrix"][0][:3], [1.0, by_hand, -1.0], relative=1e-12)
    assert found["matrix"][3] == [None] * 4
