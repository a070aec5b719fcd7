"""Arguments of the verbs in the wrong order, or of another kind, are told as that."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import sosp_hub
from sosp_hub.errors import SospHubError

X, Y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0])

ROWS = [(x, y) for x, y in zip(X.repeat(10, 1), Y.repeat(10), strict=True)]


@pytest.fixture(scope="module")
def made():
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = sosp_hub.trace(model, (X,))
    saliency = sosp_hub.score(model, graph, [], criterion="magnitude")
    return model, graph, saliency, sosp_hub.allocate(graph, saliency, structures=0.5)


CASES = {
    "trace": (lambda m, g, s, p: sosp_hub.trace(X, m), "must be an nn.Module, got Tensor"),
    "score": (lambda m, g, s, p: sosp_hub.score(g, m, [(X, Y)]), r"a Graph and a Sequential"),
    "batches first": (lambda m, g, s, p: sosp_hub.score(m, [(X, Y)], g), "a Sequential and a list"),
    **{
        f"criterion {given!r}": (
            lambda m, g, s, p, given=given: sosp_hub.score(m, g, [(X, Y)], criterion=given),
            rf"score got a {type(given).__name__} as criterion; expected a name",
        )
        for given in (None, 3, print)
    },
    "weights of 8 bits": (
        lambda m, g, s, p: sosp_hub.score(copy.deepcopy(m).to(torch.float8_e4m3fn), g, [(X, Y)]),
        r"weights are torch\.float8_e4m3fn.*score a copy in",
    ),
    "one batch": (lambda m, g, s, p: sosp_hub.score(m, g, (X, Y)), r"score got one batch, a tuple"),
    "arrays": (
        lambda m, g, s, p: sosp_hub.score(m, g, [(X.numpy(), Y.numpy())]),
        r"ndarray|without a tensor",
    ),
    "array, labels": (
        lambda m, g, s, p: sosp_hub.score(m, g, [(np.ones((4, 3)), Y)], criterion="activation"),
        r"inputs as ndarray.*from_numpy",
    ),
    "allocate": (lambda m, g, s, p: sosp_hub.allocate(s, g, macs=0.5), "a Scores and a Graph"),
    "apply": (lambda m, g, s, p: sosp_hub.apply(g, m, p), "model: got a Graph"),
    "plan first": (lambda m, g, s, p: sosp_hub.apply(m, p, g), "graph: got a PruningPlan"),
    "save": (lambda m, g, s, p: sosp_hub.save_pretrained("out", m), r"a str and a Sequential"),
    "save a plan": (
        lambda m, g, s, p: sosp_hub.save_plan(m, "out"),
        r"a Sequential and a str.*allocate\(",
    ),
    "evaluate": (
        lambda m, g, s, p: sosp_hub.evaluate([(X, Y)], m),
        r"got a list, expected an nn\.Module",
    ),
    "within": (
        lambda m, g, s, p: sosp_hub.allocate_within(g, m, s, [(X, Y)], max_drop={"loss": 1.0}),
        r"got a Graph, expected an nn\.Module",
    ),
    **{
        f"within, drops {given!r}": (
            lambda m, g, s, p, given=given: sosp_hub.allocate_within(
                m, g, s, [(X, Y)], max_drop=given
            ),
            r"budget.max_drop: got .*such as \{'accuracy': 1.0\}",
        )
        for given in ({}, 5, None)
    },
    "a floor above all": (
        lambda m, g, s, p: sosp_hub.allocate(g, s, params=0.8, keep_at_least=1.5),
        "keep_at_least is the share that is kept, from 0 to 1; got 1.5",
    ),
    "within, scores first": (
        lambda m, g, s, p: sosp_hub.allocate_within(m, s, g, [(X, Y)], max_drop={"loss": 1.0}),
        r"a Scores and a Graph",
    ),
    **{
        f"{verb.__name__}, {case}": (
            lambda m, g, s, p, verb=verb, model=model, more=more: verb(
                model, ROWS, learning_rate=0.1, epochs=1, batch_size=8, **more
            ),
            words,
        )
        for verb in (sosp_hub.finetune, sosp_hub.finetune_)
        for case, model, more, words in (
            ("a folder", "out/small", {}, r"got a str.*from_pretrained\(folder\)"),
            ("teacher", nn.Linear(3, 2), {"teacher": "t", "distill": 0.5}, r"got a str"),
            ("frozen", nn.Linear(3, 2).requires_grad_(False), {}, r"nothing to train.*_grad_\("),
            ("no parameters", nn.Flatten(), {}, r"nothing to train"),
        )
    },
    **{
        f"{verb}, {case}": (
            lambda m, g, s, p, use=use, given=given: use(m, g, s, p, given),
            rf"{verb} got .*{words}",
        )
        for verb, use in {
            "score": lambda m, g, s, p, given: sosp_hub.score(m, g, given),
            "rebuild": lambda m, g, s, p, given: sosp_hub.rebuild(m, g, p, given),
            "evaluate": lambda m, g, s, p, given: sosp_hub.evaluate(m, given),
            "allocate_within": lambda m, g, s, p, given: sosp_hub.allocate_within(
                m, g, s, given, max_drop={"loss": 1.0}
            ),
            "GradualPruning": lambda m, g, s, p, given: sosp_hub.GradualPruning(
                m, (X,), given, params=0.5
            ),
        }.items()
        for case, given, words in (
            ("one pair", (X, Y), r"one batch, a tuple of .*write \[\(inputs, labels\)\]"),
            ("one tensor", X, r"one batch, a float32 tensor"),
            ("one dict", {"x": X}, r"one batch, a dict"),
            ("nothing", None, r"a NoneType; expected batches"),
            ("a number", 3, r"a int; expected batches"),
        )
    },
    "load": (lambda m, g, s, p: sosp_hub.from_pretrained(m), "a Sequential; expected a folder"),
}


@pytest.mark.parametrize("case", CASES)
def test_arguments_of_another_kind_are_told(case, made):
    call, words = CASES[case]
    with pytest.raises(SospHubError, match=words):
        call(*made)
