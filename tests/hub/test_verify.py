"""A real pruned model, published, loaded again by a stranger, and checked against its card."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file

import sosp_hub
from sosp_hub.data.loading import load_split, make_loader
from sosp_hub.data.source import open_data
from sosp_hub.errors import HubError
from sosp_hub.evaluate import evaluate
from sosp_hub.hub.push import push_to_hub
from sosp_hub.hub.verify import verify
from sosp_hub.plan import PruningPlan
from sosp_hub.recipe.schema import DataSection, ModelSection
from sosp_hub.report.card import render_card
from sosp_hub.zoo.load import example_inputs, load_model
from tests.hub.conftest import NOW

pytestmark = pytest.mark.slow

REPO = "me/digits"
RECIPE = """\
model: {library: timm, id: cifar_resnet20, task: image-classification, pretrained: false}
data: {id: sklearn/digits}
evaluate: {batch_size: 60}
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A cut, untrained network with the accuracy that it really has."""
    torch.manual_seed(0)
    data = open_data(DataSection(id="sklearn/digits"), "image-classification")
    section = ModelSection(
        library="timm", id="cifar_resnet20", task="image-classification", pretrained=False
    )
    loaded = load_model(section, data=data.info)
    graph = sosp_hub.trace(loaded.model, example_inputs(loaded))
    names = [name for name, group in graph.groups.items() if group.kind == "channel"]
    sizes = {name: graph.groups[name].size for name in names}
    plan = PruningPlan({name: tuple(range(size // 2)) for name, size in sizes.items()}, sizes)
    model = sosp_hub.apply(loaded.model, graph, plan).eval()
    loader = make_loader(load_split(data, "test", loaded.processor), 60)
    found = evaluate(model, loader, ("accuracy", "loss"))
    num_params = sum(p.numel() for p in model.parameters())
    report = {
        "plan": json.loads(plan.to_json()),
        "metrics": {
            "final": {k: {"value": m.value, "n": m.n, "stderr": m.stderr} for k, m in found.items()}
        },
        "cost": {"before": {"params": 272186}, "after": {"params": num_params}},
        "groups": [
            {"name": n, "kind": "channel", "size": s, "kept": s // 2, "exact": True}
            for n, s in sizes.items()
        ],
        "task": "image-classification",
        "recipe": RECIPE,
    }
    folder = tmp_path_factory.mktemp("published") / "digits"
    sosp_hub.save_pretrained(model, folder, report=report)
    render_card(folder)
    inputs = torch.randn(2, 1, 8, 8)
    return folder, inputs, model(inputs)


@pytest.fixture
def copy(published, tmp_path):
    folder = tmp_path / "digits"
    folder.mkdir()
    for path in published[0].iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def changed(folder, change):
    path = folder / "sosp_report.json"
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))
    return folder


def checks(result):
    return {check.name: check.holds for check in result.checks}


def test_a_stranger_loads_what_was_pushed_and_verifies_it(hub, published, client_env, tmp_path):
    folder, inputs, logits = published
    push_to_hub(folder, REPO, private=True, patience=NOW)
    save_file({"inputs": inputs}, tmp_path / "inputs.safetensors")
    script = (
        "import sys, sosp_hub\n"
        "from safetensors.torch import load_file, save_file\n"
        "from sosp_hub.hub.verify import verify\n"
        "model = sosp_hub.from_pretrained(sys.argv[1])\n"
        "logits = model(load_file(sys.argv[2])['inputs']).detach()\n"
        "save_file({'logits': logits}, sys.argv[3])\n"
        "print(verify(sys.argv[1]))\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            script,
            REPO,
            str(tmp_path / "inputs.safetensors"),
            str(tmp_path / "out.safetensors"),
        ],
        env=client_env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(
        load_file(tmp_path / "out.safetensors")["logits"], logits, atol=1e-6, rtol=0
    )
    assert f"{REPO}: what was published holds" in done.stdout
    assert "have the hashes that the hub lists" in done.stdout
    assert "359 test samples" in done.stdout or "360 test samples" in done.stdout


def test_a_subset_holds_within_its_spread(copy):
    result = verify(str(copy), num_samples=120)
    assert result.holds, str(result)
    assert "on 120 test samples" in str(result)


def test_on_the_same_samples_two_points_are_a_difference(copy):
    """The spread of one draw is some points; what is measured again on it is the same."""

    def better(report):
        final = report["metrics"]["final"]["accuracy"]
        final["value"] += 0.02 if final["value"] < 0.5 else -0.02

    changed(copy, better)
    assert checks(verify(str(copy)))["metric accuracy"] is False


def test_a_metric_that_is_too_good_is_found(copy):
    changed(copy, lambda report: report["metrics"]["final"]["accuracy"].update(value=0.97))
    result = verify(str(copy))
    assert not result.holds
    assert checks(result)["metric accuracy"] is False
    assert checks(result)["card"] is False


@pytest.mark.parametrize("num", [7, 10**9])
def test_another_number_of_parameters_is_found(copy, num):
    """More weights than were published, or fewer: weights are missing, or others were sent."""
    changed(copy, lambda report: report["cost"]["after"].update(params=num))
    assert checks(verify(str(copy)))["weights"] is False


def test_a_subset_does_not_hide_a_metric_that_is_far_off(copy):
    """A third of the samples has a spread of some points, not of twenty."""
    published = json.loads((copy / "sosp_report.json").read_text())["metrics"]["final"]["accuracy"]
    changed(
        copy,
        lambda report: report["metrics"]["final"]["accuracy"].update(
            value=published["value"] + 0.2
        ),
    )
    result = verify(str(copy), num_samples=120)
    assert checks(result)["metric accuracy"] is False
    assert not result.holds


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_other_bytes_than_the_hub_lists_are_found(hub, published, name):
    """Somebody has changed one byte of a file that was downloaded; it still loads."""
    push_to_hub(published[0], REPO, patience=NOW)
    assert checks(verify(REPO, num_samples=60))["files"] is True
    path = (Path(snapshot_download(REPO)) / name).resolve()
    content = path.read_bytes()
    changed = content[:-1] + (b" " if name == "config.json" else bytes([content[-1] ^ 1]))
    assert len(changed) == len(content)
    assert changed != content
    path.chmod(0o644)
    path.write_bytes(changed)
    result = verify(REPO, num_samples=60)
    assert checks(result)["files"] is False
    assert f"other bytes than the hub lists: {name}" in str(result)
    assert not result.holds


def test_a_plan_that_is_not_the_models_is_found(copy):
    changed(copy, lambda report: report["groups"][0].update(kept=1))
    assert checks(verify(str(copy)))["plan"] is False


def test_damaged_weights_are_found(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    result = verify(str(copy))
    assert not result.holds
    assert checks(result)["weights"] is False


def test_data_that_cannot_be_reached_is_said_and_confirms_nothing(copy):
    result = verify(str(copy), overrides=["data.path=/nowhere/digits"])
    assert not result.holds
    assert checks(result)["metrics"] is None
    assert "could not be measured" in str(result)


def test_no_report(copy):
    (copy / "sosp_report.json").unlink()
    with pytest.raises(HubError, match="nothing to compare"):
        verify(str(copy))


def test_no_such_model(hub):
    with pytest.raises(HubError, match="no such repository"):
        verify("me/nothing")
