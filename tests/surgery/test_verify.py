"""Verification has to fail: each test breaks a cut in one way and expects to be told where."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from sosp_hub.allocation import allocate
from sosp_hub.cut import carry
from sosp_hub.errors import VerificationError
from sosp_hub.structure.deferred import _AT_ONCE
from sosp_hub.structure.trace import trace
from sosp_hub.surgery import apply as surgery
from sosp_hub.surgery import proof
from sosp_hub.surgery.apply import apply, cut
from sosp_hub.surgery.proof import verified_plan
from sosp_hub.surgery.verification import check
from sosp_hub.surgery.verification.masked import masked_outputs
from sosp_hub.surgery.verification.outputs import TOLERANCE, relative_error
from tests.cases import CASES
from tests.compare import assert_close
from tests.structure.oracles import difference, fill, gated, half, plan_of, run

LLAMA = next(case for case in CASES if case.name == "llama")
RESNET = next(case for case in CASES if case.name == "test_resnet")


KINDS = ("neuron", "head", "head_dim")


def ones(graph):
    return {name: torch.ones(group.size) for name, group in graph.groups.items()}


class Block(nn.Module):
    """Two groups: ``one`` (between the first two layers) and ``two`` (between the last two)."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(8, 3)
        self.heads = 2

    def forward(self, x):
        x = self.two(self.one(x).relu())
        x = x.view(*x.shape[:-1], self.heads, -1).softmax(1).flatten(-2)
        return self.three(x)


@pytest.fixture
def block():
    torch.manual_seed(0)
    model = fill(Block().eval())
    return model, trace(model, (torch.randn(2, 4, 5),))


def sabotage_positions(monkeypatch, graph, tensor, dim):
    """Another choice of positions for one dimension of one tensor."""
    right = type(graph).kept_positions

    def wrong(self, name, plan):
        positions = right(self, name, plan)
        if name != tensor or positions[dim] is None:
            return positions
        size = sum(1 for _ in positions[dim])
        moved = np.arange(size)  # the first ones, whatever was asked for
        return tuple(moved if i == dim else p for i, p in enumerate(positions))

    monkeypatch.setattr(type(graph), "kept_positions", wrong)


def group_of(graph, tensor, dim):
    """The group that cuts one dimension of a tensor."""
    (name,) = [
        name
        for name, group in graph.groups.items()
        if any((m.tensor, m.dim) == (tensor, dim) for m in group.members)
    ][:1]
    return name


@pytest.mark.parametrize(
    ("tensor", "dim"),
    [("one.weight", 0), ("one.bias", 0), ("two.weight", 1), ("two.weight", 0), ("three.weight", 1)],
)
def test_other_indices_in_one_tensor_are_noticed(monkeypatch, block, tensor, dim):
    model, graph = block
    plan = plan_of(graph, {name: (group.size - 1,) for name, group in graph.groups.items()})
    apply(model, graph, plan)
    sabotage_positions(monkeypatch, graph, tensor, dim)
    with pytest.raises(VerificationError, match=group_of(graph, tensor, dim)):
        apply(model, graph, plan, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", [LLAMA, RESNET], ids=str)
def test_every_tensor_of_a_real_model_is_watched(monkeypatch, case):
    """Nothing can be cut at other indices without being noticed."""
    model = fill(case.model())
    outputs = None if case.library == "timm" else "logits"
    graph = trace(model, case.inputs(), outputs=outputs)
    for name, group in list(graph.groups.items())[::4]:
        if group.kind == "layer" or group.size < 2:
            continue
        plan = plan_of(graph, {name: tuple(range(group.size // 2, group.size))})
        for member in group.members[::7]:
            with monkeypatch.context() as patch:
                sabotage_positions(patch, graph, member.tensor, member.dim)
                with pytest.raises(VerificationError, match="Group"):
                    apply(model, graph, plan, strict=True)


@pytest.mark.parametrize("verify", ["thorough", "fast"])
def test_an_attribute_that_is_not_rewritten_is_noticed(monkeypatch, block, verify):
    model, graph = block
    (heads,) = [name for name, group in graph.groups.items() if group.size == 2]
    plan = plan_of(graph, {heads: (1,)})
    apply(model, graph, plan, verify=verify)
    monkeypatch.setattr(surgery, "rewrite", lambda *args: None)
    with pytest.raises(VerificationError, match=heads):
        apply(model, graph, plan, verify=verify, strict=True)


def test_an_attribute_that_is_set_wrongly_is_noticed(monkeypatch, block):
    """Twice the heads of half the width: every shape at the ends is right, the softmax is not."""
    model, graph = block
    (inner,) = [name for name, group in graph.groups.items() if group.size == 4]
    plan = plan_of(graph, {inner: (0, 3)})
    rewrite = surgery.rewrite

    def wrong(pruned, *args):
        rewrite(pruned, *args)
        pruned.heads = 4

    monkeypatch.setattr(surgery, "rewrite", wrong)
    for verify in ("thorough", "fast"):
        with pytest.raises(VerificationError):
            apply(model, graph, plan, verify=verify, strict=True)


@pytest.mark.parametrize("start", [0.0, 1e-6])
def test_what_constant_zeros_would_hide_is_noticed(monkeypatch, start):
    """A residual branch that starts at zero (the last norm, a layer scale) hides its insides."""
    torch.manual_seed(0)
    model = fill(RESNET.model())
    graph = trace(model, RESNET.inputs())
    name = next(n for n in graph.groups if n.startswith("layer1.0.conv1"))
    size = graph.groups[name].size
    plan = plan_of(graph, {name: tuple(range(size // 2, size))})
    sabotage_positions(monkeypatch, graph, graph.groups[name].members[0].tensor, 0)
    nn.init.constant_(model.layer1[0].bn2.weight, start)
    nn.init.zeros_(model.layer1[0].bn2.bias)
    with pytest.raises(VerificationError, match=name):
        apply(model, graph, plan, strict=True)


def test_outputs_that_are_not_numbers_are_noticed(block):
    model, graph = block
    model.one.weight.data[0] = float("nan")
    name = group_of(graph, "one.weight", 0)
    apply(model, graph, plan_of(graph, {name: (1, 2)}))  # it goes with the cut
    plan = plan_of(graph, {name: (0, 2)})
    with pytest.raises(VerificationError):
        apply(model, graph, plan, strict=True)


def test_no_number_in_the_place_of_one_is_noticed():
    found, expected = torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])
    assert relative_error([found], [expected]) == float("inf")


def test_only_the_broken_group_is_named(monkeypatch, block):
    model, graph = block
    plan = half(graph)
    wrong = group_of(graph, "two.weight", 1)
    other = group_of(graph, "two.weight", 0)
    sabotage_positions(monkeypatch, graph, "two.weight", 1)
    plan = plan_of(graph, {**plan.kept, wrong: (3, 4, 5)})
    with pytest.raises(VerificationError) as caught:
        apply(model, graph, plan, strict=True)
    assert repr(wrong) in str(caught.value)
    assert repr(other) not in str(caught.value)
    assert caught.value.groups == (wrong,)


def breaks_where_all_of(groups, monkeypatch, graph):
    """The cut fails where all of these groups are in it."""
    rewrite = surgery.rewrite

    def wrong(pruned, _, part):
        rewrite(pruned, graph, part)
        if groups <= part.kept.keys():
            raise IndexError("all at once")

    monkeypatch.setattr(surgery, "rewrite", wrong)


def test_of_groups_that_only_fail_together_one_is_named(monkeypatch, block):
    model, graph = block
    plan = half(graph)
    both = {group_of(graph, f"{name}.weight", 0) for name in ("one", "two")}
    breaks_where_all_of(both, monkeypatch, graph)
    with pytest.raises(VerificationError, match=r"the cut fails: IndexError\('all") as caught:
        apply(model, graph, plan, strict=True)
    (named,) = caught.value.groups
    assert named in both


@pytest.mark.parametrize("verify", ["thorough", "fast"])
def test_all_but_the_group_that_goes_wrong_is_cut(monkeypatch, caplog, block, verify):
    model, graph = block
    plan = half(graph)
    (wrong,) = [name for name, group in graph.groups.items() if group.size == 2]
    rest = plan_of(graph, {name: kept for name, kept in plan.kept.items() if name != wrong})
    right = apply(model, graph, rest)
    breaks_where_all_of({wrong}, monkeypatch, graph)
    pruned = apply(model, graph, plan, verify)
    assert_close(run(pruned, graph), run(right, graph))
    assert set(graph.unproved) == {wrong}
    (line,) = caplog.messages
    assert repr(wrong) in line
    assert "all at once" in line
    assert wrong not in allocate(graph, ones(graph), structures=0.4, kinds=KINDS).kept
    averages = carry(dict(model.state_dict()), pruned, graph, plan)
    assert {n: t.shape for n, t in averages.items()} == {
        n: t.shape for n, t in pruned.state_dict().items()
    }
    monkeypatch.undo()  # with strict it is tried again
    apply(model, graph, plan, strict=True)
    assert not graph.unproved


def test_what_the_others_make_up_for_must_go(monkeypatch, block):
    """Gates of a plan were chosen for all that it removes."""
    model, graph = block
    plan = half(graph)
    one, two = (group_of(graph, f"{name}.weight", 0) for name in ("one", "two"))
    gates = dataclasses.replace(plan, gates={one: (2.0,) * len(plan.kept[one])})
    breaks_where_all_of({two}, monkeypatch, graph)
    with pytest.raises(VerificationError, match="causes it"):
        apply(model, graph, gates)


def test_where_no_group_is_at_fault_none_is_named(monkeypatch, block):
    model, graph = block
    breaks_where_all_of(set(), monkeypatch, graph)
    with pytest.raises(VerificationError, match="No group causes it") as caught:
        apply(model, graph, half(graph))
    assert not caught.value.groups
    assert not graph.unproved


@pytest.mark.parametrize("off", [1.003, 0.997])
def test_outputs_that_are_wrong_by_three_in_a_thousand_are_refused(block, off):
    """Rounding is a hundred times less, even in deep networks."""
    model, graph = block
    plan = half(graph)

    def almost(pruned, graph, plan):
        pruned = cut(pruned, graph, plan)
        with torch.no_grad():
            for name, parameter in [*pruned.three.named_parameters()]:
                setattr(pruned.three, name, nn.Parameter(parameter * off))
        return pruned

    verified_plan(model, graph, plan, thorough=True, cut=cut)
    with pytest.raises(VerificationError, match=r"differ .* by 3\.\de-03"):
        verified_plan(model, graph, plan, thorough=True, cut=almost, strict=True)


class AddsLittle(Block):
    """What it adds is less than 16 bits can tell, as late layers add to a residual stream."""

    def forward(self, x):
        return 1.5 + super().forward(x) / 60


def test_a_fault_that_16_bits_do_not_resolve_is_noticed(monkeypatch):
    torch.manual_seed(0)
    model = fill(AddsLittle().eval()).bfloat16()
    graph = trace(model, (torch.randn(2, 4, 5).bfloat16(),))
    assert all(bool((output == 1.5).all()) for output in run(model, graph))
    plan = plan_of(graph, {name: (group.size - 1,) for name, group in graph.groups.items()})
    apply(model, graph, plan, strict=True)
    sabotage_positions(monkeypatch, graph, "three.weight", 1)
    with pytest.raises(VerificationError, match=group_of(graph, "three.weight", 1)):
        apply(model, graph, plan, strict=True)


class OnlyCoarse(Block):
    """Has its precision written into its code."""

    def forward(self, x):
        return super().forward(x.bfloat16())


def test_a_model_that_runs_in_16_bits_alone_is_compared_so(monkeypatch):
    torch.manual_seed(0)
    model = fill(OnlyCoarse().eval()).bfloat16()
    graph = trace(model, (torch.randn(2, 4, 5),))
    plan = plan_of(graph, {name: (group.size - 1,) for name, group in graph.groups.items()})
    apply(model, graph, plan, strict=True)
    sabotage_positions(monkeypatch, graph, "three.weight", 1)
    with pytest.raises(VerificationError, match=group_of(graph, "three.weight", 1)):
        apply(model, graph, plan, strict=True)


class Scaled(Block):
    """Returns numbers in another unit."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return self.scale * super().forward(x)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_outputs_are_compared_in_their_own_unit(monkeypatch, scale):
    torch.manual_seed(0)
    model = fill(Scaled(scale).eval())
    graph = trace(model, (torch.randn(2, 4, 5),))
    plan = plan_of(graph, {name: (group.size - 1,) for name, group in graph.groups.items()})
    apply(model, graph, plan, strict=True)
    sabotage_positions(monkeypatch, graph, "one.weight", 0)
    with pytest.raises(VerificationError, match=group_of(graph, "one.weight", 0)):
        apply(model, graph, plan, strict=True)


class Waves(nn.Module):
    """Returns complex numbers, as a Fourier transform does."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.down(self.up(x).relu())
        return torch.complex(x, x.flip(-1))


def test_complex_outputs_are_compared(monkeypatch):
    torch.manual_seed(0)
    model = fill(Waves().eval())
    graph = trace(model, (torch.randn(2, 5),))
    name = group_of(graph, "up.weight", 0)
    plan = plan_of(graph, {name: (3, 4, 5)})
    apply(model, graph, plan, strict=True)
    sabotage_positions(monkeypatch, graph, "up.weight", 0)
    with pytest.raises(VerificationError, match=name):
        apply(model, graph, plan, strict=True)


class Dropping(Block):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(super().forward(self.drop(x)))


@pytest.mark.parametrize("verify", ["thorough", "fast"])
def test_a_model_that_is_in_training_is_verified_in_evaluation(monkeypatch, caplog, verify):
    """Dropout would be another way through the code, on which no shape is compared."""
    model = fill(Dropping())
    graph = trace(model.eval(), (torch.randn(2, 4, 5),))
    (heads,) = [name for name, group in graph.groups.items() if group.size == 2]
    plan = plan_of(graph, {heads: (1,)})
    with caplog.at_level("INFO"):
        apply(model.train(), graph, plan, verify=verify, strict=True)
    assert "other steps" not in caplog.text
    monkeypatch.setattr(surgery, "rewrite", lambda *args: None)
    with pytest.raises(VerificationError, match=heads):
        apply(model, graph, plan, verify=verify, strict=True)


def test_fast_verification_of_a_mask_of_ones_needs_no_outputs(caplog):
    """With data transformers leaves such a mask out; traces, which have none, keep it."""
    model = fill(LLAMA.model())
    inputs = LLAMA.inputs()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    graph = trace(model, inputs, outputs="logits")
    with caplog.at_level("INFO"):
        apply(model, graph, half(graph, lambda group: group.kind == "neuron"), "fast", strict=True)
    assert "other steps" not in caplog.text


class Averaged(nn.Module):
    """Its sum is divided by a width that it reads as text, which no trace can follow."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.up(x).relu()
        return self.down(x * (1 / float(f"{x.shape[-1]}")))


@pytest.mark.parametrize("verify", ["thorough", "fast"])
def test_a_size_that_becomes_a_value_is_noticed_also_without_data(verify):
    torch.manual_seed(0)
    model = fill(Averaged().eval())
    graph = trace(model, (torch.randn(2, 5),))
    (name,) = graph.groups
    with pytest.raises(VerificationError, match=name):
        apply(model, graph, plan_of(graph, {name: (0, 1, 5)}), verify=verify, strict=True)


class Forked(nn.Module):
    """Does more where it is narrow, which it reads as text."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.up(x).relu()
        return self.down(x if f"{x.shape[-1]}" == "8" else x * 2)


class NotANumber(nn.Module):
    """Computes with a NaN that is made anew in each pass, as ``float("nan")`` in a forward is."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        hidden = self.up(x)
        return self.down(torch.nan_to_num(hidden.masked_fill(hidden < 0, float("nan")), 0.0))


@pytest.mark.parametrize("verify", ["thorough", "fast"])
def test_a_number_that_is_none_is_the_same_in_each_pass(verify):
    model, x = fill(NotANumber().eval()), torch.randn(2, 4)
    graph = trace(model, (x,))
    plan = half(graph)
    pruned = apply(model, graph, plan, verify=verify, strict=True)
    assert_close(pruned(x), gated(model, graph, plan)[0])


@pytest.mark.parametrize("verify", ["thorough", "fast"])
def test_other_steps_than_were_traced_are_no_way_past_verification(caplog, verify):
    """Shapes cannot be compared then; with weights outputs are, without that is told."""
    caplog.set_level("INFO", "sosp_hub")
    model, x = fill(Forked().eval()), (torch.randn(2, 5),)
    graph = trace(model, x)
    (name,) = graph.groups
    plan = plan_of(graph, {name: (0, 1, 5)})
    with pytest.raises(VerificationError, match=name):
        apply(model, graph, plan, verify=verify, strict=True)
    with torch.device("meta"):
        empty = Forked().eval()
    graph = trace(empty, x)
    caplog.clear()
    apply(empty, graph, plan_of(graph, {name: (0, 1, 5)}), verify="fast")
    (told,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "not all of its shapes were compared" in told.getMessage()


class Noisy(nn.Module):
    """Draws a code from the distribution that it predicts, as a variational autoencoder does."""

    def __init__(self, draw):
        super().__init__()
        self.mean, self.spread = nn.Linear(5, 6), nn.Linear(5, 6)
        self.inner, self.last = nn.Linear(6, 7), nn.Linear(7, 3)
        self.draw = draw

    def forward(self, x):
        code = self.mean(x) + self.spread(x).exp() * self.draw(self.spread(x))
        inner = self.inner(code)
        return self.last(inner + self.draw(inner))


DRAWS = {
    "randn_like": torch.randn_like,
    "rand_like": torch.rand_like,
    "of its shape": lambda x: torch.randn(x.shape),
    "of its sizes": lambda x: torch.rand(*x.size(), device=x.device),
    "in place": lambda x: torch.empty_like(x).normal_(),
    "one by one": lambda x: torch.zeros_like(x).exponential_(),
    "coins": lambda x: torch.bernoulli(x.sigmoid()),
    "dropout": lambda x: nn.functional.dropout(x, 0.5),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_what_is_drawn_at_random_is_no_fault(monkeypatch, draw):
    """A cut model draws as many numbers as it has left, and so others for the same structure."""
    torch.manual_seed(0)
    model = fill(Noisy(draw).eval())
    graph = trace(model, (torch.randn(2, 4, 5),))
    assert sorted(group.size for group in graph.groups.values()) == [6, 7]
    plan = half(graph)
    apply(model, graph, plan, strict=True)
    sabotage_positions(monkeypatch, graph, "inner.weight", 1)
    with pytest.raises(VerificationError, match="mean:neuron"):
        apply(model, graph, plan, strict=True)


class Pair(nn.Module):
    """Two outputs, of which the second alone reads the group."""

    def __init__(self):
        super().__init__()
        self.first, self.up, self.down = nn.Linear(5, 2), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.first(x), self.down(self.up(x).relu())


def test_every_output_counts(monkeypatch):
    model = fill(Pair().eval())
    graph = trace(model, (torch.randn(2, 5),))
    (name,) = graph.groups
    plan = plan_of(graph, {name: (3, 4, 5)})
    apply(model, graph, plan)
    sabotage_positions(monkeypatch, graph, "up.weight", 0)
    with pytest.raises(VerificationError, match=name):
        apply(model, graph, plan, strict=True)


class Sensitive(nn.Module):
    """Differences of large numbers: rounding alone is above the tolerance."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.scale = nn.Linear(64, 64), nn.Linear(64, 3), 3e4

    def forward(self, x):
        x = self.two(self.one(x) + self.scale)
        return x - x.mean(0, keepdim=True)


def test_rounding_is_told_from_a_fault(monkeypatch):
    torch.manual_seed(0)
    model, x = Sensitive().eval(), torch.randn(4, 64)
    graph = trace(model, (x,))
    (name,) = graph.groups
    plan = plan_of(graph, {name: range(1, 64, 2)})
    found, expected = (
        run(cut(copy.deepcopy(model), graph, plan), graph),
        masked_outputs(model, graph, plan),
    )
    assert difference(found, expected) > TOLERANCE
    apply(model, graph, plan)
    sabotage_positions(monkeypatch, graph, "two.weight", 1)
    with pytest.raises(VerificationError, match="differ"):
        apply(model, graph, plan, strict=True)


class WithNothing(Block):
    """A parameter without values, such as the registers of a model that has none."""

    def __init__(self):
        super().__init__()
        self.registers = nn.Parameter(torch.zeros(2, 0, 5))

    def forward(self, x):
        return super().forward(torch.cat([self.registers, x], 1))


def test_a_parameter_without_values_stands_in_nobodys_way():
    torch.manual_seed(0)
    model, plain = fill(WithNothing().eval()), Block().eval()
    x = (torch.randn(2, 4, 5),)
    graph = trace(model, x)
    assert {*graph.groups} == {*trace(plain, x).groups}
    apply(model, graph, half(graph))


class ThreeOperands(nn.Module):
    """``einsum`` lays out axes of size one as it likes."""

    def __init__(self):
        super().__init__()
        self.values, self.heads = nn.Linear(5, 12), 3
        self.out = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x):
        x = self.values(x).view(*x.shape[:-1], self.heads, -1)
        weights = torch.einsum("bqhd,bkhd->bhqk", x, x).softmax(-1)
        return torch.einsum("bhqk,bkhd,hdo->bqo", weights, x, self.out)


@pytest.mark.parametrize("verify", ["thorough", "fast"])
@pytest.mark.parametrize("kept", [1, 2])
def test_where_an_axis_of_size_one_lies_is_no_fault(verify, kept):
    torch.manual_seed(0)
    model, x = fill(ThreeOperands().eval()), (torch.randn(2, 4, 5),)
    graph = trace(model, x)
    for name in graph.groups:
        plan = plan_of(graph, {name: range(kept)})
        pruned = apply(model, graph, plan, verify=verify)
        assert_close(run(pruned, graph), gated(model, graph, plan))


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(7, 5), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, ids):
        return self.down(self.up(self.table(ids)))


def test_inputs_on_which_the_model_itself_fails_are_no_fault_of_the_cut():
    """Without data nobody looks at the numbers of tokens."""
    model = fill(Lookup().eval())
    graph = trace(model, (torch.tensor([[1, 7]]),))
    with pytest.raises(VerificationError, match="Lookup itself does not run") as caught:
        apply(model, graph, half(graph), strict=True)
    assert "report the model" not in str(caught.value)
    assert not caught.value.groups


@pytest.mark.parametrize("verify", ["thorough", "fast"])
@pytest.mark.parametrize("first", [1, 2])
def test_a_lack_of_memory_is_no_fault_of_the_cut(monkeypatch, block, verify, first):
    """Seen as one, it would leave groups whole that are cut rightly."""
    model, graph = block
    calls = itertools.count(1)

    def full(*_):
        lack = "DefaultCPUAllocator: can't allocate memory"
        raise RuntimeError("wrong" if next(calls) < first else lack)

    monkeypatch.setattr(proof, "check_cut", full)
    with pytest.raises(VerificationError, match="memory does not suffice") as caught:
        apply(model, graph, half(graph), verify)
    assert "report the model" not in str(caught.value)
    assert not graph.unproved


@pytest.mark.parametrize("lacks", [False, True])
def test_where_memory_lacks_no_copies_are_made(monkeypatch, block, lacks):
    """What fails otherwise is verified again with copies of the weights."""
    model, graph = block
    tried = []

    def fails(*_, double):
        tried.append(_AT_ONCE.get())
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory" if lacks else "no data")

    monkeypatch.setattr(check, "_check_outputs", fails)
    with pytest.raises(RuntimeError):
        check.check_cut(model, graph, half(graph), True, cut)
    assert tried == ([False] if lacks else [False, True])


# --- the masked model itself ---


class Normed(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), norm, nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6, eps=1e-6), nn.Softmax(-1)])
def test_the_masked_model_normalises_the_kept_part_only(norm):
    """By hand: the layers sliced, the normalisation of what is left."""
    torch.manual_seed(0)
    model = fill(Normed(norm).eval())
    x = torch.randn(2, 4, 5)
    graph = trace(model, (x,))
    (name,) = graph.groups
    assert not graph.groups[name].exact
    kept = [1, 2, 5]
    plan = plan_of(graph, {name: kept})
    hidden = x @ model.first.weight[kept].T + model.first.bias[kept]
    if isinstance(norm, nn.LayerNorm):
        centred = hidden - hidden.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        hidden = centred / spread * norm.weight[kept] + norm.bias[kept]
    elif isinstance(norm, nn.RMSNorm):
        length = (hidden.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        hidden = hidden / length * norm.weight[kept]
    else:
        hidden = hidden.exp() / hidden.exp().sum(-1, keepdim=True)
    expected = hidden @ model.last.weight[:, kept].T + model.last.bias
    assert_close(run(cut(copy.deepcopy(model), graph, plan), graph), [expected])
    assert_close(masked_outputs(model, graph, plan), [expected])


@pytest.mark.parametrize("case", [LLAMA, RESNET], ids=str)
def test_the_masked_model_is_the_gated_model_for_exact_groups(case):
    model = fill(case.model())
    outputs = None if case.library == "timm" else "logits"
    graph = trace(model, case.inputs(), outputs=outputs)
    plan = half(graph, lambda group: group.exact and group.kind != "layer")
    assert_close(masked_outputs(model, graph, plan), gated(model, graph, plan))


class Router(nn.Module):
    """Each token goes through the experts that a router chooses, one expert after the other."""

    def __init__(self):
        super().__init__()
        self.up, self.gate, self.head = nn.Linear(5, 16), nn.Linear(16, 4), nn.Linear(16, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 16)) for _ in range(4)
        )
        self.skip = False

    def hidden(self, x):
        return self.up(x)

    def given(self, rows):
        return rows

    def forward(self, x):
        hidden = self.hidden(x)
        rows = hidden.flatten(0, 1)
        weights, chosen = self.gate(rows).softmax(-1).topk(1)
        mixed = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, place = torch.where(chosen == number)
            if len(row) or not self.skip:
                mine = expert(self.given(rows[row]))
                mixed.index_add_(0, row, mine * weights[row, place, None])
        return self.head(mixed.view(hidden.shape))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("seed", [5, 9])
def test_how_many_rows_an_expert_gets_is_no_fault(caplog, skip, seed):
    """A cut changes what a router chooses, and the way through code that skips idle experts."""
    caplog.set_level("INFO", "sosp_hub")
    torch.manual_seed(seed)
    model = fill(Router().eval())
    model.skip = skip
    graph = trace(model, (torch.randn(1, 6, 5),))
    plan = plan_of(graph, {group_of(graph, "up.weight", 0): (0, 2, 5, 9)})
    pruned = apply(model, graph, plan, strict=True)
    assert_close(run(pruned, graph), gated(model, graph, plan))
    assert any("only outputs are compared" in line for line in caplog.messages) == skip


class InOneRow(Router):
    """All that an expert gets lies in one row for a moment."""

    def given(self, rows):
        return rows.flatten().view(-1, rows.shape[1])


@pytest.mark.parametrize("seed", [5, 9])  # each expert gets a token
def test_how_long_the_rows_of_an_expert_are_together_is_no_fault(seed):
    torch.manual_seed(seed)
    model = fill(InOneRow().eval())
    graph = trace(model, (torch.randn(1, 6, 5),))
    plan = plan_of(graph, {group_of(graph, "up.weight", 0): (0, 2, 5, 9)})
    assert_close(run(apply(model, graph, plan, strict=True), graph), gated(model, graph, plan))


def test_with_another_way_through_the_code_a_wrong_cut_is_still_noticed(monkeypatch):
    torch.manual_seed(5)
    model = fill(Router().eval())
    model.skip = True
    graph = trace(model, (torch.randn(1, 6, 5),))
    name = group_of(graph, "up.weight", 0)
    plan = plan_of(graph, {name: (0, 2, 5, 9)})
    sabotage_positions(monkeypatch, graph, "up.weight", 0)
    with pytest.raises(VerificationError, match=name):
        apply(model, graph, plan, strict=True)


class OfTwo(Router):
    """Its experts and its router read two widths beside each other."""

    def __init__(self):
        super().__init__()
        self.up, self.other, self.skip = nn.Linear(5, 10), nn.Linear(5, 6), True

    def hidden(self, x):
        return torch.cat([self.up(x), self.other(x)], -1)


@pytest.mark.parametrize("seed", [7, 8])  # each expert gets a token
def test_readers_of_two_widths_are_compared_on_another_way_too(monkeypatch, caplog, seed):
    caplog.set_level("INFO", "sosp_hub")
    torch.manual_seed(seed)
    model = fill(OfTwo().eval())
    graph = trace(model, (torch.randn(1, 6, 5),))
    name = group_of(graph, "up.weight", 0)
    plan = plan_of(graph, {name: (0, 2, 5, 9), group_of(graph, "other.weight", 0): (1, 4)})
    apply(model, graph, plan, strict=True)
    assert any("only outputs are compared" in line for line in caplog.messages)
    sabotage_positions(monkeypatch, graph, "up.weight", 0)
    with pytest.raises(VerificationError, match=name):
        apply(model, graph, plan, strict=True)


class Looping(nn.Module):
    """Goes through the experts that any token chooses, by a loop over their numbers, twice."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.gate = nn.Linear(5, 16), nn.LayerNorm(16), nn.Linear(16, 4)
        self.experts = nn.Parameter(torch.randn(2, 4, 16, 16) / 4)
        self.head = nn.Linear(16, 3)

    def chosen(self, rows):
        return self.gate(rows).softmax(-1).max(-1)

    def forward(self, x):
        rows = self.norm(self.up(x))
        for experts in self.experts:
            weights, chosen = self.chosen(rows)
            mixed = torch.zeros_like(rows)
            for number in chosen.unique():
                (row,) = torch.where(chosen == number)
                mixed.index_add_(0, row, rows[row] @ experts[number] * weights[row, None])
            rows = self.norm(rows + mixed)
        return self.head(rows)


@pytest.mark.parametrize("seed", range(4))
def test_how_often_a_loop_over_experts_runs_is_no_fault(monkeypatch, caplog, seed):
    """Along an axis that is normalised, zeros in the weights are not the masked model."""
    caplog.set_level("INFO", "sosp_hub")
    torch.manual_seed(seed)
    model, x = fill(Looping().eval()), torch.randn(3, 5)
    graph = trace(model, (x,))
    name = group_of(graph, "up.weight", 0)
    assert not graph.groups[name].exact
    plan = plan_of(graph, {name: (0, 2, 3, 5, 9)})
    pruned = apply(model, graph, plan, strict=True)
    told = any("only outputs are compared" in line for line in caplog.messages)
    first = [net.chosen(net.norm(net.up(x)))[1].unique() for net in (model, pruned)]
    assert told or len(first[0]) == len(first[1])
    sabotage_positions(monkeypatch, graph, "up.weight", 0)
    with pytest.raises(VerificationError, match=name):
        apply(model, graph, plan, strict=True)


class ChoosesByRounding(Sensitive):
    """In float32 it is chance which rows are positive: a product of this width is made in parts."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.scale = nn.Linear(64, 2048), nn.Linear(2048, 3), 3e6

    def forward(self, x):
        x = super().forward(x)
        return x[torch.nonzero(x[:, 0] > 0)[:, 0]]


class RanksByRounding(ChoosesByRounding):
    """As many outputs whatever is chosen, in an order of chance."""

    def forward(self, x):
        return Sensitive.forward(self, x)[:, 0].argsort(stable=True).float()


@pytest.mark.parametrize("kind", [ChoosesByRounding, RanksByRounding])
def test_what_rounding_chooses_is_compared_in_float64(kind, monkeypatch):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(32, 64)
    graph = trace(model, (x,))
    (name,) = graph.groups
    plan = plan_of(graph, {name: range(1, 2048, 2)})
    apply(model, graph, plan, strict=True)
    sabotage_positions(monkeypatch, graph, "two.weight", 1)
    with pytest.raises(VerificationError, match=name):
        apply(model, graph, plan, strict=True)


class Indexed(nn.Module):
    """Each place reads two of those up to it, by scores that dead neurons make all equal."""

    def __init__(self):
        super().__init__()
        self.words, self.key = nn.Embedding(12, 6), nn.Linear(6, 4)
        self.norm = nn.LayerNorm(4)
        self.score, self.head = nn.Linear(4, 1, bias=False), nn.Linear(6, 3)

    def forward(self, input_ids):
        words = self.words(input_ids)
        scores = self.score(self.norm(self.key(words).relu())).squeeze(-1)[:, None, :]
        later = torch.ones(2 * (input_ids.shape[1],), dtype=torch.bool).triu(1)
        scores, chosen = scores.masked_fill(later, -torch.inf).topk(2)
        read = torch.stack([row[places] for row, places in zip(words, chosen, strict=True)])
        return self.head((read * scores.isfinite()[..., None]).sum(2))


def test_a_choice_among_equal_values_may_depend_on_their_number():
    torch.manual_seed(0)
    model = fill(Indexed().eval())
    with torch.no_grad():
        model.key.bias.copy_(torch.tensor([9.0, 9.0, -99.0, -99.0]))
    graph = trace(model, {"input_ids": torch.arange(12).reshape(2, 6)})
    apply(model, graph, plan_of(graph, {"key:neuron": (2, 3)}), strict=True)


class Ties(nn.Module):
    """Chooses between two sums that are equal but for the order in which they are rounded."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 64), nn.Linear(64, 1)

    def forward(self, x):
        x = self.one(x)
        scores = torch.stack([self.two(x), nn.functional.linear(x * 3, self.two.weight / 3)], -1)
        scores = scores + torch.stack([torch.zeros(1), self.two.bias], -1)
        return scores.sort(-1).values + scores.argmax(-1, keepdim=True)


def test_a_choice_among_equal_values_is_no_fault(monkeypatch):
    """Where two models choose otherwise only since both are undecided, both are right."""
    torch.manual_seed(0)
    model = fill(Ties().eval())
    graph = trace(model, (torch.randn(2, 40, 5),))
    plan = half(graph)
    apply(model, graph, plan, strict=True)
    sabotage_positions(monkeypatch, graph, "two.weight", 1)
    with pytest.raises(VerificationError, match="one:head_dim"):
        apply(model, graph, plan, strict=True)


class ChoosesAlone(nn.Module):
    """Of the numbers that it computes only the place of the largest one comes out."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.words = nn.Linear(5, 64), nn.Linear(64, 6), nn.Embedding(6, 3)

    def forward(self, x):
        return self.words(self.two(self.one(x).relu()).argmax(-1))


def test_a_choice_among_other_values_is_the_cut_models_own(monkeypatch):
    torch.manual_seed(0)
    model = fill(ChoosesAlone().eval())
    graph = trace(model, (torch.randn(40, 5),))
    (name,) = (name for name, group in graph.groups.items() if group.size == 64)
    plan = plan_of(graph, {name: range(1, 64, 2)})
    apply(model, graph, plan, strict=True)
    sabotage_positions(monkeypatch, graph, "two.weight", 1)
    with pytest.raises(VerificationError, match=name):
        apply(model, graph, plan, strict=True)


class RoundedAfterACast(nn.Module):
    """The last digits of float32 are the first, and a cast is a step in double precision alone."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 512), nn.Linear(512, 8)

    def forward(self, x):
        return (10_000 * self.down(self.up(x).relu().float().to(x.dtype))).sin()


def test_steps_are_compared_in_double_precision_where_code_casts_to_float32(caplog):
    torch.manual_seed(0)
    model, inputs = RoundedAfterACast().eval(), (torch.randn(4, 16),)
    graph = trace(model, inputs)
    (name,) = graph.groups
    plan = plan_of(graph, {name: tuple(range(0, 512, 2))})
    with caplog.at_level("DEBUG", logger="sosp_hub"):
        apply(model, graph, plan, strict=True)
    assert "only outputs are compared" not in caplog.text
    assert "with copies of the weights" not in caplog.text
