"""Gates and derivatives on real architectures, with the groups that a trace finds."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import sosp_hub
from sosp_hub.derivatives import Protocol, hessian_product
from sosp_hub.gates import gated
from sosp_hub.scoring import score
from sosp_hub.tasks.loss import batch_loss
from tests.cases import CASES, with_trait
from tests.compare import assert_close

pytestmark = pytest.mark.slow

KINDS = ("channel", "head", "kv_group", "neuron")


def _double(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _double(part) for key, part in value.items()}
    return tuple(_double(part) for part in value)


def _loss(outputs, targets):
    """Cross-entropy in float64; models take their own in float32."""
    logits = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
    labels = targets["labels"] if isinstance(targets, dict) else targets
    if labels.ndim > 1:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, labels)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_are_derivatives_along_the_ones(case):
    model, batch = case.model(), case.batch(2)
    graph = sosp_hub.trace(model, case.inputs())
    groups = {name: g for name, g in graph.groups.items() if g.kind in KINDS and g.sites}
    model, batch = model.double(), _double(batch)
    found = hessian_product(model, groups, [batch], Protocol(loss_fn=_loss))
    t = torch.ones((), dtype=torch.float64, requires_grad=True)
    with gated(model, groups) as gates, sdpa_kernel(SDPBackend.MATH):
        gates.set_({})  # not the shortcut for ones, and PyTorch's own double backward
        gates.values = {name: t.expand(group.size) for name, group in groups.items()}
        loss = batch_loss(model, batch, _loss).value
        (slope,) = torch.autograd.grad(loss, t, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, t)
    assert_close(found.loss, loss, relative=1e-6)
    assert_close(sum(part.sum() for part in found.gradient.values()), slope, relative=1e-8)
    assert_close(sum(part.sum() for part in found.second.values()), curvature, relative=1e-7)


@pytest.mark.parametrize("case", with_trait("gqa"), ids=str)
@pytest.mark.parametrize(
    ("dtype", "mode"),
    [(torch.bfloat16, "exact"), (torch.bfloat16, "differences"), (torch.float16, "differences")],
)
def test_weights_of_16_bits_rank_structures_alike(case, dtype, mode):
    model, batch = case.model(), case.batch(4)
    graph = sosp_hub.trace(model, case.inputs())
    fine = score(model, graph, [batch], mode="exact")
    coarse = score(model.to(dtype), graph, [batch], mode=mode)
    ranks = [torch.cat(list(s.values())).argsort().argsort().double() for s in (fine, coarse)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.98
