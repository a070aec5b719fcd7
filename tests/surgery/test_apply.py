"""``apply``: a smaller model of the same class that is used like any other."""

import copy
import gc
import pickle  # noqa: TID251 - what users do with models; nothing is stored
import weakref
from functools import partial
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import nn

import sosp_hub
from sosp_hub.allocation import allocate
from sosp_hub.errors import PlanError, SospHubError
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.trace import call, output_tensors, trace
from sosp_hub.surgery.apply import apply, apply_
from tests.cases import CASES, with_trait
from tests.compare import assert_close
from tests.structure.oracles import fill, gated, half, plan_of, ragged, run

LLAMA = next(case for case in CASES if case.name == "llama")
SMALL = with_trait("gqa") + with_trait("fused_qkv", "tied") + with_trait("depthwise", "layernorm")


def structures(group) -> bool:
    return group.kind != "layer"


def exact(group) -> bool:
    return group.exact and structures(group)


def prepared(case):
    model = fill(case.model())
    return model, trace(model, case.inputs(), outputs=outputs_of(case))


def outputs_of(case):
    return None if case.library == "timm" else "logits"


def state(model: nn.Module) -> dict[str, Any]:
    """Everything a cut could change: tensors, and plain attributes of every module and config."""
    plain = {
        f"{name}.{key}": copy.deepcopy(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int | float | str | tuple | list)
    }
    config = getattr(model, "config", None)
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "plain": plain,
        "config": None if config is None else config.to_dict(),
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    assert_close(after.pop("tensors"), before["tensors"], relative=0, what="tensors")
    assert after == {key: value for key, value in before.items() if key != "tensors"}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_cut_model_is_smaller_and_the_given_one_is_untouched(case):
    model, graph = prepared(case)
    before = state(model)
    plan = half(graph, exact)
    pruned = apply(model, graph, plan)
    assert type(pruned) is type(model)
    assert_untouched(model, before)
    kept = plan.num_kept()
    for name, group in graph.groups.items():
        for member in group.members:
            lost = int((member.index >= 0).sum()) // group.size if name in kept else 0
            was, now = before["tensors"].get(member.tensor), pruned.state_dict().get(member.tensor)
            if was is not None and lost:
                assert now.shape[member.dim] < was.shape[member.dim]
    assert_close(run(pruned, graph), gated(model, graph, plan))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_residual_streams_and_head_sizes_can_be_cut_too(case):
    model, graph = prepared(case)
    plan = ragged(graph, structures, seed=1)
    apply(model, graph, plan)  # verified against the masked model


def test_the_stream_of_heads_that_are_rotated_by_halves_can_be_cut():
    """timm's DINOv3 puts rotated heads back into the width of the stream."""

    def built(embed_dim, num_heads):
        sizes = {"img_size": 32, "depth": 2, "num_classes": 5}
        name = "vit_small_patch16_dinov3_qkvb"
        model = timm.create_model(name, embed_dim=embed_dim, num_heads=num_heads, **sizes)
        return fill(model.eval())

    model, inputs = built(32, 4), torch.randn(2, 3, 32, 32)
    graph = trace(model, inputs)
    num_params = sum(parameter.numel() for parameter in model.parameters())
    assert graph.num_cuttable_params["all"] > 0.99 * num_params
    stream = next(name for name, group in graph.groups.items() if group.kind == "residual")
    heads = next(tie for tie in graph.ties if stream in tie)
    kept = dict.fromkeys(heads, (1, 2)) | {
        name: range(64) for name, group in graph.groups.items() if group.size == 128
    }
    pruned = apply(model, graph, plan_of(graph, kept), strict=True)
    assert_close(pruned.cls_token, model.cls_token[..., 8:24])
    narrow = built(16, 2)
    narrow.load_state_dict(pruned.state_dict())
    assert_close(pruned(inputs), narrow(inputs))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_it_trains(case):
    model, graph = prepared(case)
    pruned = apply(model, graph, half(graph, structures)).train()
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.01)
    before = copy.deepcopy(pruned.state_dict())
    logits = output_tensors(call(pruned, case.inputs()))[0]
    logits.square().mean().backward()
    missing = [n for n, p in pruned.named_parameters() if p.requires_grad and p.grad is None]
    unused = [n for n, p in pruned.named_parameters() if n not in graph.tensors]
    assert set(missing) <= set(unused)
    optimizer.step()
    changed = [n for n, p in pruned.state_dict().items() if not torch.equal(p, before[n])]
    assert changed


@pytest.mark.slow
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_it_can_be_copied(case, copied):
    model, graph = prepared(case)
    pruned = apply(model, graph, half(graph, structures))
    assert_close(run(copied(pruned), graph), run(pruned, graph), relative=0)


def test_frozen_parameters_stay_frozen_and_the_mode_stays():
    model, graph = prepared(LLAMA)
    model.train()
    model.lm_head.requires_grad_(False)
    pruned = apply(model, graph, half(graph, structures))
    assert pruned.training
    assert model.training
    assert not pruned.lm_head.weight.requires_grad
    assert pruned.model.layers[0].mlp.up_proj.weight.requires_grad


@pytest.mark.parametrize("in_place", [False, True])
def test_what_code_has_noted_on_a_parameter_stays(in_place, tmp_path):
    """Trainings find their groups of parameters by it, as Mamba's ``_no_weight_decay``."""

    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
            for parameter in self.parameters():
                parameter._no_weight_decay = parameter.dim() == 1
                parameter.mean = parameter.detach().mean()

    def marks(model):
        return [vars(parameter).get("_no_weight_decay") for parameter in model.parameters()]

    model = Net()
    graph = trace(model, (torch.randn(2, 4),))
    plan = half(graph)
    expected = marks(model)
    small = (sosp_hub.apply_ if in_place else sosp_hub.apply)(model, graph, plan)
    assert marks(small) == expected
    assert "mean" not in vars(small[0].weight)  # a tensor of what was there before
    sosp_hub.save_pretrained(small, tmp_path / "small")
    assert marks(sosp_hub.from_pretrained(tmp_path / "small", model=Net())) == expected


def test_gradients_are_cut_in_place_like_the_weights(caplog):
    """A step after a cut between backward and it moves what is left."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 6, sparse=True)
            self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, tokens):
            return self.layers(self.table(tokens))

    model, tokens = Net(), torch.arange(9).view(3, 3)
    graph = trace(model, (tokens,))
    plan = half(graph)
    model(tokens).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad.to_dense())
    sosp_hub.apply_(model, graph, plan)
    assert model.layers[0].out_features < 8
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad.to_dense(), parameter.detach(), relative=0)
        assert parameter.grad.is_sparse == gradients[name].is_sparse
    assert not caplog.records


@pytest.mark.parametrize(
    "mark",
    [
        lambda parameter: parameter.register_hook(torch.zeros_like),
        lambda parameter: parameter.register_post_accumulate_grad_hook(print),
        lambda parameter: setattr(parameter, "mask", torch.ones(8, 4)),
    ],
)
def test_what_cannot_follow_a_cut_in_place_is_told(mark, caplog):
    """A gradient that was held at zero would move again without a word."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = trace(model, (torch.randn(2, 4),))
    mark(model[0].weight)
    sosp_hub.apply_(model, graph, half(graph))
    assert "stay with the old ones (0.weight)" in caplog.text


class Recorder:
    """Of a caller: as an object that is called, and with a method for it."""

    def __init__(self):
        self.shapes = []

    def __call__(self, _, args, output):
        self.shapes.append(tuple(output.shape))

    def method(self, _, args, output):
        self(_, args, output)


class Counting(nn.Module):
    """Counts what its first layer gives, by a hook that is a method of its own."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.seen = nn.Linear(6, 12), nn.Linear(12, 3), 0
        self.up.register_forward_hook(self.count)

    def count(self, _, args, output):
        self.seen += len(output)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("kind", ["object", "method", "function"])
def test_hooks_of_the_caller_stay_her_own_in_a_cut_in_place(kind):
    recorder = Recorder()
    hook = {
        "object": recorder, "method": recorder.method,
        "function": lambda *given: recorder(*given),
    }[kind]  # fmt: skip
    model = Counting().eval()
    x = torch.randn(2, 6)
    graph = trace(model, (x,))
    handles = [module.register_forward_hook(hook) for module in (model.up, model.down, model)]
    plan = half(graph)
    sosp_hub.apply_(model, graph, plan)
    recorder.shapes.clear()
    model.seen = 0
    model(x)
    width = len(plan.kept["up:neuron"])
    assert recorder.shapes == [(2, width), (2, 3), (2, 3)]
    assert model.seen == 2  # the model that was cut, not a copy of it
    for handle in handles[1:]:
        handle.remove()
    model(x)
    assert recorder.shapes[3:] == [(2, width)]
    assert model.seen == 4


class Saving(nn.Module):
    """Adds to its state, and reads from it, by hooks of every kind."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.version = nn.Linear(6, 12), nn.Linear(12, 3), 1
        self.register_state_dict_post_hook(lambda module, state, *_: state.update(v=module.version))
        self.register_load_state_dict_pre_hook(
            lambda module, state, *_: setattr(module, "version", state.pop("v"))
        )
        self.up._register_load_state_dict_pre_hook(self.count)
        self.down.register_load_state_dict_pre_hook(partial(note, self))
        self.loaded = []

    def count(self, state, prefix, *_):
        self.loaded.append(prefix)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def note(whole, module, state, prefix, *_):
    whole.loaded.append((prefix, module is whole.down))


@pytest.mark.parametrize("in_place", [True, False])
def test_states_are_saved_and_loaded_by_the_hooks_of_the_model(in_place):
    model = Saving().eval()
    x = torch.randn(2, 6)
    graph, plan = trace(model, (x,)), None
    plan = half(graph)
    pruned = (sosp_hub.apply_ if in_place else sosp_hub.apply)(model, graph, plan)
    pruned.version, pruned.loaded = 7, []
    state = pruned.state_dict()
    pruned.version = 8
    pruned.load_state_dict(state)
    assert pruned.version == 7
    assert pruned.loaded == ["up.", ("down.", True)]


def test_handles_of_hooks_of_states_remove_them_after_a_cut_in_place():
    model, x, seen = Counting().eval(), torch.randn(2, 6), []
    graph = trace(model, (x,))
    handles = [
        model.up.register_load_state_dict_pre_hook(lambda *_: seen.append("before")),
        model.up.register_load_state_dict_post_hook(lambda *_: seen.append("after")),
        model.up.register_state_dict_pre_hook(lambda *_: seen.append("save")),
        model.up.register_forward_hook(lambda *_: seen.append("forward")),
    ]
    sosp_hub.apply_(model, graph, half(graph))
    seen.clear()
    model.load_state_dict(model.state_dict())
    model(x)
    assert seen == ["save", "before", "after", "forward"]
    for handle in handles:
        handle.remove()
    model.load_state_dict(model.state_dict())
    model(x)
    assert len(seen) == 4


class Watching(nn.Module):
    """Holds the handles of its hooks, as transformers' models with activation checkpoints do."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.seen = nn.Linear(6, 12), nn.Linear(12, 3), 0
        self.handle = self.up.register_forward_hook(self.count)
        self.handles = {"down": [self.down.register_forward_hook(self.count, with_kwargs=True)]}

    def count(self, *_):
        self.seen += 1

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def test_handles_that_the_model_holds_remove_hooks_after_a_cut_in_place():
    """They were of a copy: hooks stayed, and no copy of the model could be made, nor a next cut."""
    model, x = Watching().eval(), torch.randn(2, 6)
    for _ in range(2):
        graph = trace(model, (x,))
        sosp_hub.apply_(model, graph, half(graph))
    gc.collect()
    again = copy.deepcopy(model)
    for each in (again, model):
        each.seen = 0
        each(x)
        assert each.seen == 2
        each.handle.remove()
        each(x)
        assert each.seen == 3
        each.handles["down"][0].remove()
        each(x)
        assert each.seen == 3


def test_a_hook_of_the_whole_model_is_given_the_model_after_a_cut_in_place():
    model, given = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval(), []
    model.register_load_state_dict_pre_hook(lambda module, *_: given.append(module))
    graph = trace(model, (torch.randn(2, 6),))
    sosp_hub.apply_(model, graph, half(graph))
    gc.collect()  # of the model that took shape beside it
    model.load_state_dict(model.state_dict())
    assert given[-1] is model


def test_a_hook_that_was_given_a_part_of_the_model_reads_that_of_the_cut_one():
    model, x = Saving().eval(), torch.randn(2, 6)

    def widen(up, module, args, out):
        return out + up.out_features

    model.down.register_forward_hook(partial(widen, model.up))
    graph = trace(model, (x,))
    plan = plan_of(graph, {"up:neuron": (0, 3)})
    sosp_hub.apply_(model, graph, plan, verify="fast")
    plain = nn.functional.linear(model.up(x).relu(), model.down.weight, model.down.bias)
    assert_close(model(x), plain + 2)


class Scaled(nn.Module):
    """Reads a number of the model that it is in."""

    def __init__(self, whole):
        super().__init__()
        self.inside = [whole]

    def forward(self, x):
        return x * self.inside[0].scale


def test_modules_inside_that_hold_the_model_see_it_after_a_cut_in_place():
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    model.append(Scaled(model))
    model.scale, x = 1.0, torch.randn(2, 6)
    graph = trace(model, (x,))
    sosp_hub.apply_(model, graph, half(graph))
    once = model(x)
    model.scale = 2.0
    torch.testing.assert_close(model(x), 2 * once)


def test_hooks_set_after_a_cut_in_place_are_not_shared_with_another_model():
    shared, called = nn.Linear(4, 8), []
    shared.hooks = {"mine": torch.ones(2)}  # a name of the caller's
    model, other = (nn.Sequential(shared, nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
    shared.register_forward_hook(lambda *_: called.append("before"))
    x = torch.randn(3, 4)
    graph = trace(model, (x,))
    sosp_hub.apply_(model, graph, half(graph))
    model[0].register_forward_hook(lambda *_: called.append("after"))
    called.clear()
    other(x)
    assert called == ["before"]
    model(x)
    assert called == ["before", "before", "after"]
    assert model[0].hooks is not shared.hooks


def test_a_part_that_another_model_has_too_stays_as_it_is():
    """As a backbone with two heads, or a layer that somebody has fetched before the cut."""
    shared = nn.Linear(4, 8)
    model, other = (nn.Sequential(shared, nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
    x = torch.randn(3, 4)
    expected, weight = other(x), shared.weight
    graph = trace(model, (x,))
    sosp_hub.apply_(model, graph, half(graph))
    assert model[0].weight.shape == (4, 4)
    assert other[0].weight is weight
    assert_close(other(x), expected, relative=0)


def test_tied_weights_stay_tied():
    (case,) = [case for case in with_trait("tied") if case.name == "gpt2"]
    model, graph = prepared(case)
    pruned = apply(model, graph, half(graph, structures))
    assert pruned.lm_head.weight is pruned.transformer.wte.weight
    assert pruned.lm_head.weight.shape[1] == model.lm_head.weight.shape[1] // 2


class HoldsAModuleOfPython(nn.Module):
    """Which ``copy.deepcopy`` does not copy."""

    def __init__(self):
        super().__init__()
        self.functions = torch.nn.functional
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.down(self.functions.relu(self.up(x)))


def test_a_model_that_holds_a_module_of_python_is_cut():
    model, x = HoldsAModuleOfPython().eval(), torch.randn(3, 4)
    graph = trace(model, x)
    plan = half(graph)
    expected = gated(nn.Sequential(model.up, nn.ReLU(), model.down), *_as_sequence(model, x, plan))
    assert_close([apply(model, graph, plan)(x)], expected)
    apply_(model, graph, plan)
    assert_close([model(x)], expected)
    assert model.functions is torch.nn.functional


def _as_sequence(model, x, plan):
    """The same layers without the module of Python, their graph, and the plan for it."""
    (kept,) = plan.kept.values()
    graph = trace(nn.Sequential(model.up, nn.ReLU(), model.down).eval(), x)
    return graph, plan_of(graph, dict.fromkeys(graph.groups, kept))


def test_a_whole_plan_changes_nothing():
    model, graph = prepared(LLAMA)
    everything = plan_of(graph, {n: tuple(range(g.size)) for n, g in graph.groups.items()})
    for plan in (everything, PruningPlan({}, {})):
        pruned = apply(model, graph, plan)
        assert pruned is not model
        assert_close(pruned.state_dict(), model.state_dict(), relative=0)


def test_a_cut_model_can_be_traced_and_cut_again():
    model, graph = prepared(LLAMA)
    wide = {name for name, group in graph.groups.items() if exact(group) and group.size > 3}
    first = half(graph, lambda group: group.name in wide)
    once = apply(model, graph, first)
    again = trace(once, graph.example_inputs, outputs="logits")
    assert {name: len(kept) for name, kept in first.kept.items()} == {
        name: again.groups[name].size for name in wide
    }
    second = half(again, lambda group: group.name in wide, seed=1)
    twice = apply(once, again, second)
    composed = apply(model, graph, first.compose(second))
    assert_close(twice.state_dict(), composed.state_dict(), relative=0)


# --- generation ---


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_cut_llama_generates_what_the_gated_llama_generates(use_cache):
    model, graph = prepared(LLAMA)
    plan = half(graph, exact)
    assert any(graph.groups[name].kind == "kv_group" for name in plan.kept)
    pruned = apply(model, graph, plan)
    prompt = torch.tensor([[5, 6, 7, 8]])
    made = pruned.generate(
        prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=use_cache,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    assert made.sequences.shape == (1, 12)
    step = trace(model, {"input_ids": prompt, "use_cache": False}, outputs="logits")
    for length, logits in enumerate(made.logits, 4):
        inputs = {"input_ids": made.sequences[:, :length], "use_cache": False}
        step.__dict__["example_inputs"] = inputs
        (expected,) = gated(model, step, plan)
        assert_close(logits, expected[:, -1], what=f"logits after {length} tokens")


@pytest.mark.slow
@pytest.mark.parametrize("traced", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.library == "transformers"], ids=str
)
def test_the_attention_that_was_not_traced_follows_too(case, traced):
    model = fill(case.model())
    model.set_attn_implementation(traced)
    graph = trace(model, case.inputs(), outputs="logits")
    pruned = apply(model, graph, half(graph, exact))
    found = run(pruned, graph)
    pruned.set_attn_implementation({"sdpa": "eager", "eager": "sdpa"}[traced])
    assert_close(run(pruned, graph), found, what="the other attention")


def test_masks_and_other_lengths_work_as_well():
    model, graph = prepared(LLAMA)
    pruned = apply(model, graph, half(graph, exact))
    ids = torch.randint(3, 90, (3, 17))
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    with torch.no_grad():
        assert pruned(input_ids=ids).logits.shape == (3, 17, 100)
        whole = pruned(input_ids=ids[:1, 5:]).logits
        left = pruned(input_ids=ids, attention_mask=padded).logits[:1, 5:]
    assert_close(left, whole, what="padding at the left")


# --- in place ---


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_in_place_gives_the_same_model(case):
    model, graph = prepared(case)
    plan = half(graph, structures)
    expected = apply(model, graph, plan)
    assert apply_(model, graph, plan) is model
    assert_close(model.state_dict(), expected.state_dict(), relative=0)
    assert_close(run(model, graph), run(expected, graph), relative=0)


def test_layers_can_be_dropped_in_place_too():
    model, graph = prepared(LLAMA)
    plan = half(graph, lambda group: group.kind == "layer")
    assert plan.kept, "a Llama's layers are a group"
    expected = apply(model, graph, plan)
    apply_(model, graph, plan)
    assert len(model.model.layers) == len(expected.model.layers) == 1
    assert_close(run(model, graph), run(expected, graph), relative=0)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("breaks", ["rewrite", "verified_plan"])
def test_an_exception_in_the_middle_leaves_the_model_untouched(monkeypatch, breaks, in_place):
    model, graph = prepared(LLAMA)
    before = state(model)

    def raises(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"sosp_hub.surgery.apply.{breaks}", raises)
    with pytest.raises(KeyboardInterrupt):
        (apply_ if in_place else apply)(model, graph, half(graph, structures))
    assert_untouched(model, before)


# --- other precisions ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype):
    model = fill(LLAMA.model()).to(dtype)
    graph = trace(model, LLAMA.inputs(), outputs="logits")
    pruned = apply(model, graph, half(graph, structures))
    assert {p.dtype for p in pruned.parameters()} == {dtype}


def test_weights_on_the_meta_device_can_be_cut_without_data():
    """``fast`` needs no data."""
    model = LLAMA.model().to("meta")
    graph = trace(model, LLAMA.inputs(), outputs="logits")
    pruned = apply(model, graph, half(graph, structures), verify="fast")
    assert all(parameter.is_meta for parameter in pruned.parameters())


def test_weights_on_the_meta_device_cannot_be_compared():
    model = LLAMA.model().to("meta")
    graph = trace(model, LLAMA.inputs(), outputs="logits")
    with pytest.raises(SospHubError, match="meta"):
        apply(model, graph, half(graph, structures), verify="thorough")


# --- plans that do not fit ---


def test_a_plan_for_another_model_names_the_group():
    model, graph = prepared(LLAMA)
    with pytest.raises(PlanError, match=r"encoder\.layer\.7:neuron"):
        apply(
            model,
            graph,
            PruningPlan({"encoder.layer.7:neuron": (0,)}, {"encoder.layer.7:neuron": 4}),
        )


def test_a_plan_for_another_size_names_given_and_expected():
    model, graph = prepared(LLAMA)
    name, group = next((n, g) for n, g in graph.groups.items() if g.kind == "neuron")
    with pytest.raises(PlanError, match=rf"(?s){name}.*{group.size}.*{group.size + 1}"):
        apply(model, graph, PruningPlan({name: (0,)}, {name: group.size + 1}))


@pytest.mark.slow
def test_a_plan_that_breaks_a_tie_names_both_groups():
    for case in CASES:
        model, graph = prepared(case)
        for one, two, *_ in graph.ties:
            with pytest.raises(PlanError) as caught:
                apply(model, graph, plan_of(graph, {one: (0,)}))
            assert one in str(caught.value)
            assert two in str(caught.value)
            return
    raise AssertionError("no case has a tie")


class Branching(nn.Module):
    """Takes another way where it is narrow."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.up(x).relu()
        return self.down(x * 2 if x.shape[-1] > 2 else x)


@pytest.mark.parametrize("verify", ["thorough", "fast"])
def test_a_count_that_the_code_does_not_take_is_refused(verify):
    model = fill(Branching().eval())
    graph = trace(model, (torch.randn(2, 5),))
    (name,) = graph.groups
    assert graph.groups[name].exact
    apply(model, graph, plan_of(graph, {name: (0, 1, 4)}), verify)
    with pytest.raises(PlanError, match="must not keep 2 of its 6"):
        apply(model, graph, plan_of(graph, {name: (0, 4)}), verify)


class TiedHead(nn.Module):
    """Writes with the weights that it reads with."""

    def __init__(self):
        super().__init__()
        self.head, self.table = nn.Linear(6, 10, bias=False), nn.Embedding(10, 6)
        self.table.weight = self.head.weight

    def forward(self, tokens):
        return self.head(self.table(tokens))


@pytest.mark.parametrize("verify", ["thorough", "fast"])
def test_gates_are_not_folded_into_what_others_read(verify):
    """Nor would verification notice: they would be in the dense model too."""
    model = TiedHead().eval()
    graph = trace(model, (torch.arange(5)[None],))
    (name,) = graph.groups
    plan = PruningPlan({name: (0, 1, 4)}, {name: 6}, gates={name: (2.0, 1.0, 0.5)})
    with pytest.raises(PlanError, match=r"cannot be folded: 'head\.weight' is tied"):
        apply(model, graph, plan, verify)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("verify", ["thorough", "fast"])
def test_a_model_that_is_not_the_traced_one_is_refused(verify, width):
    """The graph says which slices go; on another model they are other slices."""
    _, graph = prepared(LLAMA)
    other = copy.deepcopy(LLAMA.model())
    mlp = other.model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj = nn.Linear(64, width), nn.Linear(64, width)
    mlp.down_proj = nn.Linear(width, 64)
    with pytest.raises(PlanError, match=str(width)):
        apply(other, graph, half(graph, structures), verify=verify)


@pytest.mark.parametrize("verify", ["thorough", "fast"])
def test_a_model_that_has_gained_a_parameter_is_refused(verify):
    """Nobody knows whether the new part fits what is left of the others."""
    model, graph = prepared(LLAMA)
    model.model.layers[0].adapter = nn.Linear(64, 64)
    with pytest.raises(PlanError, match=r"also has 'model\.layers\.0\.adapter\.weight'.*again"):
        apply(model, graph, half(graph, structures), verify=verify)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"verify": "no"}, "verify.*'no'.*thorough or fast"),
        ({"verify": False}, "verify.*False"),
        ({"plan": "{}"}, r"plan.*str.*PruningPlan\.from_json"),
        ({"plan": {"layer:neuron": (0,)}}, "plan.*dict"),
        ({"plan": None}, "plan.*NoneType"),
        ({"graph": None}, r"graph.*NoneType.*trace"),
    ],
)
@pytest.mark.parametrize("verb", [apply, apply_])
def test_arguments_of_another_type_are_named(verb, change, words):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    graph = trace(model, (torch.randn(2, 4),))
    given = {"graph": graph, "plan": half(graph, structures), **change}
    with pytest.raises(PlanError, match=words):
        verb(model, **given)
    assert model[0].out_features == 6


class Prepares(nn.Module):
    """Keeps a tensor made of its weights, which is no part of a copy."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 6, bias=False), nn.Linear(6, 3)

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key != "ready"}

    def forward(self, x):
        if not hasattr(self, "ready"):
            self.ready = 2 * self.first.weight.detach()
        return self.last(nn.functional.linear(x, self.ready))


def test_in_place_nothing_is_left_of_the_widths_before():
    model, inputs = fill(Prepares().eval()), (torch.randn(2, 5),)
    graph = trace(model, inputs)
    model(*inputs)
    plan = half(graph)
    assert plan.kept
    expected = run(apply(model, graph, plan), graph)
    apply_(model, graph, plan)
    assert_close(model(*inputs), expected[0])


class Positions(nn.Module):
    """Its buffer takes the shape of what comes in, as ConViT's does."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 5)
        self.register_buffer("places", torch.zeros(1, 1), persistent=False)

    def forward(self, x):
        if self.places.shape[0] != x.shape[1]:
            self.places = torch.linspace(0, 1, x.shape[1])[:, None]
        return self.down(self.up(x + self.places).relu())


def test_a_buffer_that_the_pass_fills_anew_does_not_tell_models_apart():
    model, inputs = fill(Positions().eval()), (torch.randn(2, 4, 5),)
    graph = trace(model, inputs)
    plan = half(graph, exact)
    before = run(apply(model, graph, plan), graph)
    call(model, (torch.randn(2, 7, 5),))
    assert_close(run(apply(model, graph, plan), graph), before)


def held_bytes(run):
    """Most bytes that tensors made by `run` held at a time, beside those of before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        kept = run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    del kept
    return highest


def blocks(num, dtype=torch.float32):
    """A row of linear layers."""
    torch.manual_seed(0)
    layers = []
    for _ in range(num):
        layers += [nn.Linear(96, 192, dtype=dtype), nn.ReLU(), nn.Linear(192, 96, dtype=dtype)]
    return nn.Sequential(*layers).eval()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cutting", "most"), [(apply, 1.65), (apply_, 1.3)])
def test_a_thorough_cut_holds_one_tensor_more_than_the_models(cutting, most, dtype):
    """In place that is one model; else the smaller one, 9/16 of it, comes beside it."""
    graph = trace(blocks(48, dtype), (torch.randn(2, 96, dtype=dtype),))
    plan = plan_of(graph, {n: range(g.size // 4, g.size) for n, g in graph.groups.items()})
    made = []

    def run():
        made.append(blocks(48, dtype))
        return cutting(made[0], graph, plan, strict=True)

    weights = sum(p.numel() * p.element_size() for p in blocks(48, dtype).parameters())
    assert held_bytes(run) <= most * weights
    assert made[0][0].out_features == (144 if cutting is apply_ else 192)


def test_a_cut_in_place_that_is_stopped_halfway_is_undone(monkeypatch):
    """Parameters that somebody holds come back themselves, all others put together again."""
    model = blocks(2)
    model[2].weight.requires_grad_(False)
    graph = trace(model, (torch.randn(2, 96),))
    plan, before = half(graph), state(model)
    held, with_gradient = model[3].weight, model[5].weight
    with_gradient.grad = torch.ones_like(with_gradient)
    number, gone = id(with_gradient), weakref.ref(model[0].weight)
    del with_gradient

    def stops(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("sosp_hub.surgery.apply.verified_plan", lambda *args, **kwargs: plan)
    monkeypatch.setattr("sosp_hub.surgery.apply.drop_layers", stops)  # comes after the tensors
    with pytest.raises(KeyboardInterrupt):
        apply_(model, graph, plan)
    assert_untouched(model, before)
    assert model[3].weight is held
    assert id(model[5].weight) == number
    assert model[5].weight.grad is not None
    assert gone() is None
    assert not model[2].weight.requires_grad
    assert model[0].weight.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_model_is_copied_to_be_verified(case, monkeypatch):
    """All parameters are computed where an operation reads them."""
    monkeypatch.setattr("sosp_hub.structure.deferred._SMALL", 0)
    model, graph = prepared(case)

    def again():
        raise AssertionError("verified again with copies")

    monkeypatch.setattr("sosp_hub.surgery.verification.check.at_once", again)
    apply(model, graph, half(graph, exact), strict=True)


class AsksWhere(nn.Module):
    """Wants to know where a weight lies."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 512), nn.Linear(512, 3)

    def forward(self, x):
        assert self.up.weight.data_ptr()
        return self.down(torch.relu(self.up(x)))


def test_a_model_that_asks_where_its_weights_lie_is_verified_with_copies(caplog):
    model = fill(AsksWhere().eval())
    graph = trace(model, (torch.randn(2, 64),))
    plan = half(graph)
    assert plan.kept
    with caplog.at_level("DEBUG"):
        pruned = apply(model, graph, plan, strict=True)
    assert "with copies of the weights" in caplog.text
    assert_close(run(pruned, graph), gated(model, graph, plan))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_deep_model_of_16_bits_is_compared_in_double_precision(attention):
    """Its rounding alone is above the tolerance, and its mask has the least number of its dtype."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1536, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, attn_implementation=attention,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().to(torch.bfloat16)
    tokens = torch.randint(1000, (2, 9))
    graph = trace(model, {"input_ids": tokens, "use_cache": False}, outputs="logits")
    scores = sosp_hub.score(model, graph, [], criterion="magnitude")
    apply(model, graph, allocate(graph, scores, params=0.7), strict=True)


def test_statistics_of_16_bits_are_in_double_precision_too(caplog):
    """Else the model does not run so, and what is rounded tells nothing."""
    (case,) = [case for case in CASES if case.name == "test_resnet"]
    model = fill(case.model()).bfloat16()
    graph = trace(model, tuple(x.bfloat16() for x in case.inputs()))
    with caplog.at_level("DEBUG"):
        apply(model, graph, half(graph, exact), strict=True)
    assert "with copies of the weights" not in caplog.text


class WritesToItself(nn.Module):
    """Clamps weights, renormalises an embedding, counts its passes; all in its forward pass."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(400, 256, max_norm=1.0)
        self.first, self.last = nn.Linear(256, 16), nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, tokens):
        self.scale.data.add_(1.0)
        self.first.weight.data.clamp_(-0.02, 0.02)
        return self.scale * self.last(self.first(self.words(tokens)).relu())


@pytest.mark.parametrize("verify", ["fast", "thorough"])
def test_a_model_whose_pass_writes_to_its_weights_stays(verify):
    torch.manual_seed(0)
    model = WritesToItself().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = trace(model, (torch.arange(8)[None],))
    assert graph.written == {"words.weight", "first.weight", "scale"}
    plan = half(graph)
    pruned = apply(model, graph, plan, verify, strict=True)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
    kept = list(plan.kept["first:neuron"])
    assert_close(pruned.first.weight, before["first.weight"][kept], relative=0)
    assert_close(pruned.scale, before["scale"], relative=0)


def test_statistics_that_a_pass_writes_are_no_weights():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).train()
    model[1].track_running_stats = True
    graph = trace(model, (torch.randn(3, 4),), program=lambda twin, x: twin.train()(*x))
    assert graph.written == frozenset()


def test_what_is_not_cut_is_a_copy_and_the_model_stays():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 4)).eval()
    graph = trace(model, (torch.randn(2, 8),))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = next(name for name, group in graph.groups.items() if group.size == 16)
    pruned = apply(model, graph, PruningPlan({name: tuple(range(8))}, {name: 16}), strict=True)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.add_(1)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
