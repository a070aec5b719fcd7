"""State of an optimizer and averages of weights follow the cut; the oracle slices by itself."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.optimization import Adafactor

import sosp_hub
from sosp_hub.cut import apply_, carry
from sosp_hub.errors import PlanError
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply
from tests.compare import assert_close
from tests.structure.oracles import half

KEPT = (0, 2, 5)
CUTS = [lambda t: t[list(KEPT)], lambda t: t[list(KEPT)], lambda t: t[:, list(KEPT)], lambda t: t]


def step(model, optimizer, inputs) -> None:
    optimizer.zero_grad()
    model(inputs).square().sum().backward()
    optimizer.step()


def trained(make=torch.optim.Adam) -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = make(model.parameters(), lr=0.1)
    inputs = torch.randn(8, 4)
    for _ in range(3):
        step(model, optimizer, inputs)
    return model, optimizer, inputs


def plan_of(graph, **more) -> PruningPlan:
    (name,) = graph.groups
    return PruningPlan({name: KEPT}, {name: 6}, **more)


class Layer(nn.Module):
    """A residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class Stack(nn.Module):
    """Four layers of one shape, so that nothing but names tells them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def shortened():
    """A stack of layers that was trained, and a plan that drops its second one."""
    torch.manual_seed(0)
    model, inputs = Stack(), torch.randn(8, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    step(model, optimizer, inputs)
    graph = trace(model, (inputs,))
    (name,) = (name for name, group in graph.groups.items() if group.kind == "layer")
    return model, optimizer, inputs, graph, PruningPlan({name: (0, 2, 3)}, {name: 4})


@pytest.mark.parametrize("in_place", [False, True])
def test_moments_are_cut_like_the_weights(in_place):
    model, optimizer, inputs = trained()
    graph = trace(model, (inputs,))
    before = [copy.deepcopy(optimizer.state[p]) for p in model.parameters()]
    if in_place:
        pruned = apply_(model, graph, plan_of(graph))
        assert carry(optimizer, pruned, graph, plan_of(graph)) is optimizer
    else:
        pruned = apply(model, graph, plan_of(graph))
        carry(optimizer, pruned, graph, plan_of(graph), dense=model)
    for state, new, cut in zip(before, pruned.parameters(), CUTS, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[new][key], cut(state[key]))
        torch.testing.assert_close(optimizer.state[new]["step"], state["step"])
    weights = [p.detach().clone() for p in pruned.parameters()]
    step(pruned, optimizer, inputs)
    assert all((p != w).any() for p, w in zip(pruned.parameters(), weights, strict=True))


def test_moments_follow_layers_that_move_up():
    model, optimizer, _, graph, plan = shortened()
    moments = {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
    pruned = apply(model, graph, plan)
    carry(optimizer, pruned, graph, plan, dense=model)
    for old, new in ((0, 0), (2, 1), (3, 2)):
        for leaf in ("up.weight", "down.bias"):
            parameter = pruned.get_parameter(f"layers.{new}.{leaf}")
            expected = moments[f"layers.{old}.{leaf}"]
            torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], expected)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 14


def test_averages_follow_layers_that_move_up():
    model, _, _, graph, plan = shortened()
    average = {name: tensor * 0.5 for name, tensor in model.state_dict().items()}
    pruned = apply(model, graph, plan)
    carried = carry(average, pruned, graph, plan)
    assert carried.keys() == pruned.state_dict().keys()
    for name, tensor in pruned.state_dict().items():
        torch.testing.assert_close(carried[name], tensor * 0.5)


def test_an_average_is_cut_and_counters_stay():
    model, _, inputs = trained()
    graph = trace(model, (inputs,))
    average = {name: tensor * 0.5 for name, tensor in model.state_dict().items()}
    pruned = apply(model, graph, plan_of(graph))
    carried = carry({**average, "updates": torch.tensor(3)}, pruned, graph, plan_of(graph))
    assert carried.pop("updates") == 3
    for name, tensor in pruned.state_dict().items():
        torch.testing.assert_close(carried[name], tensor * 0.5)
    with pytest.raises(PlanError, match="already cut"):
        carry(carried, pruned, graph, plan_of(graph))


def test_a_model_is_not_its_own_average():
    """It was cut in place, without any verification."""
    model, _, inputs = trained()
    graph = trace(model, (inputs,))
    with pytest.raises(PlanError, match=r"one model as what follows the cut and as the cut model"):
        carry(model, model, graph, plan_of(graph))
    assert model[0].out_features == 6


def test_an_average_takes_the_gates_of_the_plan():
    model, _, inputs = trained()
    graph = trace(model, (inputs,))
    (name,) = graph.groups
    plan = plan_of(graph, gates={name: (0.5, 2.0, 3.0)}, shifts={"2.bias": (1.0, 0.0, -1.0)})
    same = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before = {key: tensor.clone() for key, tensor in same.items()}
    pruned = apply(model, graph, plan)
    carried = carry(same, pruned, graph, plan)
    for key, tensor in pruned.state_dict().items():
        torch.testing.assert_close(carried[key], tensor)
    for key, tensor in before.items():
        torch.testing.assert_close(same[key], tensor)


def test_an_averaged_model_takes_the_gates_of_the_plan():
    """A copy of the model is cut to the very model that the cut gives."""
    model, _, inputs = trained()
    graph = trace(model, (inputs,))
    (name,) = graph.groups
    plan = plan_of(graph, gates={name: (0.5, 2.0, 3.0)}, shifts={"2.bias": (1.0, 0.0, -1.0)})
    average, pruned = copy.deepcopy(model), apply(model, graph, plan)
    carry(average, pruned, graph, plan)
    torch.testing.assert_close(average(inputs), pruned(inputs))


def test_parameters_stay_in_their_group_with_its_settings():
    model, _, inputs = trained()
    first, last = ([*module.parameters()] for module in (model[0], model[2]))
    groups = [{"params": first, "lr": 0.1}, {"params": last, "lr": 0.7, "weight_decay": 0.3}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    graph = trace(model, (inputs,))
    pruned = apply(model, graph, plan_of(graph))
    carry(optimizer, pruned, graph, plan_of(graph), dense=model)
    found = [([*map(id, g["params"])], g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    ids = [[*map(id, module.parameters())] for module in (pruned[0], pruned[2])]
    assert found == [(ids[0], 0.1, 0), (ids[1], 0.7, 0.3)]


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )


@pytest.mark.parametrize("wrap", [averaged, copy.deepcopy])
def test_an_averaged_model_is_cut_in_place_and_goes_on(wrap):
    model, optimizer, inputs = trained()
    average = wrap(model)
    inner = getattr(average, "module", average)
    graph = trace(model, (inputs,))
    plan = plan_of(graph)
    apply_(model, graph, plan)
    carry(optimizer, model, graph, plan)
    assert carry(average, model, graph, plan) is average
    for one, two in zip(inner.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, two)
    step(model, optimizer, inputs)
    before = [p.clone() for p in inner.parameters()]
    if inner is not average:
        average.update_parameters(model)
        assert all((p != b).any() for p, b in zip(inner.parameters(), before, strict=True))
    average(inputs)
    with pytest.raises(PlanError, match="nothing in this"):
        carry(average, model, graph, plan)


def a_llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 20}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))


@pytest.mark.parametrize("make", [lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), a_llama])
def test_an_average_says_what_was_cut_when_it_is_saved(make, tmp_path):
    model = make().eval()
    plain = isinstance(model, nn.Sequential)
    inputs = torch.randn(2, 4) if plain else torch.arange(6)[None]
    average = torch.optim.swa_utils.AveragedModel(model)
    graph = trace(model, (inputs,))
    plan = half(graph)
    carry(average, apply_(model, graph, plan), graph, plan)
    small = average.module
    if plain:
        sosp_hub.save_pretrained(small, tmp_path)
        again = sosp_hub.from_pretrained(tmp_path, model=make())
    else:
        small.save_pretrained(tmp_path)
        again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert_close(again.state_dict(), small.state_dict(), relative=0)


def test_a_step_that_cannot_train_the_cut_model_raises():
    model, optimizer, inputs = trained()
    graph = trace(model, (inputs,))
    plan = plan_of(graph)
    apply_(model, graph, plan)
    optimizer.zero_grad()
    model(inputs).square().sum().backward()
    with pytest.raises(PlanError, match=r"4 parameters that apply_ replaced.*sosp_hub\.carry"):
        optimizer.step()
    carry(optimizer, model, graph, plan)
    optimizer.step()


def test_steps_of_other_optimizers_are_left_alone():
    """Also where the dense model goes on, and where a replaced parameter lives in another model."""
    model, optimizer, inputs = trained()
    graph = trace(model, (inputs,))
    apply(model, graph, plan_of(graph))
    step(model, optimizer, inputs)
    shared = nn.Sequential(model[0])  # the caller's own second model
    apply_(model, graph, plan_of(graph))
    step(shared, torch.optim.SGD(shared.parameters(), lr=0.1), inputs)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), inputs)


@pytest.mark.slow
def test_two_cuts_are_carried_one_after_the_other():
    model, optimizer, inputs = trained()
    graph = trace(model, (inputs,))
    first = plan_of(graph)
    apply_(model, graph, first)
    again = trace(model, (inputs,))
    (name,) = again.groups
    second = PruningPlan({name: (0, 2)}, {name: 3})
    apply_(model, again, second)
    with pytest.raises(PlanError, match="another plan"):
        carry(optimizer, model, again, second)


@pytest.mark.parametrize("in_place", [False, True])
def test_parameters_of_another_model_stay_as_they_are(in_place):
    """One optimizer trains a model and what stands behind it."""
    model, _, inputs = trained()
    head = nn.Linear(3, 2)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=0.1)
    both = nn.Sequential(model, head)
    step(both, optimizer, inputs)
    moments = [optimizer.state[p]["exp_avg"].clone() for p in head.parameters()]
    graph = trace(model, (inputs,))
    pruned = (apply_ if in_place else apply)(model, graph, plan_of(graph))
    carry(optimizer, pruned, graph, plan_of(graph), dense=None if in_place else model)
    expected = [*pruned.parameters(), *head.parameters()]
    held = optimizer.param_groups[0]["params"]
    assert all(one is two for one, two in zip(held, expected, strict=True))
    for parameter, moment in zip(head.parameters(), moments, strict=True):
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], moment)
    step(nn.Sequential(pruned, head), optimizer, inputs)


def test_an_optimizer_of_another_model_is_refused():
    model, _, inputs = trained()
    graph = trace(model, (inputs,))
    optimizer = torch.optim.SGD(nn.Linear(2, 7).parameters(), lr=0.1)
    pruned = apply(model, graph, plan_of(graph))
    with pytest.raises(PlanError, match=r"none of its 2 parameters belongs .* pass that model as"):
        carry(optimizer, pruned, graph, plan_of(graph), dense=model)


def test_names_in_an_optimizer_follow_the_parameters():
    model, _, _, graph, plan = shortened()
    optimizer = torch.optim.Adam(model.named_parameters())
    pruned = apply(model, graph, plan)
    carry(optimizer, pruned, graph, plan, dense=model)
    (group,) = optimizer.param_groups
    found = dict(zip(group["param_names"], map(id, group["params"]), strict=True))
    assert found == {name: id(parameter) for name, parameter in pruned.named_parameters()}


def test_names_that_a_caller_gave_to_parameters_stay():
    model, _, _, graph, plan = shortened()
    told = {id(p): f"mine {i}" for i, p in enumerate(model.parameters())}
    optimizer = torch.optim.Adam([(told[id(p)], p) for p in model.parameters()])
    carry(optimizer, apply(model, graph, plan), graph, plan, dense=model)
    layers = (0, 2, 3)  # those that stay
    stay = [p for i in layers for p in model.layers[i].parameters()] + [*model.head.parameters()]
    assert optimizer.param_groups[0]["param_names"] == [told[id(p)] for p in stay]


class Kept(torch.optim.SGD):
    """Keeps past gradients: of each parameter in lists, or of all in one place."""

    def __init__(self, parameters, lr, place="state"):
        super().__init__(parameters, lr)
        self.place = place

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                own = self.state[parameter if self.place == "state" else "all"]
                lists = group if self.place == "group" else own
                lists.setdefault("past", []).append(parameter.grad.clone())
                own["inner"] = {"last": (parameter.grad.clone(), 1)} if own is lists else {}


def test_states_in_lists_and_dicts_are_cut_like_their_parameter():
    model, optimizer, inputs = trained(Kept)
    past = [[grad.clone() for grad in optimizer.state[p]["past"]] for p in model.parameters()]
    graph = trace(model, (inputs,))
    apply_(model, graph, plan_of(graph))
    carry(optimizer, model, graph, plan_of(graph))
    for parameter, gradients, by_hand in zip(model.parameters(), past, CUTS, strict=True):
        found = optimizer.state[parameter]
        expected = [by_hand(grad) for grad in gradients]
        torch.testing.assert_close(found["past"], expected)
        torch.testing.assert_close(found["inner"]["last"], (expected[-1], 1))


def test_factored_moments_are_cut_where_they_have_the_size_of_the_weight():
    model, optimizer, inputs = trained(torch.optim.Adafactor)  # keeps rows and columns
    rows = optimizer.state[model[0].weight]["row_var"].clone()
    columns = optimizer.state[model[2].weight]["col_var"].clone()
    same = optimizer.state[model[0].weight]["col_var"].clone()
    graph = trace(model, (inputs,))
    pruned = apply(model, graph, plan_of(graph))
    carry(optimizer, pruned, graph, plan_of(graph), dense=model)
    torch.testing.assert_close(optimizer.state[pruned[0].weight]["row_var"], rows[list(KEPT)])
    torch.testing.assert_close(optimizer.state[pruned[0].weight]["col_var"], same)
    torch.testing.assert_close(optimizer.state[pruned[2].weight]["col_var"], columns[:, list(KEPT)])
    step(pruned, optimizer, inputs)


class Factored(torch.optim.SGD):
    """Means of squares as transformers' and fairseq's Adafactor keep them: a dim is left out."""

    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            if parameter.ndim > 1:
                own, squares = self.state[parameter], parameter.grad.square()
                own["exp_avg_sq_row"], own["exp_avg_sq_col"] = squares.mean(-1), squares.mean(-2)


@pytest.mark.parametrize("width", [4, 6], ids=["oblong", "square"])
@pytest.mark.parametrize("make", [Factored, Adafactor], ids=["by-hand", "transformers"])
def test_means_of_rows_and_columns_are_cut(make, width):
    options = {"relative_step": False} if make is Adafactor else {}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer, inputs = make(model.parameters(), lr=0.1, **options), torch.randn(8, width)
    step(model, optimizer, inputs)
    first, last = (dict(optimizer.state[model[i].weight]) for i in (0, 2))
    graph, kept = trace(model, (inputs,)), list(KEPT)
    apply_(model, graph, plan_of(graph))
    carry(optimizer, model, graph, plan_of(graph))
    found_first, found_last = (optimizer.state[model[i].weight] for i in (0, 2))
    torch.testing.assert_close(found_first["exp_avg_sq_row"], first["exp_avg_sq_row"][kept])
    torch.testing.assert_close(found_first["exp_avg_sq_col"], first["exp_avg_sq_col"])
    torch.testing.assert_close(found_last["exp_avg_sq_row"], last["exp_avg_sq_row"])
    torch.testing.assert_close(found_last["exp_avg_sq_col"], last["exp_avg_sq_col"][kept])
    step(model, optimizer, inputs)


@pytest.mark.parametrize("kernel", [(), (3, 3)], ids=["linear", "convolution"])
def test_a_mean_over_one_of_two_equal_dims_is_refused_where_nothing_says_which(kernel):
    torch.manual_seed(0)
    make = partial(nn.Conv2d, kernel_size=3, padding=1) if kernel else nn.Linear
    first, last = make(6, 6), make(6, 3)
    model, inputs = nn.Sequential(first, nn.ReLU(), last), torch.randn(8, 6, *kernel)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, optimizer, inputs)
    optimizer.state[first.weight]["mean"] = torch.ones(6, *kernel)
    graph = trace(model, (inputs,))
    apply_(model, graph, plan_of(graph))
    with pytest.raises(PlanError, match=r"'mean' of '0.weight' is .* not known how to cut"):
        carry(optimizer, model, graph, plan_of(graph))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda *given, **keys: Kept(*given, **keys, place="group"), "'past' holds tensors for"),
        (lambda *given, **keys: Kept(*given, **keys, place="all"), "'all' holds tensors for"),
        (torch.optim.Adam, "'exp_avg' of '0.weight' is .* not known how to cut it"),
    ],
    ids=["group", "all", "flat"],
)
def test_state_that_does_not_say_how_it_is_cut_is_refused(make, words):
    model, optimizer, inputs = trained(make)
    if make is torch.optim.Adam:
        state = optimizer.state[model[0].weight]
        state["exp_avg"] = state["exp_avg"].flatten()
    graph = trace(model, (inputs,))
    pruned = apply(model, graph, plan_of(graph))
    with pytest.raises(PlanError, match=words):
        carry(optimizer, pruned, graph, plan_of(graph), dense=model)
    assert optimizer.param_groups[0]["params"][0] is model[0].weight


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"module.0.weight": torch.zeros(6, 4)}, "none of these tensors is the model's"),
        ({"0.weight": torch.zeros(6, 4), "extra": torch.zeros(6)}, "no such tensor"),
        ({"0.weight": 3}, "expected an optimizer"),
        (Path(), "expected an optimizer"),
    ],
)
def test_what_is_not_the_models_is_refused(what, words):
    model, _, inputs = trained()
    graph = trace(model, (inputs,))
    pruned = apply(model, graph, plan_of(graph))
    with pytest.raises(PlanError, match=words):
        sosp_hub.carry(what, pruned, graph, plan_of(graph))


class Tied(nn.Module):
    """What reads words and what says them share a table."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.up(self.words(ids)).relu()))


def test_an_average_that_has_come_apart_is_refused():
    """Which of two tables is meant, where the model has one, nobody knows."""
    torch.manual_seed(0)
    model = Tied()
    graph = trace(model, (torch.arange(7),))
    name = next(name for name, group in graph.groups.items() if group.size == 6)
    plan = PruningPlan({name: KEPT}, {name: 6})
    pruned, average = apply(model, graph, plan), dict(model.state_dict())
    carried = carry(average, pruned, graph, plan)
    assert torch.equal(carried["head.weight"], carried["words.weight"])
    average["head.weight"] = average["head.weight"] + 1
    with pytest.raises(PlanError, match=r"'\w+\.weight' differs from '\w+\.weight', .* tied"):
        carry(average, pruned, graph, plan)
