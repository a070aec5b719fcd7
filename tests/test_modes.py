"""Verbs leave every module in the mode that it was in, also a norm frozen in a training model."""

import pytest
import torch
from torch import nn

import sosp_hub
from sosp_hub.errors import DataError
from sosp_hub.evaluate import metrics_of_samples
from sosp_hub.modes import evaluating
from sosp_hub.training import recalibrate_norm
from tests.compare import assert_close

X, Y = torch.randn(8, 3, 6, 6), torch.randint(3, (8,))
BATCHES = [(X, Y)]


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
