"""What ``trace`` and ``apply`` refuse, each with what was given and what was expected."""

import threading

import pytest
import torch
from torch import nn

from sosp_hub.errors import PlanError, TraceError
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("model", "inputs", "outputs", "said"),
    [
        ("resnet18", (torch.ones(2, 4),), None, "must be an nn.Module, got str"),
        (small(), (), None, "at least one tensor"),
        (small(), (torch.ones(0, 4),), None, r"hold no sample, got .*float32\[0, 4\]"),
        (small(), (torch.ones(2, 5),), None, r"does not run on .*float32\[2, 5\]"),
        (small(), (torch.ones(2, 4),), "logits", "expected logits"),
    ],
)
def test_trace_says_what_is_wrong(model, inputs, outputs, said):
    with pytest.raises(TraceError, match=said):
        trace(model, inputs, outputs)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # files of it remain
@pytest.mark.parametrize("whole", [True, False])
def test_torchscript_is_refused(whole):
    script = torch.jit.script(small())
    model = script if whole else nn.Sequential(script)
    said = "is TorchScript" if whole else "'0' is TorchScript"
    with pytest.raises(TraceError, match=said):
        trace(model, (torch.ones(2, 4),))


def test_what_cannot_be_copied_is_told_as_that():
    """It was "does not run on the example inputs", with advice on these."""
    model = small()
    model.lock = threading.Lock()
    with pytest.raises(TraceError, match=r"cannot be copied.*lock.*set what cannot be copied"):
        trace(model, (torch.ones(2, 4),))


def test_a_larger_model_is_not_the_traced_one():
    model = small()
    graph = trace(model, (torch.ones(2, 4),))
    (name,) = graph.groups
    plan = PruningPlan({name: (0, 1)}, {name: 6})
    larger = nn.Sequential(*small(), nn.Linear(3, 3))
    with pytest.raises(PlanError, match=r"it also has '3.weight'"):
        apply(larger, graph, plan)
