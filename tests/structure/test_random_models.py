"""Random models: whatever they are made of, a verified cut equals the dense model with gates."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from sosp_hub.cost import cost
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply, cut
from tests.compare import assert_close
from tests.structure.oracles import fill, gated, half, ragged, run

pytestmark = pytest.mark.slow

STEPS = (
    "linear", "relu", "gelu", "add", "multiply", "cat", "gate", "shuffle", "slice", "pad", "norm",
    "attend", "convolve", "depthwise", "mean", "repeat", "write",
)  # fmt: skip


class Random(nn.Module):
    """A program on tensors of shape (2, 4, width); each step reads earlier results by number."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.first = nn.Linear(5, 12)
        self.parts = nn.ModuleList()
        widths = [12]
        for i, (kind, one, two) in enumerate(steps):
            a, b = widths[one % len(widths)], widths[two % len(widths)]
            part, width, number = self._part(kind, a, b, one + 2 * two)
            self.parts.append(part)
            setattr(self, f"number_{i}", number)  # an attribute, as in real models
            widths.append(width)
        self.last = nn.Linear(widths[-1], 3)

    @staticmethod
    def _part(kind, a, b, salt):
        number = 2 if a % 2 == 0 else 1
        if kind == "linear":
            return nn.Linear(a, 4 + 2 * (salt % 5)), 4 + 2 * (salt % 5), 0
        if kind in {"add", "multiply", "write"}:
            return (nn.Identity() if a == b else nn.Linear(b, a)), a, 0
        if kind == "cat":
            return nn.Identity(), a + b, 0
        if kind == "gate":
            return nn.Linear(a, 2 * a), a, 0
        if kind == "shuffle":
            return nn.Identity(), a, 3 if a % 3 == 0 else number
        if kind == "slice":
            return nn.Identity(), max(1, a // 2), max(1, a // 2)
        if kind == "pad":
            return nn.Identity(), a + 3, 0
        if kind == "norm":
            return nn.LayerNorm(a), a, 0
        if kind == "attend":
            return nn.Linear(a, 3 * a), a, number
        if kind == "convolve":
            return nn.Conv1d(a, 6, 3, padding=1), 6, 0
        if kind == "depthwise":
            return nn.Conv1d(a, a, 3, padding=1, groups=a), a, 0
        if kind == "repeat":
            return nn.Identity(), 2 * a, 0
        return nn.Identity(), a, 0

    def forward(self, x):
        results = [self.first(x)]
        for i, (kind, one, two) in enumerate(self.steps):
            a, b = results[one % len(results)], results[two % len(results)]
            number = getattr(self, f"number_{i}")
            results.append(self._step(kind, self.parts[i], a, b, number))
        return self.last(results[-1])

    @staticmethod
    def _step(kind, part, a, b, number):
        if kind in {"linear", "norm"}:
            return part(a)
        if kind in {"relu", "gelu"}:
            return getattr(F, kind)(a)
        if kind == "add":
            return a + part(b)
        if kind == "multiply":
            return a * part(b).tanh()
        if kind == "cat":
            return torch.cat([a, b], -1)
        if kind == "gate":
            one, two = part(a).chunk(2, -1)
            return one * two.sigmoid()
        if kind == "shuffle":
            return a.view(2, 4, number, -1).transpose(2, 3).reshape(2, 4, -1)
        if kind == "slice":
            return a[..., :number]
        if kind == "pad":
            return F.pad(a, (1, 2))
        if kind == "attend":
            q, k, v = part(a).view(2, 4, 3, number, -1).permute(2, 0, 3, 1, 4)
            return ((q @ k.mT * 0.2).softmax(-1) @ v).transpose(1, 2).flatten(2)
        if kind in {"convolve", "depthwise"}:
            return part(a.mT).mT
        if kind == "mean":
            return a - a.mean(1, keepdim=True)
        if kind == "repeat":
            return a.repeat(1, 1, 2)
        out = torch.zeros_like(a)
        out[:, :2] = a[:, 2:]
        out[:, 2:] = part(b)[:, :2]
        return out


programs = st.lists(
    st.tuples(st.sampled_from(STEPS), st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=6
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(programs, st.integers(0, 3))
def test_a_cut_equals_the_dense_model_with_gates(program, seed):
    torch.manual_seed(0)
    model = fill(Random(program).eval())
    graph = trace(model, (torch.randn(2, 4, 5),))
    exact = ragged(graph, lambda group: group.exact, seed)
    pruned = apply(model, graph, exact)
    expected = gated(model, graph, exact)
    assert_close(run(pruned, graph), expected, relative=2e-5, what="exact groups")
    everything = half(graph, seed=seed)
    smaller = apply(model, graph, everything)
    assert cost(graph, everything) == cost(trace(smaller, graph.example_inputs))


def test_the_programs_find_groups_of_every_kind_of_step():
    """A random program could pass by pinning all; each step alone must leave something to cut."""
    for kind in STEPS:
        torch.manual_seed(0)
        model = fill(Random([("linear", 0, 0), (kind, 1, 1)]).eval())
        graph = trace(model, (torch.randn(2, 4, 5),))
        assert graph.groups, f"{kind}: {graph}"
        pruned = cut(copy.deepcopy(model), graph, half(graph))
        with pytest.raises(AssertionError):
            assert_close(run(pruned, graph), run(model, graph), what="a cut changes the outputs")
