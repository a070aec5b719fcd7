"""Experts that a router chooses among, against a router that never chooses the cut ones."""

import copy

import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode

from sosp_hub import allocate
from sosp_hub.errors import PlanError
from sosp_hub.gates import gated
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply
from tests.bench.families import FAMILIES
from tests.compare import assert_close
from tests.structure.oracles import fill, half, plan_of, ragged, run

NAMES = ("mixtral", "phimoe", "gpt_oss", "deepseek_v3")
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def build(name, kernel="grouped_mm"):
    """A family's model with eight experts a layer, of which two are chosen."""
    family = next(family for family in FAMILIES if family.name == name)
    torch.manual_seed(0)
    model, inputs = family.build(), family.inputs()
    config = copy.deepcopy(model.config)
    for key in COUNTS:
        if key in vars(config):
            setattr(config, key, 8)
    config._experts_implementation = kernel
    model = fill(type(model)(config).eval())
    return model, trace(model, inputs, family.outputs)


@pytest.fixture(scope="module", params=NAMES)
def traced(request):
    return build(request.param)


def of_experts(graph):
    """The groups of experts."""
    return [name for name, group in graph.groups.items() if group.kind == "expert"]


class NeverChosen(TorchFunctionMode):
    """Logits of minus infinity wherever the weight of a router is multiplied."""

    def __init__(self, model, graph, plan):
        super().__init__()
        parameters = dict(model.named_parameters())
        self.gone = {}
        for name, kept in plan.kept.items():
            for member in graph.groups[name].members:
                gone = ~torch.isin(torch.as_tensor(member.index), torch.tensor(kept))
                tensor = parameters.get(member.tensor)
                if tensor is None:  # a bias of the choice that is no parameter
                    model.get_buffer(member.tensor)[gone] = -torch.inf
                elif tensor.dim() == 2 and "experts" not in member.tensor:
                    before = self.gone.get(tensor.data_ptr(), torch.zeros_like(gone))
                    self.gone[tensor.data_ptr()] = gone | before

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "linear" and args[1].data_ptr() in self.gone:
            out = out.masked_fill(self.gone[args[1].data_ptr()], -torch.inf)
        return out


@pytest.mark.parametrize("seed", range(2))
def test_a_cut_is_the_dense_model_whose_router_never_chooses_them(traced, seed):
    model, graph = traced
    chosen = of_experts(graph)
    assert chosen, str(graph)
    make = half if seed == 0 else ragged
    plan = make(graph, lambda group: group.kind == "expert", seed=seed)
    graph.check(plan)
    twin = copy.deepcopy(model)
    with NeverChosen(twin, graph, plan):
        expected = run(twin, graph)
    assert_close(run(apply(model, graph, plan), graph), expected, what="minus infinity")


def test_everything_that_counts_experts_follows(traced):
    model, graph = traced
    plan = half(graph, lambda group: group.kind == "expert")
    pruned = apply(model, graph, plan, verify="fast")
    left = {
        module.gate_up_proj.shape[0]
        for module in pruned.modules()
        if hasattr(module, "gate_up_proj") and module.gate_up_proj.__class__.__name__ == "Parameter"
    }
    assert len(left) == 1
    for module in pruned.modules():
        for values in (vars(module), vars(getattr(module, "config", object)) or {}):
            for key in COUNTS:
                assert values.get(key) in {None, *left}, (type(module).__name__, key)
    assert model.config.to_dict() != pruned.config.to_dict()
    run(pruned, graph)


def test_fewer_experts_than_are_chosen_are_refused():
    model, graph = build("mixtral")
    name, other = of_experts(graph)
    with pytest.raises(PlanError, match=r"expert.* must not keep 1 of its 8 .* picks more of them"):
        apply(model, graph, plan_of(graph, {name: (3,)}))
    saliency = {name: torch.arange(8.0), other: torch.arange(8.0)}
    plan = allocate(graph, saliency, structures=0.3, keep_at_least=0.0, kinds="expert")
    assert min(plan.num_kept().values()) == 2


def test_a_group_of_experts_offers_as_many_as_are_picked_of_it():
    """Two of each group of four are asked for before groups are chosen."""
    model, graph = build("deepseek_v3")
    (name,) = of_experts(graph)
    assert (graph.groups[name].size, graph.groups[name].barred) == (4, {1})
    for number in (2, 3):
        apply(model, graph, plan_of(graph, {name: tuple(range(number))}))
    with pytest.raises(PlanError, match=r"must not keep 1 of its 4"):
        apply(model, graph, plan_of(graph, {name: (2,)}))


def test_layers_that_keep_different_numbers_leave_the_config_alone():
    model, graph = build("mixtral")
    name, other = of_experts(graph)
    pruned = apply(model, graph, plan_of(graph, {name: (1, 2, 5), other: (0, 3, 4, 6, 7)}))
    assert [layer.mlp.experts.num_experts for layer in pruned.model.layers] == [3, 5]
    assert [layer.mlp.gate.num_experts for layer in pruned.model.layers] == [3, 5]
    assert pruned.config.num_local_experts == 8


def test_numbers_that_count_other_experts_stay():
    """Such as those of a draft model, whose config is in the model's."""
    model, graph = build("mixtral")
    model.config.draft = type(model.config)(num_local_experts=5)
    pruned = apply(
        model, graph, plan_of(graph, dict.fromkeys(of_experts(graph), (1, 2, 5))), "fast"
    )
    assert pruned.config.num_local_experts == 3
    assert pruned.config.draft.num_local_experts == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_another_kernel_has_the_same_groups(name):
    """`batched_mm` picks the weights by number, biases included."""
    graphs = [build(name, kernel)[1] for kernel in ("grouped_mm", "batched_mm")]
    found = [{n: graph.groups[n].members for n in of_experts(graph)} for graph in graphs]
    places = [{n: [(m.tensor, m.dim) for m in ms] for n, ms in group.items()} for group in found]
    assert places[0] == places[1]
    assert places[0]


def test_experts_that_are_looped_over_stay():
    """Python reads their numbers, and may do anything with them."""
    _, graph = build("mixtral", "eager")
    assert not of_experts(graph)
    assert "experts.down_proj[0]: single elements of this axis are picked" in graph.describe()


def test_the_gate_of_an_expert_scales_what_it_contributes(traced):
    """All gates of a layer at zero: nothing is left of its experts but what all tokens share."""
    model, graph = traced
    groups = {name: graph.groups[name] for name in of_experts(graph)[:1]}
    (group,) = groups.values()
    experts = model.get_submodule(group.sites[0].weight.rpartition(".")[0])
    found = []
    handle = experts.register_forward_hook(lambda _m, _a, out: found.append(out))
    with torch.no_grad(), gated(model, groups) as gates:
        gates.set_(2.0)
        run(model, graph)
        gates.set_(1.0)
        run(model, graph)
    handle.remove()
    assert_close(found[0], 2 * found[1], what="twice the contribution")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("round_to", [1, 6])
def test_neurons_of_experts_are_left_in_numbers_that_the_kernel_takes(dtype, round_to):
    """The product of experts runs for rows of whole 16 bytes: four numbers of float32."""
    family = next(family for family in FAMILIES if family.name == "mixtral")
    torch.manual_seed(0)
    model = fill(family.build().eval()).to(dtype)
    model.config._experts_implementation = "grouped_mm"
    graph = trace(model, family.inputs(), family.outputs)
    saliency = {
        name: torch.rand(group.size)
        for name, group in graph.groups.items()
        if group.kind == "neuron" and any("experts" in member.tensor for member in group.members)
    }
    assert saliency
    seen = set()
    for share in (0.3, 0.55, 0.8):
        plan = allocate(graph, saliency, structures=share, round_to=round_to, keep_at_least=0.0)
        for count in plan.num_kept().values():
            assert count * dtype.itemsize % 16 == 0
            assert count % round_to == 0
            seen.add(count)
        run(apply(model, graph, plan, verify="fast"), graph)
    assert seen, "something was cut"


def test_layers_whose_experts_a_table_chooses_keep_theirs():
    """DeepSeek V4's first layers look the experts of a token up; they stay whole."""
    config = transformers.DeepseekV4Config(
        vocab_size=32, hidden_size=16, moe_intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, head_dim=8, q_lora_rank=8, o_groups=2, o_lora_rank=8,
        qk_rope_head_dim=2, hc_mult=2, hc_sinkhorn_iters=1, n_routed_experts=4,
        num_experts_per_tok=2, sliding_window=8, mlp_layer_types=["hash_moe", "moe"],
        layer_types=["sliding_attention", "sliding_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = fill(transformers.DeepseekV4ForCausalLM(config).eval())
    graph = trace(model, {"input_ids": torch.randint(32, (2, 6))}, "logits")
    plan = half(graph, lambda group: group.kind == "expert")
    assert [*plan.kept] == ["model.layers.1.mlp.gate:expert"]
    pruned = apply(model, graph, plan, strict=True)
    found = [layer.mlp.experts.num_experts for layer in pruned.model.layers]
    assert (found, pruned.config.n_routed_experts) == ([4, 2], 4)
    twin = copy.deepcopy(model)
    with NeverChosen(twin, graph, plan):
        expected = run(twin, graph)
    assert_close(run(pruned, graph), expected, what="minus infinity")
