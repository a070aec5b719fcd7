"""Every rule on a model of one operation: which groups are found; a cut equals plain runs."""

import copy
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sosp_hub.structure.rules import RULES
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply, cut
from tests.compare import assert_close
from tests.structure.cases import CASES, RuleCase
from tests.structure.oracles import fill, gated, half, ragged, run, unmade

ELSEWHERE = {
    *("_convolution", "mkldnn_convolution", "cudnn_convolution", "cudnn_batch_norm"),
    *("_batch_norm_no_update", "_batch_norm_with_update", "_native_batch_norm_legit"),
    *("_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training"),
    *("_reshape_alias", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "argsort", "avg_pool1d"),
    *("broadcast_to", "chunk", "concat", "concatenate", "flatten", "group_norm", "layer_norm"),
    *("linear", "log_softmax", "mT", "max_pool1d", "max_pool2d", "mkldnn_max_pool2d", "narrow"),
    *("native_channel_shuffle", "grouped_mm_fallback", "_embedding_bag_forward_only"),
    *("numpy_T", "pad", "reshape", "rms_norm", "_fused_rms_norm", "softmax", "swapaxes"),
    *("take_along_dim", "tensor", "tensor_split", "tile", "unflatten", "unsafe_chunk"),
}
"""Made of other operations before a rule could see them, or met on other devices only."""


def build(case: RuleCase):
    torch.manual_seed(0)
    model = fill(case.build().eval())
    return model, (case.example(),)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_groups_that_belong_together_are_found(case):
    model, inputs = build(case)
    graph = trace(model, inputs)
    exact = Counter(group.size for group in graph.groups.values() if group.exact)
    inexact = Counter(group.size for group in graph.groups.values() if not group.exact)
    assert exact == Counter(case.sizes), str(graph)
    assert inexact == Counter(case.inexact), str(graph)


@pytest.mark.parametrize("case", [case for case in CASES if case.sizes][::9], ids=str)
def test_a_pass_with_data_finds_what_a_pass_without_finds(case):
    model, inputs = build(case)
    assert str(trace(model, inputs, fake=False)) == str(trace(model, inputs))


INFERRED = ("linear", "chunk", "cat", "layer norm", "rms norm", "softmax of channels", "addmm")


class Inferred(torch.nn.Module):
    """In inference mode operations are seen that are made of others elsewhere, such as `linear`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    @torch.inference_mode()
    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in INFERRED], ids=str)
def test_a_pass_in_inference_mode_finds_the_same(case):
    model, inputs = build(case)
    found, plain = trace(Inferred(model), inputs), trace(model, inputs)
    sizes = [Counter((g.size, g.exact) for g in each.groups.values()) for each in (found, plain)]
    assert sizes[0] == sizes[1], str(found)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", [case for case in CASES if case.sizes], ids=str)
def test_a_cut_of_exact_groups_is_the_dense_model_with_zeros(case, seed):
    model, inputs = build(case)
    graph = trace(model, inputs)
    make = half if seed == 0 or case.multiple > 1 else ragged
    plan = make(graph, lambda group: group.exact, seed=seed)
    found = run(cut(copy.deepcopy(model), graph, plan), graph)
    assert_close(found, gated(model, graph, plan), what="against gates where it is read")
    if case.keeps_zero:
        assert_close(found, unmade(model, graph, plan), what="against zeros where it is made")


@pytest.mark.parametrize("case", [c for c in CASES if c.sizes or c.inexact], ids=str)
def test_verification_accepts_the_cut(case):
    model, inputs = build(case)
    graph = trace(model, inputs)
    apply(model, graph, half(graph), strict=True)


class _Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__.rstrip("_"))
        return func(*args, **(kwargs or {}))


def test_every_rule_has_a_case():
    with torch.no_grad(), _Names() as seen:
        for case in CASES:
            model, inputs = build(case)
            model(*inputs)
    tried = {name for name in RULES if name.rstrip("_") in seen.names}
    assert sorted(set(RULES) - tried - ELSEWHERE) == [], "rules that no case runs"
    assert sorted(tried & ELSEWHERE) == [], "these are met after all"
