"""Whatever goes wrong, every criterion says what, and the model comes back exactly as it was."""

import pytest
import torch
from torch import nn

from sosp_hub.errors import CriterionError, DataError
from sosp_hub.recipe.criteria import CRITERIA, RectifiedCriterion
from sosp_hub.scoring import score
from sosp_hub.structure.trace import trace
from sosp_hub.tasks import softmax
from tests.cases import CASES
from tests.compare import assert_close

LLAMA = next(case for case in CASES if case.name == "llama")
NEEDS = {  # without those that need a BatchNorm
    name: known.needs
    for name, known in CRITERIA.known().items()
    if not issubclass(known, RectifiedCriterion)
}
WITH_DATA = [name for name, needs in NEEDS.items() if needs != "nothing"]
WITH_LABELS = [name for name, needs in NEEDS.items() if needs == "labels"]


@pytest.fixture(scope="module")
def graph():
    return trace(LLAMA.model(), LLAMA.inputs(), outputs="logits")


def half_frozen():
    """In train mode but for a part, with weights that are not to be trained."""
    model = LLAMA.model().train()
    model.model.layers[0].eval()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    return model


def all_of(model):
    """Everything that a criterion could leave behind, but for values."""
    return [
        [(name, id(p), p.dtype, p.requires_grad, p.grad) for name, p in model.named_parameters()],
        [(name, id(b), b.dtype) for name, b in model.named_buffers()],
        [module.training for module in model.modules()],
        [{key: len(v) for key, v in vars(m).items() if "hooks" in key} for m in model.modules()],
        [sorted(vars(module)) for module in model.modules()],
    ]


class left_alone:  # noqa: N801 used like a function
    """Raises where the model is not left as it was."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.before = all_of(self.model)
        self.values = {name: value.clone() for name, value in self.model.state_dict().items()}

    def __exit__(self, *_):
        assert all_of(self.model) == self.before
        for name, value in self.model.state_dict().items():
            assert torch.equal(value.nan_to_num(7), self.values[name].nan_to_num(7)), name


@pytest.mark.parametrize("name", WITH_DATA)
def test_a_model_that_fails_is_left_alone(name, graph):
    """In its second batch, in the middle of a pass."""
    model, calls = half_frozen(), []

    def fail(*_):
        calls.append(1)
        if len(calls) > 2:
            raise KeyError("own fault")

    model.model.layers[1].mlp.down_proj.register_forward_hook(fail)
    with left_alone(model), pytest.raises(KeyError, match="own fault"):
        score(model, graph, [LLAMA.batch(2)] * 4, name)


@pytest.mark.parametrize("name", WITH_DATA)
def test_what_is_not_finite_is_said(name, graph):
    model = half_frozen()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[3, 3] = torch.nan
    with left_alone(model), pytest.raises(CriterionError, match="not finite"):
        score(model, graph, [LLAMA.batch(2)], name)


@pytest.mark.parametrize("name", WITH_LABELS)
def test_a_label_out_of_range_is_said(name, graph):
    model, batch = half_frozen(), LLAMA.batch(2)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][1, 4] = 100
    with left_alone(model), pytest.raises(DataError, match=r"label 100 .* from 0 to 99"):
        score(model, graph, [LLAMA.batch(2), batch], name)


@pytest.mark.parametrize("name", WITH_LABELS)
def test_a_loss_that_does_not_depend_on_anything_is_said(name, graph):
    model = half_frozen()
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].detach(),))
    with left_alone(model), pytest.raises(CriterionError, match="loss does not depend on"):
        score(model, graph, [LLAMA.batch(2)], name)


class _TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.other, self.last = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.body(x).relu()), self.last(self.other(x).relu())


@pytest.mark.parametrize("name", ["taylor", "sosp_h", "fisher", "sosp_i", "hap", "grasp"])
def test_a_part_that_the_loss_does_not_read_stays_whole(name, caplog):
    """An auxiliary head, say: it is named, and does not keep the others from being scored."""
    torch.manual_seed(0)
    model = _TwoHeads()
    graph = trace(model, (torch.randn(2, 4),))
    batches = [(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))]

    def loss_fn(outputs, targets):
        return softmax(outputs[0], targets)

    assert set(graph.groups) == {"body:neuron", "other:neuron"}
    with caplog.at_level("INFO"):
        scores = score(model, graph, batches, name, loss_fn=loss_fn)
    assert set(scores) == {"body:neuron"}
    assert "does not depend on 1 of 2 groups, which stay whole: other:neuron" in caplog.text


@pytest.mark.parametrize("name", NEEDS)
def test_a_batch_of_one_is_scored(name, graph):
    model = half_frozen()
    with left_alone(model):
        found = score(model, graph, [LLAMA.batch(1)], name)
    expected = score(LLAMA.model(), graph, [LLAMA.batch(1)], name)
    assert_close(found, expected, relative=1e-6)


def test_modes_are_switched_and_said(graph, caplog):
    dropout = nn.Dropout(0.5)
    model = half_frozen()
    model.model.layers[1].mlp.act_fn = nn.Sequential(model.model.layers[1].mlp.act_fn, dropout)
    with caplog.at_level("INFO"), left_alone(model):
        found = score(model, graph, [LLAMA.batch(2)], "taylor")
    assert "train mode" in caplog.text
    assert_close(found, score(LLAMA.model(), graph, [LLAMA.batch(2)], "taylor"), relative=1e-6)


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference", "autocast"],
)
@pytest.mark.parametrize("name", ["sosp_h", "sosp_i", "fisher"])
def test_the_callers_context_changes_no_derivative(name, context):
    case = next(case for case in CASES if case.name == "test_resnet")
    model, batch = case.model(), case.batch(2)
    graph = trace(model, case.inputs())
    expected = score(model, graph, [batch], name)
    with context():
        found = score(model, graph, [batch], name)
    assert_close(found, expected, relative=0)
