"""The verbs of recipes in Python: what they give back, and what they leave alone."""

import json
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import sosp_hub
from sosp_hub.compat.accelerate import process_state_kept
from sosp_hub.errors import DataError, OutputError, PlanError, RecipeError
from sosp_hub.plan import PruningPlan
from sosp_hub.prune import main
from sosp_hub.recipe.load import as_recipe, load_recipe
from sosp_hub.recipe.schema import Recipe

SMALL = (
    *("model.train.epochs=1", "finetune.epochs=1", "criterion.num_samples=64"),
    *("data.num_train=256", "data.num_test=64", "rebuild.num_samples=64", "output.figures=false"),
    "evaluate.latency=false",
)


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


@pytest.mark.slow
def test_prune_gives_the_report_and_leaves_the_process_as_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = random_states()
    with process_state_kept():  # of the tests before
        report = sosp_hub.prune("quickstart", *SMALL)
        assert random_states() == before
        assert Accelerator(mixed_precision="bf16").mixed_precision == "bf16"  # the caller's first
    assert capsys.readouterr().out == ""
    stored = json.loads((tmp_path / "runs/quickstart/sosp_report.json").read_text())
    assert stored["metrics"] == report["metrics"]
    shown = str(report)
    assert "Size and speed" in shown
    assert f"{100 * report['metrics']['final']['accuracy']['value']:.1f}" in shown
    assert len(shown.splitlines()) < 40
    with pytest.raises(RecipeError, match=r"budget\.macs"):
        sosp_hub.prune("quickstart", "budget.macs=7")
    with pytest.raises(Exception, match="finished run"):
        sosp_hub.prune("quickstart", *SMALL)
    assert random_states() == before


@pytest.mark.slow
def test_json_is_all_of_the_output_and_quiet_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", *SMALL, "--json"]) == 0
    given = capsys.readouterr()
    assert json.loads(given.out)["metrics"]["final"]["accuracy"]["n"] == 64
    assert main(["quickstart", *SMALL, "--quiet", "--overwrite"]) == 0
    given = capsys.readouterr()
    assert given.out == ""
    assert "fine-tune" not in given.err


SECTIONS = {
    "model": {"library": "timm", "id": "cifar_resnet20", "task": "image-classification"},
    "data": {"id": "sklearn/digits"},
}


def test_a_recipe_is_a_name_a_path_sections_or_a_recipe(tmp_path):
    named = as_recipe("quickstart", ["seed=3"], "prune")
    assert named == load_recipe("quickstart", ["seed=3"])
    assert as_recipe(named, ["seed=4"], "prune").seed == 4
    assert named.seed == 3
    made = as_recipe(SECTIONS, [], "prune")
    assert isinstance(made, Recipe)
    assert made.output.dir == "runs/prune"
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(SECTIONS))
    assert as_recipe(file, [], "prune").model == made.model


@pytest.mark.parametrize(
    ("given", "verb", "words"),
    [
        ({"model": {}}, "prune", "data"),
        (3, "prune", "type int.*expected a path"),
        ({**SECTIONS, "data": {"id": object()}}, "prune", "no YAML file could"),
        (SECTIONS, "compare", "compare: missing"),
        ({**SECTIONS, "compare": {"criteria": ["random"]}}, "prune", "not for prune"),
    ],
)
def test_what_is_wrong_with_sections_is_said_in_words(given, verb, words):
    with pytest.raises(RecipeError, match=f"(?s){words}"):
        as_recipe(given, [], verb)


def _samples(num=80):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(num, 4, generator=generator)
    return [(point, (point.sum() > 0).long()) for point in points]


def _net():
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    net[1].eval()  # a mode of the caller's own
    return net


@pytest.mark.parametrize("shape", [(3, 8, 8), (4,)])
def test_batches_in_the_place_of_samples_are_told(shape):
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2)]
    net = torch.nn.Sequential(*layers) if len(shape) == 3 else _net()
    batches = [(torch.randn(8, *shape), torch.arange(8) % 2) for _ in range(20)]
    with pytest.raises(DataError, match=r"holds batches, as .*score takes them.*sample in zip"):
        sosp_hub.finetune(net, batches, learning_rate=0.1)
    samples = [sample for inputs, labels in batches for sample in zip(inputs, labels, strict=True)]
    sosp_hub.finetune(net, samples, learning_rate=0.01, epochs=1)


def test_an_error_of_samples_that_could_be_batches_is_left_alone():
    """A model of vectors takes a sample alone too."""

    def loss(outputs, targets):
        if torch.is_grad_enabled():
            raise RuntimeError("out of memory")
        return (outputs - targets).square().mean()

    samples = [(torch.randn(4), torch.randn(4)) for _ in range(20)]
    with pytest.raises(RuntimeError, match="out of memory"):
        sosp_hub.finetune_(torch.nn.Linear(4, 4), samples, learning_rate=0.1, loss_fn=loss)


def test_an_error_of_samples_is_left_alone():
    samples = [(torch.randn(5), torch.tensor(i % 2)) for i in range(20)]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        sosp_hub.finetune(_net(), samples, learning_rate=0.1)


@pytest.mark.slow
def test_finetune_gives_a_better_copy_and_leaves_all_else_as_it_was():
    net, data, before = _net(), _samples(), random_states()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    better = sosp_hub.finetune(net, data, learning_rate=0.05, epochs=4, batch_size=8)
    assert random_states() == before
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in state.items())
    for model in (net, better):
        assert [m.training for m in model.modules()] == [True, True, False, True]
    losses = [
        torch.nn.functional.cross_entropy(
            model(torch.stack([x for x, _ in data])), torch.stack([y for _, y in data])
        )
        for model in (net, better)
    ]
    assert losses[1] < losses[0] / 2
    own = _net()
    done = sosp_hub.finetune_(own, data, learning_rate=0.05, epochs=4, batch_size=8)
    assert all(
        torch.equal(tensor, better.state_dict()[name]) for name, tensor in own.state_dict().items()
    )
    assert (done.num_held_out, done.selected.epoch > 0) == (8, True)


@pytest.mark.slow
def test_finetune_follows_a_teacher_and_says_what_is_wrong():
    data, teacher = _samples(), _net()
    options = {"learning_rate": 0.05, "batch_size": 8}
    hard = sosp_hub.finetune(_net(), data, **options)
    soft = sosp_hub.finetune(_net(), data, **options, teacher=teacher, distill=1.0)
    same = torch.stack([x for x, _ in data])
    distances = [(model(same) - teacher(same)).square().mean() for model in (soft, hard)]
    assert distances[0] < distances[1]
    dicts = [{"x": x, "labels": y} for x, y in data]

    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = _net()

        def forward(self, x):
            return self.net(x)

    assert isinstance(sosp_hub.finetune(Named(), dicts, epochs=1, **options), Named)
    with pytest.raises(RecipeError, match="nothing is followed; give teacher="):
        sosp_hub.finetune(_net(), data, **options, distill=0.5)
    with pytest.raises(RecipeError, match=r"(?s)augment: belongs to a recipe.*epoch: unknown key"):
        sosp_hub.finetune(_net(), data, **options, epoch=3, augment=True)
    with pytest.raises(DataError, match="expected samples with a length and an index"):
        sosp_hub.finetune(_net(), iter(data), **options)


def test_plots_are_figures_of_what_the_verbs_return(tmp_path):
    net = _net()
    graph = sosp_hub.trace(net, (torch.randn(1, 4),))
    scores = sosp_hub.score(net, graph, [], criterion="magnitude")
    plan = sosp_hub.allocate(graph, scores, structures=0.5)

    def words(figure):
        return " ".join(text.get_text() for axes in figure.axes for text in axes.texts)

    assert "16 of 16" in words(sosp_hub.plot(graph))
    assert "8 of 16" in words(sosp_hub.plot(plan))
    figure = sosp_hub.plot(scores, plan)
    dots = [len(dots.get_offsets()) for dots in figure.axes[0].collections]
    assert dots == [8, 8]  # cut, kept
    assert figure._repr_png_().startswith(b"\x89PNG")
    report = {
        "groups": [{"name": "0:neuron", "kind": "neuron", "size": 16, "kept": 8}],
        "metrics": {},
    }
    assert "8 of 16" in words(sosp_hub.plot(report))
    with pytest.raises(OutputError, match="there is widths; an output folder has more"):
        sosp_hub.plot(report, picture="saliency")
    with pytest.raises(OutputError, match="no report"):
        sosp_hub.plot(tmp_path)
    with pytest.raises(PlanError, match="got int, expected a graph"):
        sosp_hub.plot(3)
    with pytest.raises(PlanError, match="16 scores, and 4 structures"):
        sosp_hub.plot(scores, PruningPlan(kept={"0:neuron": (0,)}, sizes={"0:neuron": 4}))
