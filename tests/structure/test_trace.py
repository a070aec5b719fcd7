"""``trace``: what it leaves alone, what it refuses, what it says."""

import collections
import copy
import dataclasses
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sosp_hub.cost import cost
from sosp_hub.errors import PlanError, TraceError
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply
from sosp_hub.surgery.widen import widen
from tests.cases import CASES
from tests.compare import assert_close
from tests.structure.oracles import gated, half, plan_of, run

LLAMA = next(case for case in CASES if case.name == "llama")
RESNET = next(case for case in CASES if case.name == "test_resnet")


@pytest.mark.parametrize("fake", [True, False])
@pytest.mark.parametrize("case", [LLAMA, RESNET], ids=str)
def test_the_model_and_its_inputs_are_not_touched(case, fake):
    model = case.model().train()
    before = copy.deepcopy(model.state_dict())
    plain = {name: dict(vars(module)) for name, module in model.named_modules()}
    inputs = case.inputs()
    same = copy.deepcopy(inputs)
    random = torch.random.get_rng_state()
    trace(model, inputs, fake=fake)
    assert_close(model.state_dict(), before, relative=0)
    assert_close(inputs, same, relative=0)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), random)
    for name, module in model.named_modules():
        assert vars(module).keys() == plain[name].keys()
        for key, value in vars(module).items():
            assert value is plain[name][key], f"{name}.{key}"
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.slow
def test_train_mode_eval_mode_and_frozen_weights_give_one_graph():
    models = RESNET.model(), RESNET.model().train(), RESNET.model().requires_grad_(False)
    assert len({str(trace(model, RESNET.inputs())) for model in models}) == 1
    models = OnlyInTraining().eval(), OnlyInTraining().train()
    graphs = [trace(model, (torch.randn(2, 5),)) for model in models]
    assert len({str(graph) for graph in graphs}) == 1
    assert [graph.only_in_training for graph in graphs] == [("extra",)] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_does_not_matter(dtype):
    (x,) = RESNET.inputs()
    assert str(trace(RESNET.model().to(dtype), (x.to(dtype),))) == str(trace(RESNET.model(), (x,)))


def test_weights_are_not_needed():
    meta = LLAMA.model().to("meta")
    assert str(trace(meta, LLAMA.inputs())) == str(trace(LLAMA.model(), LLAMA.inputs()))


def test_positional_and_keyword_inputs_are_one():
    model, (x,) = RESNET.model(), RESNET.inputs()
    texts = [str(trace(model, inputs)) for inputs in (x, (x,), [x], {"x": x})]
    assert len(set(texts)) == 1


class OnlyInTraining(nn.Module):
    """A head that training alone uses, and two outputs."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.extra = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x):
        hidden = self.body(x)
        logits = self.head(hidden)
        return {
            "hidden": hidden,
            "logits": logits,
            "extra": self.extra(hidden) if self.training else 0,
        }


def test_of_a_training_pass_too_the_named_outputs_matter_alone():
    graph = trace(OnlyInTraining().eval(), (torch.randn(2, 5),), outputs="logits")
    (group,) = graph.groups.values()
    assert {member.tensor for member in group.members} >= {"body.weight", "extra.weight"}


class Responses(nn.Module):
    """Channels inside a block that are set against each other, as ConvNeXt V2 does."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.norm = nn.LayerNorm(6)
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.local = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.scale, self.shift = nn.Parameter(torch.ones(1, 1, 1, 8)), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        h = self.local(self.up(self.norm(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        size = h.norm(dim=(1, 2), keepdim=True)
        h = self.scale * (h * size / (size.mean(-1, keepdim=True) + 1e-6)) + self.shift + h
        return self.head((x + self.down(h)).mean((1, 2)))


def test_what_is_normalised_inside_a_block_is_no_residual_stream():
    graph = trace(Responses(), (torch.randn(2, 3, 8, 8),))
    kinds = {group.size: group.kind for group in graph.groups.values()}
    assert kinds == {6: "residual", 8: "channel"}


def test_an_output_that_does_not_matter_may_change_its_size():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x):
            hidden = self.body(x)
            return {"hidden": hidden, "logits": self.head(hidden)}

    model, x = Two(), (torch.randn(2, 5),)
    graph = trace(model, x)
    assert not graph.groups
    assert "'hidden' (" in str(graph)
    assert "outputs='logits'" in graph.describe()
    assert not trace(model, x, outputs="logits").advice
    assert [group.size for group in trace(model, x, outputs="logits").groups.values()] == [6]
    assert not trace(model, x, outputs=["logits", "hidden"]).groups
    with pytest.raises(TraceError, match=r"hidden, logits; expected loss"):
        trace(model, x, outputs="loss")
    with pytest.raises(TraceError, match="without names"):
        trace(nn.Linear(5, 3), x, outputs="logits")
    with pytest.raises(TraceError, match="hidden, logits; expected 1"):
        trace(model, x, outputs=1)


@dataclasses.dataclass
class _Outputs:
    logits: torch.Tensor
    hidden: torch.Tensor


_Pair = collections.namedtuple("_Pair", "logits hidden")


@pytest.mark.parametrize("wanted", ["logits", 0])
@pytest.mark.parametrize("form", [_Outputs, _Pair, lambda *both: both])
def test_outputs_by_name_or_position(form, wanted):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x):
            hidden = self.body(x)
            return form(self.head(hidden), hidden)

    model, x = Two(), (torch.randn(2, 5),)
    assert not trace(model, x).groups  # every tensor inside is an output
    if isinstance(form(1, 2), tuple) and not hasattr(form(1, 2), "_fields") and wanted != 0:
        with pytest.raises(TraceError, match="a tuple without names of 2: 0 to 1; expected logits"):
            trace(model, x, outputs=wanted)
        return
    graph = trace(model, x, outputs=wanted)
    assert [group.size for group in graph.groups.values()] == [6]
    name = next(iter(graph.groups))
    small = apply(model, graph, PruningPlan({name: (0, 2)}, {name: 6}))
    assert small.head.in_features == 2


def test_a_model_that_returns_no_tensor():
    class Count(nn.Linear):
        def forward(self, x):
            return {"sum": float(super().forward(x).sum().item())}

    with pytest.raises(TraceError, match="a dict without a tensor, so that no cut"):
        trace(Count(5, 3), (torch.randn(2, 5),))


def test_a_list_of_images_counts_samples():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, images):
            return self.head(self.body(torch.stack(images)).relu())

    graph = trace(Listed(), ([torch.randn(3, 4, 4), torch.randn(3, 4, 4)],))
    assert cost(graph).macs == (3 * 6 + 6 * 2) * 16
    name = next(iter(graph.groups))
    plan = PruningPlan({name: (0, 2)}, {name: 6})
    apply(Listed(), graph, plan)
    assert graph.routes.unchecked == {}


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((torch.randn(2, 3, 32, 31, 7),), r"float32\[2, 3, 32, 31, 7\]"),
        ((torch.randn(2, 4, 32, 32),), r"float32\[2, 4, 32, 32\]"),
        ((), "at least one tensor"),
        (({},), "at least one tensor"),
        ({"pixels": torch.randn(2, 3, 32, 32)}, "pixels"),
        (("a picture",), "a picture"),
    ],
)
def test_inputs_that_do_not_fit_are_described(inputs, words):
    with pytest.raises(TraceError, match=words):
        trace(RESNET.model(), inputs)


def test_an_error_in_the_model_is_told():
    class Breaks(nn.Linear):
        def forward(self, x):
            raise RuntimeError("no coffee")

    with pytest.raises(TraceError, match="no coffee"):
        trace(Breaks(5, 3), (torch.randn(2, 5),))


def test_a_model_that_needs_its_data_cannot_be_traced_without_it():
    class Looks(nn.Linear):
        def forward(self, x):
            return super().forward(x) if self.weight.sum().item() > -1e9 else x

    with pytest.raises(TraceError, match="load the weights"):
        trace(Looks(5, 3).to("meta"), (torch.randn(2, 5),))


# --- the text ---


def test_the_text_lists_groups_members_ties_and_what_is_pinned():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    text = trace(model, (torch.randn(2, 5),)).describe()
    assert text.splitlines()[1:5] == [
        "0:neuron  size 6",
        "    makes 0.weight[0]",
        "    makes 0.bias[0]",
        "    reads 2.weight[1]",
    ]
    assert "pinned: 0.weight[1]: an input of the model has this size" in text
    assert "pinned: 2.weight[0], 2.bias[0]: an output of the model has this size" in text
    assert re.match(r"1 groups?; 94\.7 % of 57 parameters can be cut \(94\.7 % exactly\)", text)


# --- the gates' places ---


@pytest.mark.parametrize("case", CASES, ids=str)
def test_members_and_sites_fit_their_tensors(case):
    model = case.model()
    graph = trace(model, case.inputs())
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for group in graph.groups.values():
        for member in group.members:
            assert member.index.shape == (tensors[member.tensor].shape[member.dim],)
            assert set(member.index.tolist()) >= set(range(group.size))
            assert set(member.index.tolist()) <= set(range(-1, group.size))
        for site in group.sites:
            assert (site.module is None) != (site.weight is None)
            assert set(site.index.tolist()) <= set(range(-1, group.size))
            if site.weight is not None:
                assert site.index.shape == (tensors[site.weight].shape[site.dim],)
        if group.exact and group.kind not in {"head_dim", "layer"}:
            assert group.sites, f"nothing reads {group.name}"
        assert group.members or group.layers


def test_names_say_where_a_group_is_made():
    graph = trace(LLAMA.model(), LLAMA.inputs(), outputs="logits")
    assert {name for name in graph.groups if name.startswith("model.layers.0.")} == {
        "model.layers.0.self_attn.q_proj:kv_group",
        "model.layers.0.self_attn.q_proj:head",
        "model.layers.0.mlp.gate_proj:neuron",
    }
    for name, group in graph.groups.items():
        assert name == group.name
        assert name.rpartition(":")[2].partition("#")[0] == group.kind


class BlocksGateTheirInput(nn.Module):
    """A square weight of blocks: it sums over its middle dimension, its last one gates the sum."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(5, 12), nn.Linear(12, 3)
        self.blocks = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x):
        h = self.before(x).unflatten(-1, (self.blocks.shape[0], -1))
        gates = torch.bmm(h.movedim(1, 0), self.blocks).movedim(0, 1).sigmoid()
        return self.after((h * gates).flatten(1))


def test_gates_of_a_square_weight_sit_where_it_is_summed_over():
    torch.manual_seed(0)
    model, x = BlocksGateTheirInput().eval(), torch.randn(2, 5)
    graph = trace(model, (x,))
    assert {group.kind for group in graph.groups.values()} <= {"neuron", "channel"}  # no experts
    plan = half(graph, lambda group: group.exact)
    assert len(plan.kept) == 2
    assert_close(run(apply(model, graph, plan), graph), gated(model, graph, plan))


class Standardised(nn.Conv2d):
    """As in NFNet and BiT: the weight has mean 0 and variance 1 before it is used."""

    def forward(self, x):
        flat = self.weight.reshape(1, self.weight.shape[0], -1)
        weight = F.batch_norm(flat, None, None, training=True, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight)


class OfNoLayer(nn.Module):
    """The same, where no layer's input can be gated."""

    def __init__(self, *sizes):
        super().__init__()
        self.weight = nn.Conv2d(*sizes).weight

    forward = Standardised.forward


@pytest.mark.parametrize("kind", [Standardised, OfNoLayer])
def test_a_weight_that_is_standardised_reads_and_is_no_place_for_a_gate(kind):
    model = nn.Sequential(nn.Conv2d(2, 6, 1), kind(6, 3, 1)).eval()
    graph = trace(model, (torch.randn(2, 2, 4, 4),))
    group = graph.groups["0:channel"]
    assert (group.kind, group.size, group.exact) == ("channel", 6, False)
    assert [(member.tensor, member.dim) for member in group.members if member.reads] == [
        ("1.weight", 1)
    ]
    gated_at = [(site.module, site.weight, site.dim) for site in group.sites]
    assert gated_at == ([("1", None, 1)] if kind is Standardised else [])
    assert graph.fold_obstacle(group.name) == (
        "'1.weight' is normalised before it reads" if gated_at else "no weight reads it"
    )
    pruned = apply(model, graph, half(graph))
    assert pruned[1].weight.shape == (3, 3, 1, 1)
    twice = {group.name: (2,) * 6}
    with pytest.raises(PlanError, match="normalised before it" if gated_at else "not only weights"):
        widen(model, graph, twice, verify="fast")


def test_weights_that_are_standardised_keep_more_than_one_column():
    model = nn.Sequential(nn.Conv2d(2, 6, 1), Standardised(6, 3, 1)).eval()
    graph = trace(model, (torch.randn(2, 2, 4, 4),))
    assert graph.groups["0:channel"].barred == {1}
    apply(model, graph, plan_of(graph, {"0:channel": (1, 4)}), strict=True)
    wide = nn.Sequential(nn.Conv2d(2, 6, 1), Standardised(6, 3, 3)).eval()
    assert not trace(wide, (torch.randn(2, 2, 4, 4),)).groups["0:channel"].barred


class FindsNothing(torch.nn.Module):
    """Asks for the size of what is empty, as detectors do of an image in which nothing is."""

    def __init__(self):
        super().__init__()
        self.hidden, self.last = torch.nn.Linear(6, 24), torch.nn.Linear(24, 4)

    def forward(self, x):
        hidden = self.hidden(x).relu()
        scores = hidden[hidden > 1e9]
        best = scores.topk(min(100, scores.size(0)))[0]
        boxes = hidden[:, :4][hidden[:, 0] > 1e9]
        corners = boxes.view(len(boxes), 2, 2)
        assert (scores.shape, boxes.shape, corners.numel()) == ((0,), (0, 4), 0)
        return self.last(hidden) + best.sum() + corners.sum()


def test_an_empty_tensor_has_the_size_0():
    """It was told to have 1: torchvision's FCOS stopped at a topk of 1 out of 0."""
    model, inputs = FindsNothing().eval(), (torch.randn(3, 6),)
    graph = trace(model, inputs)
    assert model(*inputs).shape == (3, 4)
    assert not any("last" in name for name in graph.groups)


@torch.library.custom_op("sosp_hub_tests::mirrored", mutates_args=())
def mirrored(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1)


@mirrored.register_fake
def _(x):
    return torch.empty_like(x)


class Mirrors(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(mirrored(self.first(x)))


def test_what_an_operation_without_a_rule_is_given_stays_whole():
    graph = trace(Mirrors(), (torch.randn(2, 5),))
    assert not graph.groups
    reasons = {pin.tensor: pin.reason for pin in graph.pinned if pin.size == 6}
    assert reasons.keys() == {"first.weight", "first.bias", "last.weight"}
    assert all("`mirrored` has no rule" in reason for reason in reasons.values())


class Clamps(nn.Module):
    """Writes to its weight in its forward pass; may go on where it cannot."""

    def __init__(self, goes_on):
        super().__init__()
        self.up, self.down, self.goes_on = nn.Linear(6, 8), nn.Linear(8, 3), goes_on

    def forward(self, x):
        try:
            self.up.weight.data.clamp_(-0.01, 0.01)
        except Exception:
            if not self.goes_on:
                raise
        return self.down(self.up(x).relu())


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_trace_with_data_does_not_write_to_the_weights_of_the_model(goes_on):
    """It shares them, but for models that write to them."""
    model = Clamps(goes_on).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = trace(model, (torch.randn(2, 6),), fake=False)
    assert_close(model.state_dict(), before, relative=0)
    assert graph.written == {"up.weight"}
