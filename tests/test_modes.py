"""Verbs leave every module in the mode that it was in, also a norm frozen in a training model."""

import copy
import gc
from contextlib import contextmanager, nullcontext

import pytest
import timm
import torch
from torch import nn

import sosp_hub
from sosp_hub.errors import CriterionError, DataError, ModelError
from sosp_hub.evaluate import metrics_of_samples
from sosp_hub.modes import collector_paused, evaluating, in_own_modes
from sosp_hub.pipeline import any_budget
from sosp_hub.reconstruction.norms import recalibrate_norm
from sosp_hub.reconstruction.rebuild import rebuilt_weights
from tests.compare import assert_close

X, Y = torch.randn(8, 3, 6, 6), torch.randint(3, (8,))
BATCHES = [(X, Y)]
IMAGES = torch.randn(2, 3, 160, 160)  # the size that is exported
SAMPLES = list(zip(X, Y, strict=True))
CRITERIA = ("taylor", "sosp_h", "sosp_i", "magnitude", "activation", "random", "flap", "scp")


def half_frozen():
    """In train mode, but for one norm."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    )
    model.train()
    model[1].eval()
    return model


def modes(model):
    return [module.training for module in model.modules()]


def plan_of(model):
    graph = sosp_hub.trace(model, (X,))
    scores = sosp_hub.score(model, graph, BATCHES, criterion="fisher")
    return graph, scores, sosp_hub.allocate(graph, scores, params=0.7)


def gradual(model):
    sosp_hub.GradualPruning(model, (X,), BATCHES, rounds=2, params=0.5).cut()


def within(model):
    graph, scores, _ = plan_of(model)
    held_out = [(torch.randn(300, 3, 6, 6), torch.zeros(300, dtype=torch.long))]
    found = sosp_hub.allocate_within(
        model, graph, scores, held_out, max_drop={"divergence": 99}, rebuild=BATCHES, num_probes=1
    )
    assert modes(found.model) == modes(model)


VERBS = {
    "evaluate": lambda model: sosp_hub.evaluate(model, BATCHES),
    "samples": lambda model: metrics_of_samples(model, BATCHES, ["loss"]),
    "trace, score and allocate": plan_of,
    "gradual": gradual,
    "norms": lambda model: recalibrate_norm(model, BATCHES),
    "within": within,
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_modes_are_as_they_were(verb):
    model = half_frozen()
    before = modes(model)
    VERBS[verb](model)
    assert modes(model) == before
    assert len(set(before)) == 2


@pytest.mark.parametrize("verb", [sosp_hub.apply, sosp_hub.rebuild])
def test_what_is_made_of_a_model_has_its_modes(verb):
    model = half_frozen()
    graph, _, plan = plan_of(model)
    data = (BATCHES,) if verb is sosp_hub.rebuild else ()
    assert modes(verb(model, graph, plan, *data)) == modes(model)


def test_norms_of_a_training_model_are_estimated_as_it_is_used():
    """Without its dropout, whose noise would move the statistics and the caller's generator."""
    found = {}
    for training in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
        ).train(training)
        before = torch.get_rng_state()
        recalibrate_norm(model, [(torch.randn(32, 4, generator=torch.Generator()), None)])
        assert torch.equal(torch.get_rng_state(), before)
        found[training] = model[3].running_var
    assert_close(found[True], found[False], relative=0)


def test_modes_come_back_after_an_error_too():
    model = half_frozen()
    before = modes(model)
    with evaluating(model):
        assert not any(modes(model))
    assert modes(model) == before
    with pytest.raises(RuntimeError):
        sosp_hub.evaluate(model, [(X[:, :2], Y)])
    assert modes(model) == before


@pytest.mark.parametrize(
    ("metrics", "batches", "words"),
    [
        (["acuracy"], BATCHES, "did you mean 'accuracy'"),
        ("nope", BATCHES, "no metric 'nope'; there are accuracy, loss"),
        (["loss"], [], "there is no batch"),
    ],
)
def test_what_cannot_be_measured_is_said(metrics, batches, words):
    with pytest.raises(DataError, match=words):
        sosp_hub.evaluate(half_frozen(), batches, metrics)


def test_one_metric_needs_no_list():
    assert set(sosp_hub.evaluate(half_frozen(), BATCHES, "loss")) == {"loss"}


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def default_device(device="meta"):
    """A stand-in for an accelerator: generators of the CPU do not work with it."""
    return torch.device(device)


@contextmanager
def set_device(device="meta"):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def every_verb(model, fresh, folder):
    """What each verb gives, in tensors and numbers, and the models that were made."""
    graph = sosp_hub.trace(model, (X,))
    found, made = {}, {}
    for criterion in CRITERIA:
        found[criterion] = dict(sosp_hub.score(model, graph, BATCHES, criterion=criterion))
    plan = sosp_hub.allocate(graph, found["taylor"], params=0.7)
    made["apply"] = sosp_hub.apply(model, graph, plan)
    made["rebuild"] = sosp_hub.rebuild(model, graph, plan, BATCHES)
    sosp_hub.save_pretrained(made["apply"], folder)
    made["load"] = sosp_hub.from_pretrained(folder, model=fresh)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found["carry"] = sosp_hub.carry(average, made["apply"], graph, plan)
    measured = sosp_hub.evaluate(model, BATCHES, ["loss", "accuracy"])
    found["evaluate"] = {name: each.value for name, each in measured.items()}
    made["apply_"] = sosp_hub.apply_(model, graph, plan)
    found |= {name: dict(each.state_dict()) for name, each in made.items()}
    return found, made


@pytest.mark.parametrize("collecting", [True, False])
def test_the_collector_is_as_the_caller_has_it_after_an_error_too(collecting):
    before = gc.isenabled()
    (gc.enable if collecting else gc.disable)()
    try:
        with pytest.raises(ValueError, match="off"), collector_paused():
            raise ValueError("on" if gc.isenabled() else "off")
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad, autocast, default_device, set_device]
)
def test_modes_of_torch_that_the_caller_is_in_change_nothing(mode, tmp_path):
    expected, _ = every_verb(half_frozen().eval(), half_frozen(), tmp_path / "plain")
    model, fresh = half_frozen().eval(), half_frozen()
    with mode():
        found, made = every_verb(model, fresh, tmp_path / "within")
    assert_close(found, expected, relative=1e-6)
    for model in made.values():
        nn.functional.cross_entropy(model(X), Y).backward()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [torch.inference_mode, set_device])
def test_a_model_is_exported_and_saved_by_its_library_in_any_mode(mode, tmp_path):
    model = timm.create_model("test_resnet", num_classes=3).eval()
    graph = sosp_hub.trace(model, (IMAGES,))
    scores = sosp_hub.score(model, graph, [], criterion="magnitude")
    plan = sosp_hub.allocate(graph, scores, params=0.7)
    with mode():
        small = sosp_hub.apply(model, graph, plan)
        timm.models.save_for_hf(small, tmp_path / "own", safe_serialization=True)
        sosp_hub.save_pretrained(small, tmp_path / "saved")
        program = sosp_hub.export(tmp_path / "saved", "torch-export", tmp_path / "small.pt2")
        sosp_hub.push_to_hub(small, "me/small", dry_run=True)
    expected = small(IMAGES)
    assert_close(torch.export.load(program).module()(IMAGES), expected, relative=1e-5)
    assert_close(sosp_hub.from_pretrained(tmp_path / "own")(IMAGES), expected, relative=1e-5)


class Counting(nn.Module):
    """Numbers its inputs on the default device, as much code for accelerators does."""

    def __init__(self):
        super().__init__()
        self.layers, self.devices = half_frozen(), set()

    def forward(self, x):
        self.devices.add(torch.get_default_device())
        return self.layers(x[torch.arange(len(x))])


@pytest.mark.slow
def test_what_is_the_callers_runs_with_the_callers_default_device(tmp_path):
    """Models on it, losses, batches that are made when asked for, samples."""
    asked = set()

    def loss_fn(outputs, targets):
        asked.add(("loss", torch.get_default_device()))
        return nn.functional.cross_entropy(outputs, targets)

    class Made(list):
        def __iter__(self):
            asked.add(("batches", torch.get_default_device()))
            yield from super().__iter__()

        def __getitem__(self, index):
            asked.add(("samples", torch.get_default_device()))
            return super().__getitem__(index)

    class Lazy:
        def __iter__(self):
            return iter(Made(BATCHES))

    model, graphless = Counting().eval(), Counting().eval()
    with set_device("cpu:0"):
        graph = sosp_hub.trace(model, (X,))
        scores = sosp_hub.score(model, graph, Lazy(), criterion="taylor", loss_fn=loss_fn)
        plan = sosp_hub.allocate(graph, scores, params=0.7)
        small = sosp_hub.rebuild(model, graph, plan, Lazy())
        sosp_hub.evaluate(small, (batch for batch in Lazy()), "loss", loss_fn=loss_fn)
        options = {"epochs": 1, "learning_rate": 0.01, "batch_size": 4}
        sosp_hub.finetune(graphless, Made(SAMPLES), loss_fn=loss_fn, **options)
    devices = model.devices | small.devices | graphless.devices
    assert devices | {device for _, device in asked} == {torch.device("cpu:0")}
    assert {name for name, _ in asked} == {"loss", "batches", "samples"}


def test_own_tensors_of_a_pass_are_not_on_the_callers_default_device():
    """Measurements inside a pass of a model that has a part on that device."""
    expected = {}
    for within in (nullcontext(), set_device()):
        model = half_frozen().eval()
        model.register_buffer("beside", torch.zeros(1, device="meta"), persistent=False)
        with within:
            graph = sosp_hub.trace(model, (X,))
            found = {
                criterion: dict(sosp_hub.score(model, graph, BATCHES, criterion=criterion))
                for criterion in CRITERIA
            }
            plan = sosp_hub.allocate(graph, found["taylor"], params=0.7)
            rebuilt = in_own_modes(rebuilt_weights)(model, graph, plan, BATCHES * 4).model
        assert_close(found, expected.setdefault("scores", found), relative=1e-6)
        state = {name: value for name, value in rebuilt.state_dict().items() if name != "beside"}
        assert_close(state, expected.setdefault("rebuilt", state), relative=1e-6)


def test_a_model_is_loaded_to_the_default_device(tmp_path, monkeypatch):
    model = timm.create_model("test_resnet", num_classes=3).eval()
    sosp_hub.save_pretrained(model, tmp_path / "a")
    with default_device("meta"):
        loaded = sosp_hub.from_pretrained(tmp_path / "a")
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()), relative=0)
    moved = []
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moved.append(device) or self)
    monkeypatch.setattr(any_budget, "callers_device", lambda: torch.device("mps"))
    sosp_hub.from_pretrained(tmp_path / "a")
    assert moved[-1] == torch.device("mps")
    moved.clear()
    monkeypatch.setattr(timm.models.ResNet, "is_quantized", True, raising=False)
    sosp_hub.from_pretrained(tmp_path / "a")
    assert torch.device("mps") not in moved  # those refuse to move


@pytest.mark.slow
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, autocast, set_device])
def test_a_training_in_a_mode_of_the_callers_is_as_without(mode):
    found = []
    for within in (nullcontext(), mode()):
        model = half_frozen()
        options = {"epochs": 3, "learning_rate": 0.01, "batch_size": 4}
        teacher = copy.deepcopy(model)
        with within:
            curve = sosp_hub.finetune_(model, SAMPLES, teacher=teacher, distill=0.5, **options)
            value = sosp_hub.evaluate(model, BATCHES, ["loss"])["loss"].value
        assert curve
        found.append(dict(model.state_dict()) | {"loss": torch.tensor(value)})
    assert_close(*found, relative=1e-6)


def test_a_model_whose_sizes_are_not_known_yet_is_refused():
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))
    for verb in (
        lambda: sosp_hub.trace(model, (X,)),
        lambda: sosp_hub.evaluate(model, BATCHES),
    ):
        with pytest.raises(ModelError, match=r"'0.weight' of the Sequential has no size .* run"):
            verb()


def test_a_model_without_weights_is_refused_where_they_are_needed(tmp_path):
    model = half_frozen().eval()
    graph = sosp_hub.trace(model, (X,))
    bare = copy.deepcopy(model).to("meta")
    for verb in (
        lambda: sosp_hub.score(bare, graph, BATCHES, criterion="taylor"),
        lambda: sosp_hub.evaluate(bare, BATCHES),
        lambda: sosp_hub.finetune(bare, SAMPLES, learning_rate=0.01),
        lambda: sosp_hub.finetune(model, SAMPLES, learning_rate=1, teacher=bare, distill=0.5),
        lambda: sosp_hub.save_pretrained(bare, tmp_path / "bare"),
    ):
        with pytest.raises(ModelError, match=r"the Sequential has no weights \(meta device\)"):
            verb()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_graph_is_for_the_model_that_was_traced(criterion):
    """A model that was cut meanwhile; ``random`` gave scores for what is gone."""
    model = half_frozen()
    graph, _, plan = plan_of(model)
    sosp_hub.apply_(model, graph, plan)
    with pytest.raises(CriterionError, match=r"not the model that was traced: .*; trace it again"):
        sosp_hub.score(model, graph, BATCHES, criterion=criterion)


def test_inputs_come_in_the_dtype_of_the_model():
    """Half and double precision, from the one that loaders give."""
    found = [
        sosp_hub.evaluate(half_frozen().to(dtype), BATCHES, "loss")["loss"].value
        for dtype in (torch.float32, torch.float64)
    ]
    assert_close(*map(torch.tensor, found), relative=1e-5)


def test_a_model_without_an_eval_mode_is_refused():
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(2, 4)
    program = torch.export.export(net, (x,)).module()
    graph = sosp_hub.trace(program, (x,))
    for verb in (
        lambda: sosp_hub.score(program, graph, [(x, torch.tensor([0, 1]))]),
        lambda: sosp_hub.evaluate(program, [(x, torch.tensor([0, 1]))]),
    ):
        with pytest.raises(ModelError, match=r"has no eval mode .*torch\.export"):
            verb()


def test_a_model_that_was_made_in_inference_mode_is_refused(tmp_path):
    with torch.inference_mode():
        model = half_frozen()
    for verb in (
        lambda: sosp_hub.trace(model, (X,)),
        lambda: sosp_hub.trace(model=model, example_inputs=(X,)),
        lambda: sosp_hub.save_pretrained(model, tmp_path),
    ):
        with pytest.raises(ModelError, match=r"the Sequential was made in torch.inference_mode"):
            verb()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_callers_default_dtype_does_not_round_what_is_loaded(dtype, tmp_path):
    model = timm.create_model("test_resnet", num_classes=3).eval()
    sosp_hub.save_pretrained(model, tmp_path / "single")
    sosp_hub.save_pretrained(copy.deepcopy(model).double(), tmp_path / "double")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = [sosp_hub.from_pretrained(tmp_path / name) for name in ("single", "double")]
        assert nn.Linear(1, 1).weight.dtype == dtype  # what the caller builds next
    finally:
        torch.set_default_dtype(before)
    for each, kind in zip(found, (torch.float32, torch.float64), strict=True):
        assert {parameter.dtype for parameter in each.parameters()} == {kind}
        state = {name: tensor.to(kind) for name, tensor in model.state_dict().items()}
        found_state = {name: tensor.to(kind) for name, tensor in each.state_dict().items()}
        assert_close(found_state, state, relative=0)


def test_a_teacher_in_train_mode_is_followed_as_in_eval_mode_and_stays_as_it_is():
    """Its dropout and batch statistics were in what was followed, and its norms moved on."""
    small = half_frozen().eval()
    results = []
    for training in (True, False):
        teacher = nn.Sequential(half_frozen(), nn.Dropout(0.5)).train(training)
        before, its_modes = copy.deepcopy(teacher.state_dict()), modes(teacher)
        options = {"epochs": 1, "batch_size": 2, "held_out": 0.0, "distill": 1.0}
        student = nn.Sequential(copy.deepcopy(small), nn.Identity())
        made = sosp_hub.finetune(student, SAMPLES, learning_rate=0.1, teacher=teacher, **options)
        assert_close(teacher.state_dict(), before, relative=0)
        assert modes(teacher) == its_modes
        results.append(made.state_dict())
    assert_close(*results, relative=0)
    with pytest.raises(ModelError, match="would follow itself"):
        sosp_hub.finetune_(student, SAMPLES, learning_rate=0.1, teacher=student, **options)
