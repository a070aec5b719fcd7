"""Models that do not fit: weights offloaded, quantised, or spread over processes."""

import json
import subprocess
import sys

import accelerate
import pytest
import torch
from torch import nn

import sosp_hub
from sosp_hub.errors import CriterionError
from sosp_hub.scoring import score
from sosp_hub.structure.trace import trace
from tests.cases import CASES
from tests.compare import assert_close
from tests.criteria import sharded

pytestmark = pytest.mark.slow

LLAMA = next(case for case in CASES if case.name == "llama")
MIXED = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
MIXED |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}


@pytest.fixture(scope="module")
def graph():
    return trace(LLAMA.model(), LLAMA.inputs(), outputs="logits")


BATCHES = [LLAMA.batch(3)]


def on_disk(folder):
    return accelerate.disk_offload(LLAMA.model(), folder, execution_device=torch.device("cpu"))


def on_cpu(_):
    return accelerate.cpu_offload(LLAMA.model(), execution_device=torch.device("cpu"))


def mapped(folder):
    """As users get one."""
    LLAMA.model().save_pretrained(folder)
    return sosp_hub.from_pretrained(
        folder, device_map=MIXED, offload_folder=folder / "off", torch_dtype=torch.float32
    )


@pytest.mark.parametrize("make", [on_disk, on_cpu, mapped])
@pytest.mark.parametrize("mode", ["exact", "differences"])
def test_offloaded_weights_are_scored_like_those_in_memory(make, mode, graph, tmp_path):
    model = make(tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    expected = score(LLAMA.model(), graph, BATCHES, "sosp_h", mode=mode)
    assert_close(score(model, graph, BATCHES, "sosp_h", mode=mode), expected, relative=1e-6)
    assert any(parameter.is_meta for parameter in model.parameters())


def test_what_needs_offloaded_weights_themselves_says_so(graph, tmp_path):
    model = on_disk(tmp_path)
    for criterion in ("magnitude", "fpgm", "lamp", "flap", "wanda_sp"):
        with pytest.raises(CriterionError, match=r"weight.*offloaded.*taylor"):
            score(model, graph, BATCHES, criterion)
    with pytest.raises(CriterionError, match=r"weight.*offloaded or sharded"):
        score(model, graph, BATCHES, "taylor", gate="weight")


class Int8Linear(nn.Module):
    """A quantised layer as libraries make them: whole numbers and scales, no gradient."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("weight", (weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        return _Product.apply(x, self.weight, self.scale)


class _Product(torch.autograd.Function):
    """A kernel that has a first derivative alone."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return x @ (weight * scale).T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        weight, scale = ctx.saved_tensors
        return gradient @ (weight * scale), None, None


def test_quantised_weights_are_scored_by_differences(graph, caplog):
    """The oracle has the rounded weights in float32."""
    quantised, rounded = LLAMA.model(), LLAMA.model()
    for layer, twin in zip(quantised.model.layers, rounded.model.layers, strict=True):
        for part, names in (("mlp", ("gate_proj", "up_proj", "down_proj")), ("self_attn", "qkvo")):
            for name in (f"{n}_proj" if len(n) == 1 else n for n in names):
                made = Int8Linear(getattr(getattr(layer, part), name))
                setattr(getattr(layer, part), name, made)
                with torch.no_grad():
                    getattr(getattr(twin, part), name).weight.copy_(made.weight * made.scale)
    with caplog.at_level("INFO", logger="sosp_hub"):
        found = score(quantised, graph, BATCHES, "sosp_h")
    assert "differences instead of exact" in caplog.text
    expected = score(rounded, graph, BATCHES, "sosp_h", mode="differences", eps=2**-4)
    assert_close(found, expected, relative=1e-4)  # rounding, over twice a step of 2^-4
    with pytest.raises(RuntimeError, match="once_differentiable"):
        score(quantised, graph, BATCHES, "sosp_h", mode="exact")


KERNELS = torch.library.Library("sosp_hub_tests", "DEF")
KERNELS.define("without_derivative(Tensor x) -> Tensor")
KERNELS.impl("without_derivative", lambda x: x.detach().clone(), "CPU")


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")  # what this is about
@pytest.mark.parametrize(
    ("criterion", "options"),
    [("sosp_h", {"mode": m}) for m in ("exact", "differences", "auto")]
    + [(name, {}) for name in ("sosp_i", "taylor", "fisher")],
)
def test_a_kernel_without_a_derivative_is_no_score_of_zero(criterion, options, graph):
    """Such as those of dynamic quantisation."""
    model, kernel = LLAMA.model(), torch.ops.sosp_hub_tests.without_derivative
    model.model.norm.register_forward_hook(lambda module, args, output: kernel(output))
    with pytest.raises(CriterionError, match=r"not depend on the gates .* that have a derivative"):
        score(model, graph, BATCHES, criterion, **options)


def test_packed_weights_have_no_magnitude(graph):
    model = LLAMA.model()
    weight = model.model.layers[0].mlp.gate_proj.weight
    weight.requires_grad_(False)
    weight.data = weight.data.to(torch.uint8).view(-1, 1)
    with pytest.raises(
        CriterionError, match=r"gate_proj\.weight: its shape is \[6144, 1\].*packed"
    ):
        score(model, graph, [], "magnitude")


def test_sharded_weights_are_scored_like_whole_ones(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", sharded.__name__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert other == found
    expected = sharded.results()["scores"]
    for name, scores in found["scores"].items():
        relative = 1e-4 if "sosp_h" in name else 1e-5
        for group, values in scores.items():
            wanted = torch.tensor(expected[name][group])
            assert_close(torch.tensor(values), wanted, relative=relative, what=f"{name} {group}")
    assert "mode='differences'" in found["refused"]["sosp_h"]
    assert "sharded" in found["refused"]["activation"]
    assert "give each at least one batch" in found["nothing"]
