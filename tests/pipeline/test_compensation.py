"""A run whose kept weights make up for the cut: from the recipe to folded weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

import sosp_hub
from sosp_hub.criteria.compute.curvature import CurvatureMeasure
from sosp_hub.pipeline import compensation, context, curvature, measuring
from sosp_hub.prune import main
from tests.compare import assert_close

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(recipe):
    """Of a run that compensates."""
    text = recipe.read_text()
    recipe.write_text(text.replace("batch_size: 16}", "batch_size: 16, compensate: true}"))
    return recipe


def test_any_criterion_is_compensated_for(recipe, tmp_path, capsys):
    assert main([str(recipe)]) == 0
    report = json.loads((tmp_path / "out" / "sosp_report.json").read_text())
    plan = sosp_hub.PruningPlan.from_json(json.dumps(report["plan"]))
    told = plan.provenance["compensation"]
    values = [gate for gates in plan.gates.values() for gate in gates]
    assert told["damping"] == 0.01
    assert [told["least_gate"], told["largest_gate"]] == [min(values), max(values)]
    assert min(values) >= 0
    assert "curvature" in report["timings_s"]
    words = f"gates of {told['groups']} groups, {min(values):.2f} to {max(values):.2f}, are folded"
    assert words in " ".join(capsys.readouterr().out.split())
    with_gates = load_file(tmp_path / "out" / "model.safetensors")
    assert main([str(recipe), "--overwrite", "criterion.compensate=false"]) == 0
    report = json.loads((tmp_path / "out" / "sosp_report.json").read_text())
    assert report["plan"]["gates"] == {}
    assert "compensation" not in report["plan"]["provenance"]
    without = load_file(tmp_path / "out" / "model.safetensors")
    assert without["conv1.weight"].equal(with_gates["conv1.weight"])  # reads no group
    assert not without["layer1.0.conv1.weight"].equal(with_gates["layer1.0.conv1.weight"])


def test_the_surgeon_and_its_compensation_share_one_matrix(recipe, tmp_path, monkeypatch, capsys):
    """Which another selection, budget or damping needs no data to use."""

    def stop(*args, **keywords):
        raise KeyboardInterrupt

    keys = ["criterion.name=sosp_i", "criterion.compensate=null"]
    with monkeypatch.context() as patched:
        patched.setattr(measuring, "apply", stop)
        assert main([str(recipe), *keys, "criterion.selection=surgeon"]) == 130
        patched.setattr(CurvatureMeasure, "measure", stop)
        changes = ["budget.structures=0.7", "criterion.damping=0.1"]
        assert main([str(recipe), *keys, "criterion.selection=surgeon", *changes]) == 130
        plan = json.loads((tmp_path / "out.partial" / "plan.json").read_text())["made"]["plan"]
        plan = sosp_hub.PruningPlan.from_json(plan)
        assert plan.gates
        assert plan.provenance["compensation"]["damping"] == 0.1
        assert main([str(recipe), *keys]) == 130  # row sums, not compensated for
        plan = json.loads((tmp_path / "out.partial" / "plan.json").read_text())["made"]["plan"]
        assert not sosp_hub.PruningPlan.from_json(plan).gates
    said = capsys.readouterr().err
    assert "repeated because of that: saliency, plan" in said


def test_another_budget_is_compensated_without_data(recipe, tmp_path, monkeypatch, capsys):
    keys = ["criterion.name=sosp_i", "criterion.selection=surgeon", "output.figures=true"]
    assert main([str(recipe), *keys]) == 0
    out = tmp_path / "out"
    assert (out / "figures" / "correlation.png").is_file()
    assert "Correlation of structures" in (out / "report.html").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(context, "open_data", None)
        assert main(["--from-scores", str(out), "budget.structures=0.5"]) == 0
    recut = tmp_path / "out-structures-0.5"
    assert (recut / "curvature.safetensors").is_file()
    found = json.loads((recut / "sosp_report.json").read_text())["plan"]
    keys += ["budget.structures=0.5", f"output.dir={tmp_path / 'again'}"]
    assert main([str(recipe), *keys]) == 0
    plan = json.loads((tmp_path / "again" / "sosp_report.json").read_text())["plan"]
    assert found["gates"] == plan["gates"] != {}
    assert found["kept"] == plan["kept"]
    (recut / "curvature.safetensors").unlink()
    assert main(["--from-scores", str(recut), "budget.structures=0.4"]) == 2
    assert "no curvature.safetensors was kept; give the data" in capsys.readouterr().err


def test_the_report_tells_how_many_labels_were_drawn(recipe, tmp_path):
    keys = ["criterion.name=sosp_i", "criterion.max_classes=9", "criterion.num_draws=2"]
    assert main([str(recipe), *keys, "criterion.compensate=null"]) == 0
    report = json.loads((tmp_path / "out" / "sosp_report.json").read_text())
    told = {"data": "sklearn/digits", "num_samples": 24, "seed": 0, "drawn_labels": 2}
    assert report["calibration"] == report["plan"]["provenance"]["calibration"] == told
    card = " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert (
        "24 samples of sklearn/digits with 2 labels drawn from the model for each (seed 0)" in card
    )


def test_a_large_matrix_is_not_kept(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(curvature, "MOST_BYTES", 1000)
    assert main([str(recipe)]) == 0
    assert not (tmp_path / "out" / "curvature.safetensors").exists()


@pytest.mark.parametrize("keys", [["criterion.name=sosp_i", "criterion.selection=surgeon"], []])
def test_damping_is_chosen_on_samples_that_are_held_out(recipe, tmp_path, monkeypatch, keys):
    seen = {"matrix": set(), "loss": set()}
    measure, evaluate = CurvatureMeasure.measure, compensation.evaluate

    def ids(batches):
        return {row.numpy().tobytes() for inputs, _ in batches for row in inputs}

    def measured(self, model, groups, batches):
        seen["matrix"] |= ids(batches)
        return measure(self, model, groups, batches)

    def evaluated(model, batches, metrics, **options):
        seen["loss"] |= ids(batches)
        return evaluate(model, batches, metrics, **options)

    monkeypatch.setattr(CurvatureMeasure, "measure", measured)
    monkeypatch.setattr(compensation, "evaluate", evaluated)
    monkeypatch.setattr(compensation, "DAMPINGS", (0.01, 1.0, 100.0))
    assert main([str(recipe), "criterion.damping=auto", *keys]) == 0
    assert [len(seen["matrix"]), len(seen["loss"])] == [18, 6]
    assert not seen["matrix"] & seen["loss"]
    report = json.loads((tmp_path / "out" / "sosp_report.json").read_text())
    told = report["plan"]["provenance"]["compensation"]
    losses = told["held_out_losses"]
    assert losses.keys() == {"0.01", "1", "100"}
    assert losses[f"{told['damping']:g}"] == min(losses.values())
    assert len(set(losses.values())) == 3
    given = [f"criterion.damping={told['damping']}", "--overwrite"]
    if not keys:  # with the matrix of all samples, so the same order but other gates
        order = load_file(tmp_path / "out" / "saliency.safetensors")
        assert main([str(recipe), *given]) == 0
        again = load_file(tmp_path / "out" / "saliency.safetensors")
        assert all(again[name].equal(scores) for name, scores in order.items())


def test_layers_cannot_be_made_up_for(recipe, capsys):
    keys = ["structure.kinds=[layer]", "criterion.name=random"]
    assert main([str(recipe), *keys]) == 2
    assert "criterion.compensate: a whole layer cannot be compensated" in capsys.readouterr().err
    assert main([str(recipe), "criterion.gate=weight"]) == 2
    assert "criterion.gate: activation" in capsys.readouterr().err
    assert main([str(recipe), "criterion.damping=auto", "criterion.num_samples=3"]) == 2
    assert "there are 3; raise criterion.num_samples" in capsys.readouterr().err


def test_constants_are_folded_into_biases(recipe, tmp_path, capsys):
    keys = ["model.id=test_vit", "structure.kinds=[neuron]", "criterion.name=flap"]
    keys += ["criterion.compensate_bias=true", "criterion.compensate=false"]
    assert main([str(recipe), *keys]) == 0
    said = capsys.readouterr()
    found = json.loads((tmp_path / "out" / "sosp_report.json").read_text())["plan"]
    num = len(found["kept"])
    assert f"{num} biases are shifted by the mean of what was cut" in said.out
    assert found["shifts"].keys() == {f"blocks.{i}.mlp.fc2.bias" for i in range(num)}
    with_shifts = load_file(tmp_path / "out" / "model.safetensors")
    plan = sosp_hub.PruningPlan.from_json(json.dumps(found))
    assert main([str(recipe), "--overwrite", *keys, "criterion.compensate_bias=false"]) == 0
    without = load_file(tmp_path / "out" / "model.safetensors")
    shifted = {k: without[k].double() + torch.tensor(v).double() for k, v in plan.shifts.items()}
    assert_close({k: with_shifts[k].double() for k in shifted}, shifted, relative=1e-6)
    assert main([str(recipe), *keys, "structure.kinds=[layer]", "criterion.name=random"]) == 2
    assert "criterion.compensate_bias: a whole layer cannot" in capsys.readouterr().err


def test_gates_are_moved_on_and_the_report_tells_the_steps(recipe, tmp_path, monkeypatch, capsys):
    seen = {"step": [], "held out": []}
    measure, distance = CurvatureMeasure.measure, CurvatureMeasure.divergence

    def ids(batches):
        return {row.numpy().tobytes() for inputs, _ in batches for row in inputs}

    def measured(self, model, groups, batches, at=None):
        seen["step"] += [ids(batches)] if at is not None else []
        return measure(self, model, groups, batches, at)

    def apart(self, model, groups, batches, at):
        seen["held out"].append(ids(batches))
        return distance(self, model, groups, batches, at)

    monkeypatch.setattr(CurvatureMeasure, "measure", measured)
    monkeypatch.setattr(CurvatureMeasure, "divergence", apart)
    monkeypatch.setattr(compensation, "DAMPINGS", (0.1, 10.0))
    assert main([str(recipe)]) == 0
    plain = json.loads((tmp_path / "out" / "sosp_report.json").read_text())["plan"]
    assert not seen["step"]
    assert main([str(recipe), "--overwrite", "criterion.compensate_steps=2"]) == 0
    found = json.loads((tmp_path / "out" / "sosp_report.json").read_text())["plan"]
    told = found["provenance"]["compensation"]
    far = [step["divergence"] for step in told["steps"]]
    assert 1 < len(far) <= 3
    assert far == sorted(far, reverse=True)
    assert told["damping"] == 0.01
    assert found["kept"] == plain["kept"]
    assert found["gates"].keys() == plain["gates"].keys()
    assert found["gates"] != plain["gates"]
    assert {len(part) for part in seen["step"]} == {18}
    assert {len(part) for part in seen["held out"]} == {6}
    assert not seen["step"][0] & seen["held out"][0]
    words = (
        f"{len(far) - 1} steps moved these gates on: divergence from the dense model on held-out"
    )
    assert words in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["criterion.compensate=false"], "there are no gates to move; write compensate: true"),
        (["criterion.compensate_bias=true"], "would not know of the constants"),
        (["criterion.num_samples=3"], "compensate_steps, hold out a quarter of the calibration"),
        (["criterion.compensate_steps=-1"], "got -1; expected at least 0"),
        (["criterion.name=sosp_i", "criterion.rescore_every=2"], "write selection: surgeon, or"),
        (
            [
                "criterion.name=sosp_i",
                "criterion.selection=surgeon",
                "criterion.rescore_every=2",
                "criterion.damping=auto",
            ],
            "measured anew for every damping",
        ),
    ],
)
def test_steps_that_cannot_be_taken(recipe, capsys, keys, words):
    assert main([str(recipe), "criterion.compensate_steps=2", *keys]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_without_data_the_gates_are_those_in_closed_form(recipe, tmp_path, monkeypatch, capsys):
    keys = ["criterion.name=sosp_i", "criterion.selection=surgeon", "criterion.compensate_steps=1"]
    assert main([str(recipe), *keys]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(context, "open_data", None)
        assert main(["--from-scores", str(tmp_path / "out"), "budget.structures=0.5"]) == 0
    assert "there is no data; using the closed-form gates" in capsys.readouterr().err
    found = json.loads((tmp_path / "out-structures-0.5" / "sosp_report.json").read_text())["plan"]
    assert found["gates"]
    assert "steps" not in found["provenance"]["compensation"]


def test_the_surgeon_measures_again_on_the_way(recipe, tmp_path, monkeypatch):
    num, measure = [], CurvatureMeasure.measure

    def measured(self, model, groups, batches, at=None):
        num.append(0 if at is None else sum(int((part == 0).sum()) for part in at.values()))
        return measure(self, model, groups, batches, at)

    monkeypatch.setattr(CurvatureMeasure, "measure", measured)
    keys = ["criterion.name=sosp_i", "criterion.selection=surgeon"]
    assert main([str(recipe), *keys]) == 0
    assert num == [0]
    first = load_file(tmp_path / "out" / "saliency.safetensors")
    num.clear()
    assert main([str(recipe), "--overwrite", *keys, "criterion.rescore_every=30"]) == 0
    assert num[0] == 0
    assert len(num) == -(-sum(int((s != s.max()).sum()) for s in first.values()) // 30)
    assert all(zeros >= 30 * pieces for pieces, zeros in enumerate(num))
    found = load_file(tmp_path / "out" / "saliency.safetensors")
    front = {(name, i) for name, s in first.items() for i in range(len(s)) if s[i] < 30}
    assert front == {(name, i) for name, s in found.items() for i in range(len(s)) if s[i] < 30}
    assert any(not found[name].equal(scores) for name, scores in first.items())


def test_fewer_samples_than_asked_for_are_said(recipe, tmp_path, capsys):
    """And one sample is enough."""
    keys = ["criterion.compensate=false", "data.num_train=9"]
    assert main([str(recipe), *keys]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "criterion.num_samples is 24; the train split has 9 samples, all are used" in said
    report = json.loads((tmp_path / "out" / "sosp_report.json").read_text())
    assert report["calibration"]["num_samples"] == 9
    assert main([str(recipe), *keys, "criterion.num_samples=1", "--overwrite"]) == 0
