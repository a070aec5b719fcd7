"""`score` and the registry: every registered criterion keeps the same promises."""

import copy
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from sosp_hub.cost import unit_costs
from sosp_hub.errors import CriterionError
from sosp_hub.recipe.criteria import CRITERIA, Criterion, StandardizedCriterion
from sosp_hub.scoring import check_per, make_criterion, score
from sosp_hub.structure.trace import trace
from sosp_hub.tasks import OwnOutputs
from tests.cases import CASES
from tests.compare import assert_close
from tests.gates.toys import group, perceptron, residual, stand_in

WIDTH = [
    name
    for name, criterion in CRITERIA.known().items()
    if "channel" in criterion.kinds
    and all(criterion.can_score(g) for g in residual().groups.values())
]


@pytest.mark.parametrize("name", WIDTH)
def test_every_criterion_scores_every_structure_and_leaves_the_model(name):
    toy = residual()
    toy.model.train()
    before = copy.deepcopy(toy.model.state_dict())
    found = score(toy.model, toy.graph, [toy.batch], name, loss_fn=F.cross_entropy)
    assert {key: len(value) for key, value in found.items()} == {"stream": 4, "inner": 6}
    for value in found.values():
        assert value.isfinite().all()
        assert value.device.type == "cpu"
        assert not value.requires_grad
        assert value.untyped_storage().nbytes() == value.nbytes  # safetensors: no shared storage
        assert len(value.unique()) > 1
    assert_close(dict(toy.model.state_dict()), dict(before), relative=0)
    assert toy.model.training
    assert all(parameter.requires_grad for parameter in toy.model.parameters())


def _may_be_divided(name):
    criterion = CRITERIA.known()[name]
    return not criterion.signed and not issubclass(criterion, StandardizedCriterion)


@pytest.mark.parametrize("name", [name for name in WIDTH if _may_be_divided(name)])
def test_scores_per_cost(name):
    """Amounts are divided; an order of removal has its own test, where orders are."""
    case = next(case for case in CASES if case.name == "test_resnet")
    model, batch = case.model(), (case.inputs()[0], torch.tensor([1, 2]))
    graph = trace(model, case.inputs())
    found = score(model, graph, [batch], name)
    units = unit_costs(graph, "macs")
    expected = {key: scores / torch.tensor(units[key]) for key, scores in found.items()}
    assert all(bool((scores >= 0).all()) for scores in found.values())
    assert len({unit for values in units.values() for unit in values}) > 2
    assert_close(score(model, graph, [batch], name, per="macs"), expected, relative=1e-5)


@pytest.mark.parametrize("name", [name for name in WIDTH if not _may_be_divided(name)])
def test_scores_that_are_no_amounts_are_not_divided(name):
    case = next(case for case in CASES if case.name == "test_resnet")
    with pytest.raises(CriterionError, match=r"have a sign|standardize: false"):
        check_per(make_criterion(name), "macs")
    model = case.model()
    with pytest.raises(CriterionError, match="divides scores"):
        score(model, trace(model, case.inputs()), [], name, per="macs")
    if issubclass(CRITERIA.known()[name], StandardizedCriterion):
        check_per(make_criterion(name, standardize=False), "macs")


def test_costs_need_the_graph_and_a_known_quantity():
    toy = residual()
    with pytest.raises(CriterionError, match=r"per=macs: costs need what trace"):
        score(toy.model, toy.graph, [], "magnitude", per="macs")
    with pytest.raises(CriterionError, match="expected one of macs, params, bytes"):
        score(toy.model, toy.graph, [], "magnitude", per="flops")


@pytest.mark.parametrize("name", sorted(set(WIDTH) - {"random", "hap"}))  # these draw
def test_scores_move_with_their_structures(name):
    toy = perceptron()
    dense = score(toy.model, toy.graph, [toy.batch], name, loss_fn=F.cross_entropy)
    order = torch.randperm(5)
    with torch.no_grad():
        for tensor in (toy.model.a.weight, toy.model.a.bias):
            tensor.copy_(tensor[order])
        toy.model.b.weight.copy_(toy.model.b.weight[:, order])
    moved = score(toy.model, toy.graph, [toy.batch], name, loss_fn=F.cross_entropy)
    assert_close(moved, {"a": dense["a"][order], "b": dense["b"]}, relative=1e-9)


@pytest.mark.parametrize("name", CRITERIA.known())
def test_name_is_the_file_name_and_the_paper_is_told(name):
    criterion = CRITERIA.known()[name]
    assert criterion.__module__ == f"sosp_hub.criteria.{name}"
    assert criterion.paper
    assert criterion.needs in ("nothing", "inputs", "labels")
    assert criterion.__doc__


@pytest.mark.parametrize("name", [n for n in WIDTH if CRITERIA.known()[n].needs == "nothing"])
def test_criteria_without_data(name):
    toy = residual()
    assert score(toy.model, toy.graph, [], name)


@pytest.mark.parametrize("name", [n for n in WIDTH if CRITERIA.known()[n].needs != "nothing"])
def test_criteria_with_data_ask_for_it(name):
    toy = residual()
    with pytest.raises(CriterionError, match="no calibration data"):
        score(toy.model, toy.graph, [], name)


def test_unknown_names_show_the_nearest():
    toy = perceptron()
    with pytest.raises(CriterionError, match=r"'sosph' \(did you mean 'sosp_h'\?\).*magnitude"):
        score(toy.model, toy.graph, [], "sosph")
    with pytest.raises(CriterionError, match=r"no option 'modes' \(did you mean 'mode'\?\)"):
        score(toy.model, toy.graph, [], "sosp_h", modes="exact")
    with pytest.raises(CriterionError, match="its options are none"):
        make_criterion("random", mode="exact")


def test_a_wrong_choice_shows_what_there_is():
    toy = perceptron()
    with pytest.raises(CriterionError, match=r"mode: got 'exakt'.*exact, differences, auto"):
        score(toy.model, toy.graph, [toy.batch], "sosp_h", mode="exakt")
    with pytest.raises(CriterionError, match="micro_batch_size: got 0; expected at least 1"):
        score(toy.model, toy.graph, [toy.batch], "sosp_h", micro_batch_size=0)


def test_kinds():
    toy = perceptron()
    graph = stand_in(*toy.groups.values(), group("n", "layer", 2, []))
    assert set(score(toy.model, graph, [toy.batch])) == {"a", "b"}
    with pytest.raises(
        CriterionError, match=r"'sosp_h' cannot score the kinds layer; it scores channel, .* or use"
    ):
        score(toy.model, graph, [toy.batch], kinds=["neuron", "layer"])
    with pytest.raises(CriterionError, match=r"cannot score the kinds neuron; it scores layer"):
        score(toy.model, graph, [toy.batch], "block_influence", kinds=["neuron", "layer"])
    assert set(score(toy.model, graph, [], "random", kinds=["neuron", "layer"])) == {"a", "b", "n"}
    with pytest.raises(CriterionError, match=r"unknown kind 'neurons' \(did you mean 'neuron'\?\)"):
        score(toy.model, graph, [], "random", kinds=["head", "neurons"])
    with pytest.raises(CriterionError, match=r"kinds='neuron': write a list .* \['neuron'\]"):
        score(toy.model, graph, [], "random", kinds="neuron")
    with pytest.raises(CriterionError, match="kinds head; it has layer, neuron"):
        score(toy.model, graph, [toy.batch], kinds=["head"])


def test_scores_that_are_not_finite_are_refused():
    toy = perceptron()
    toy.model.a.weight.data[2, 0] = torch.inf
    with pytest.raises(CriterionError, match="'magnitude': the scores of group 'a' are not finite"):
        score(toy.model, toy.graph, [], "magnitude")


def test_a_name_is_given_once():
    class Another(Criterion):
        name: Literal["magnitude"] = "magnitude"

    with pytest.raises(ValueError, match="criterion 'magnitude' is declared twice"):
        CRITERIA.declare(Another)


def _taylor(name, *kinds):
    """A model's groups of some kinds, and their scores."""
    case = next(case for case in CASES if case.name == name)
    model = case.model()
    (pictures,) = case.inputs()
    batches = [(pictures, torch.zeros(len(pictures), dtype=torch.long))]
    graph = trace(model, (pictures,))
    groups = {name: group for name, group in graph.groups.items() if group.kind in kinds}
    return groups, score(model, graph, batches, "taylor", kinds=kinds)


def test_groups_without_a_place_for_a_gate_stay_whole(caplog):
    """Queries and keys are read by one another, the hidden layers of an MLP by a weight."""
    with caplog.at_level("INFO"):
        groups, saliency = _taylor("test_vit", "head_dim", "neuron")
    assert set(saliency) == {name for name, group in groups.items() if group.sites}
    assert 0 < len(saliency) < len(groups)
    (told,) = [r.message for r in caplog.records if "stay whole" in r.message]
    assert next(name for name in groups if name not in saliency) in told


def test_what_standardised_weights_read_has_gates():
    """Almost all of an NFNet."""
    groups, saliency = _taylor("test_nfnet", "channel")
    assert set(saliency) == set(groups)
    assert len(groups) > 20
    assert saliency["stem.conv1:channel"].min() > 0


def _with_one_without_a_place(toy):
    """A group that nothing reads through a module or weight, beside those that can be gated."""
    nowhere = group("nowhere", "neuron", 2, [], [("c.bias", 0, [0, 1, -1], False)])
    return stand_in(*toy.groups.values(), nowhere)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[(name, {}) for name in ("taylor", "fisher", "sosp_h", "sosp_i", "hap", "grasp")],
        *[(name, {}) for name in ("activation", "eap", "flap", "wanda_sp")],
        *[(name, {"gate": "weight"}) for name in ("taylor", "sosp_h")],
    ],
)
def test_a_group_without_a_place_is_named_and_stays_whole(name, options, caplog):
    toy = perceptron()
    with caplog.at_level("INFO"):
        found = score(toy.model, _with_one_without_a_place(toy), [toy.batch], name, **options)
    assert found.keys() == toy.groups.keys()
    assert "nowhere" in caplog.text


@pytest.mark.parametrize("name", ["taylor", "fisher", "grasp", "sglp"])
def test_a_loss_at_its_minimum_has_no_first_order(name):
    toy = perceptron()
    with pytest.raises(CriterionError, match=r"zero where .* its own outputs; use sosp_h, sosp_i"):
        score(toy.model, toy.graph, [toy.batch], name, loss_fn=OwnOutputs())


@pytest.mark.parametrize("form", ["softmax", "sigmoid", "squared"])
def test_without_labels_the_second_order_is_that_of_the_divergence(form):
    toy = perceptron()
    dense = toy.logits(toy.ones()).detach()

    def divergence(row):
        logits = toy.logits(row)
        if form == "squared":
            return (logits - dense).square().mean()
        if form == "sigmoid":
            logits, own = (torch.stack([x, 0 * x], -1) for x in (logits, dense))
            p, q = own.softmax(-1), logits.softmax(-1)
            return (p * (p / q).log()).sum(-1).mean()
        p, q = dense.softmax(-1), logits.softmax(-1)
        return (p * (p / q).log()).sum(-1).mean()

    hessian = torch.autograd.functional.hessian(divergence, toy.ones())
    for batch in (toy.batch, (toy.batch[0], None)):
        found = score(toy.model, toy.graph, [batch], "sosp_h", loss_fn=OwnOutputs(form))
        assert_close(found, toy.split(hessian.sum(1).abs() / 2), relative=1e-9)
        found = score(toy.model, toy.graph, [batch], "sosp_i", loss_fn=OwnOutputs(form))
        assert_close(found, toy.split(hessian.abs().sum(1) / 2), relative=1e-9)


@pytest.mark.parametrize("name", ["taylor", "fisher", "sosp_h", "sosp_i", "hap", "grasp"])
def test_scores_that_are_zero_everywhere_are_an_error(name):
    toy = perceptron()
    with pytest.raises(CriterionError, match=r"all scores are 0, which ranks nothing"):
        score(toy.model, toy.graph, [toy.batch], name, loss_fn=lambda x, _: 0 * x.mean())
