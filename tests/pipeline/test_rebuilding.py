"""The section ``rebuild`` of a recipe: on by default, kept between runs, off without data."""

import json

import pytest
from PIL import Image
from safetensors.torch import load_file

from sosp_hub.pipeline import after_cut
from sosp_hub.prune import main
from tests.compare import assert_close

pytestmark = pytest.mark.slow


def report_of(recipe):
    return json.loads((recipe.parent / "out" / "sosp_report.json").read_text())


@pytest.fixture
def rebuilding(recipe):
    recipe.write_text(recipe.read_text().replace("rebuild: {method: null}\n", ""))
    return recipe


def test_it_is_on_by_default_and_lowers_the_loss_of_a_cut(rebuilding):
    assert main([str(rebuilding), "model.train={epochs: 2, learning_rate: 3.0e-3}"]) == 0
    report = report_of(rebuilding)
    metrics = {stage: found["loss"]["value"] for stage, found in report["metrics"].items()}
    assert list(metrics) == ["dense", "cut", "rebuilt", "final"]
    assert metrics["rebuilt"] < metrics["cut"]
    assert metrics["final"] == metrics["rebuilt"]
    card = (rebuilding.parent / "out" / "README.md").read_text()
    assert "solved again by least squares on calibration inputs" in card
    assert "| rebuilt |" in card
    told = report["rebuild"]
    assert told["method"] == "ridge"
    assert told["num_samples"] == 64
    assert told["seconds"] > 0
    assert told["layers"]
    assert all(layer["error"] <= layer["error_cut"] for layer in told["layers"])
    assert f"- {len(told['layers'])} weights that read what was cut: solved again" in card
    assert "64 calibration samples" in card


def test_blocks_are_trained_where_the_recipe_says_so_and_that_is_told(rebuilding):
    given = ["model.train={epochs: 2, learning_rate: 3.0e-3}", "criterion.batch_size=8"]
    assert main([str(rebuilding), *given, "rebuild.refine_steps=24"]) == 0
    told = report_of(rebuilding)["rebuild"]
    cut = [layer["tensor"] for layer in told["layers"] if layer["tensor"].endswith("conv2.weight")]
    assert [block["name"] for block in told["blocks"]] == [
        n.removesuffix(".conv2.weight") for n in cut
    ]
    errors = [(block["error_before"], block["error"]) for block in told["blocks"]]
    assert all(after <= before for before, after in errors)
    assert any(after < before for before, after in errors)
    card = (rebuilding.parent / "out" / "README.md").read_text()
    assert (
        f"- {len(cut)} blocks trained toward the uncut output: the squared error on held-out"
        in card
    )


def test_without_data_the_cut_stays_as_it_is_and_that_is_told(rebuilding, caplog):
    assert main([str(rebuilding)]) == 0
    again = rebuilding.parent / "again"
    given = ["--from-scores", str(rebuilding.parent / "out"), "budget.structures=0.5"]
    with caplog.at_level("INFO"):
        assert main([*given, f"output.dir={again}"]) == 0
    assert "rebuild: skipped, there is no calibration data" in caplog.text
    plain = rebuilding.parent / "plain"
    assert main([*given, "rebuild.method=null", f"output.dir={plain}"]) == 0
    weights = [load_file(folder / "model.safetensors") for folder in (again, plain)]
    assert_close(*weights, relative=0)
    assert json.loads((again / "sosp_report.json").read_text())["rebuild"] == {}


def test_other_data_calibrates_too_and_is_measured_beside_and_told_apart(rebuilding):
    given = [
        "data.calibration=[{id: sklearn/digits, num_train: 20}]",
        "data.others=[{id: sklearn/digits, num_train: 20}, {id: sklearn/digits, num_test: 8}]",
    ]
    assert main([str(rebuilding), *given]) == 0
    report = report_of(rebuilding)
    assert report["rebuild"]["num_samples"] == 40  # in equal parts, 20 of the smaller
    assert report["calibration"]["data"] == "sklearn/digits, sklearn/digits"
    for stage in ("dense", "cut", "rebuilt", "final"):
        found = {name: metric["n"] for name, metric in report["metrics"][stage].items()}
        assert found == {"loss": 32, "loss@digits": 359, "loss@digits 2": 8}
    card = (rebuilding.parent / "out" / "README.md").read_text()
    assert "| loss on digits (calibrated on) |" in card
    assert "| loss on digits 2 (out of the calibration's domain) |" in card


def test_other_data_with_other_classes_is_refused(rebuilding, tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / "train" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("L", (8, 8), 9 * number).save(tmp_path / f"pets/train/{name}/{number}.png")
    given = f"data.calibration=[{{path: {tmp_path / 'pets'}, test: null}}]"
    assert main([str(rebuilding), given]) != 0
    assert "only data sets with the same classes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("rebuild.method=lstsq", "rebuild.method"),
        ("rebuild.damping=-1", "rebuild.damping"),
        ("rebuild.dense_share=2", "rebuild.dense_share"),
        ("rebuild.num_samples=0", "rebuild.num_samples"),
        ("data.calibration=[{train: x}]", "data.calibration"),
        ("data.others=[{id: a/b, max_length: 3}]", "data.others"),
    ],
)
def test_what_cannot_be_is_refused_with_its_key(given, told, recipe, capsys):
    assert main([str(recipe), given]) != 0
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("ruined", [True, False])
def test_norms_that_make_it_worse_are_not_kept(rebuilding, ruined, monkeypatch, capsys):
    """Judged on held-out samples of the train split; a cut model was at 0.94 and ended at 0.33."""

    def estimate(pruned, *_):
        for name, value in pruned.named_buffers():
            if ruined and name.endswith("running_mean"):
                value.add_(10)
        return 1

    monkeypatch.setattr(after_cut, "recalibrate_after", estimate)
    given = ["model.train={epochs: 6, learning_rate: 3.0e-3}", "finetune.recalibrate_norm=true"]
    assert main([str(rebuilding), *given, "data.num_train=256"]) == 0
    metrics = report_of(rebuilding)["metrics"]
    assert metrics["dense"]["loss"]["value"] < 1  # it has something to lose
    assert ("recalibrated" in metrics) is not ruined
    assert metrics["final"] == metrics["rebuilt"]
    assert ("norms: their statistics stay" in capsys.readouterr().err) is ruined
