"""The verbs, in the four lines that a page shows, on models that belong to no zoo."""

import copy

import pytest
import torch
import torchvision
import transformers
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import sosp_hub
from sosp_hub.cost import cost
from sosp_hub.tasks.loss import batch_loss
from tests.compare import assert_close
from tests.plain import nets

SEGMENTATION = torchvision.models.segmentation


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


def images(size, number=2):
    return torch.randn(number, 3, size, size, generator=chance())


def tokens(vocabulary, length, number=2):
    return torch.randint(vocabulary, (number, length), generator=chance())


def classes(shape, number=3):
    return torch.randint(number, shape, generator=chance())


# Losses, as people write them ---------------------------------------------------------------------


def detection_loss(outputs, targets):
    """Of a YOLO: yes or no for every class of every place, and its distribution of distances."""
    joined = torch.cat([part.flatten(2) for part in outputs[1]], 2)
    distances, scores = joined.split((16, 3), 1)
    places = distances.unflatten(1, (4, 4)).transpose(1, 2)
    return F.binary_cross_entropy_with_logits(scores, targets["scores"]) + F.cross_entropy(
        places, targets["distances"]
    )


def pixel_loss(outputs, targets):
    return F.cross_entropy(outputs["out"], targets)


def noise_loss(outputs, targets):
    return F.mse_loss(outputs, targets["noise"])


def contrastive_loss(outputs, targets):
    return F.cross_entropy(outputs[2], targets)


def clip_inputs():
    return {
        "input_ids": tokens(60, 6) + 1,
        "pixel_values": images(16),
        "attention_mask": torch.ones(2, 6, dtype=torch.long),
    }


def clip():
    tower = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2
    }  # fmt: skip
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={
                **tower,
                "vocab_size": 64,
                "max_position_embeddings": 8,
                "eos_token_id": 2,
            },
            vision_config={**tower, "image_size": 16, "patch_size": 8},
            projection_dim=16,
        )
    )


class Example:
    """One model: how it is built, example inputs, a batch, a loss, which outputs count."""

    def __init__(self, build, inputs, batch, loss_fn=None, outputs=None):
        self.build, self.inputs, self.batch = build, inputs, batch
        self.loss_fn, self.outputs = loss_fn, outputs


def segmentation(build, **kwargs):
    return lambda: build(weights=None, weights_backbone=None, num_classes=3, **kwargs)


EXAMPLES = {
    "yolo": Example(
        nets.Yolo,
        lambda: (images(32),),
        lambda: (
            images(32),
            {
                "scores": torch.rand(2, 3, 21, generator=chance()),
                "distances": classes((2, 4, 21), 4),
            },
        ),
        detection_loss,
    ),
    "u-net": Example(
        nets.UNet,
        lambda: (images(8),),
        lambda: (images(8), classes((2, 8, 8))),
        pixel_loss,
        outputs="out",
    ),
    "denoiser": Example(
        nets.Denoiser,
        lambda: {
            "sample": torch.randn(2, 4, 4, 4, generator=chance()),
            "timestep": torch.tensor([3, 50]),
            "encoder_hidden_states": torch.randn(2, 5, 12, generator=chance()),
        },
        lambda: {
            "sample": torch.randn(2, 4, 4, 4, generator=chance()),
            "timestep": torch.tensor([3, 50]),
            "encoder_hidden_states": torch.randn(2, 5, 12, generator=chance()),
            "noise": torch.randn(2, 4, 4, 4, generator=chance(1)),
        },
        noise_loss,
    ),
    "two towers": Example(
        nets.TwoTowers,
        lambda: (images(8), tokens(40, 5)),
        lambda: ((images(8), tokens(40, 5)), torch.arange(2)),
        contrastive_loss,
    ),
    "clip": Example(
        clip,
        clip_inputs,
        lambda: {**clip_inputs(), "return_loss": True},
        outputs=("logits_per_image", "logits_per_text"),
    ),
    "fcn": Example(
        segmentation(SEGMENTATION.fcn_resnet50),
        lambda: (images(32),),
        lambda: (images(32), classes((2, 32, 32))),
        pixel_loss,
    ),
    "deeplab": Example(
        segmentation(SEGMENTATION.deeplabv3_mobilenet_v3_large, aux_loss=True),
        lambda: (images(32),),
        lambda: (images(32), classes((2, 32, 32))),
        pixel_loss,
        outputs="out",
    ),
    "lr-aspp": Example(
        segmentation(SEGMENTATION.lraspp_mobilenet_v3_large),
        lambda: (images(32),),
        lambda: (images(32), classes((2, 32, 32))),
        pixel_loss,
    ),
}
LARGE = ("fcn", "deeplab", "lr-aspp", "yolo")
PARAMS = [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in EXAMPLES]


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMS)
def test_four_lines(name, tmp_path):
    one = EXAMPLES[name]
    torch.manual_seed(0)
    model, example_inputs, loss_fn = one.build().eval(), one.inputs(), one.loss_fn
    before = copy.deepcopy(model.state_dict())
    batches = [one.batch()]

    graph = sosp_hub.trace(model, example_inputs, outputs=one.outputs)
    saliency = sosp_hub.score(model, graph, batches, "taylor", loss_fn=loss_fn)
    plan = sosp_hub.allocate(graph, saliency, macs=0.6)
    pruned = sosp_hub.apply(model, graph, plan, strict=True)

    assert cost(graph, plan).macs <= 0.6 * cost(graph).macs
    assert f"for one input of {graph.sized.sample}, " in str(plan)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    folder = sosp_hub.save_pretrained(pruned, tmp_path / "small")
    is_plain = not hasattr(model, "config")
    loaded = sosp_hub.from_pretrained(folder, **({"model": one.build()} if is_plain else {}))
    loss = batch_loss(loaded, batches[0], loss_fn)
    assert torch.equal(loss.value, batch_loss(pruned.eval(), batches[0], loss_fn).value)
    loss.value.backward()
    square = sum(p.grad.square().sum() for p in loaded.parameters() if p.grad is not None)
    torch.optim.SGD(loaded.parameters(), lr=1e-3 / float(square)).step()  # recovery is any loop
    assert batch_loss(loaded, batches[0], loss_fn).value < loss.value


@pytest.mark.parametrize("name", ["u-net", "two towers"])
def test_rebuild_and_carry(name):
    one = EXAMPLES[name]
    torch.manual_seed(0)
    model = one.build().eval()
    batches = [one.batch()]
    graph = sosp_hub.trace(model, one.inputs(), outputs=one.outputs)
    scores = sosp_hub.score(model, graph, [], "magnitude")
    plan = sosp_hub.allocate(graph, scores, params=0.7)
    rebuilt = sosp_hub.rebuild(model, graph, plan, batches)
    plainly = sosp_hub.apply(model, graph, plan)
    pairs = zip(rebuilt.parameters(), plainly.parameters(), strict=True)
    assert all(a.shape == b.shape for a, b in pairs)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    sosp_hub.carry(averaged, plainly, graph, plan)
    shapes = [p.shape for p in averaged.module.parameters()]
    assert shapes == [p.shape for p in plainly.parameters()]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_models(wrap, tmp_path):
    """Every verb takes what is inside; nothing is compiled."""
    torch.manual_seed(0)
    model = nets.UNet().eval()
    one, wrapped = EXAMPLES["u-net"], wrap(model)
    batches = [one.batch()]
    graph = sosp_hub.trace(wrapped, one.inputs(), outputs="out")
    assert str(graph) == str(sosp_hub.trace(model, one.inputs(), outputs="out"))
    saliency = sosp_hub.score(wrapped, graph, batches, "taylor", loss_fn=one.loss_fn)
    expected = sosp_hub.score(model, graph, batches, "taylor", loss_fn=one.loss_fn)
    assert all(torch.equal(saliency[name], expected[name]) for name in expected)
    plan = sosp_hub.allocate(graph, saliency, macs=0.6)
    pruned = sosp_hub.apply(wrapped, graph, plan)
    assert type(pruned) is nets.UNet
    folder = sosp_hub.save_pretrained(wrap(pruned), tmp_path / "small")
    loaded = sosp_hub.from_pretrained(folder, model=wrap(nets.UNet()))
    assert torch.equal(loaded(*one.inputs())["out"], pruned(*one.inputs())["out"])
    assert sosp_hub.apply_(wrapped, graph, plan) is wrapped
    assert torch.equal(model(*one.inputs())["out"], pruned(*one.inputs())["out"])


@pytest.mark.parametrize("reparametrize", ["zeros", "norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")  # the old one, still in use
def test_weights_that_a_hook_computes(reparametrize, tmp_path):
    """Of torch's own pruning and of weight_norm: between two passes the weight is no parameter."""

    def made():
        torch.manual_seed(0)
        layers = (nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))
        model = nn.Sequential(*layers).eval()
        if reparametrize == "zeros":
            prune.l1_unstructured(model[4], "weight", 0.3)
        for layer in (model[0], model[2]) if reparametrize == "norm" else ():
            nn.utils.weight_norm(layer)
        return model

    model, x = made(), torch.randn(8, 6)
    assert any(module.weight.grad_fn is not None for module in (model[2], model[4]))
    graph = sosp_hub.trace(model, (x,))
    saliency = sosp_hub.score(model, graph, [(x, torch.zeros(8).long())], "taylor")
    plan = sosp_hub.allocate(graph, saliency, params=0.7)
    assert plan.kept
    pruned = sosp_hub.apply(model, graph, plan)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    folder = sosp_hub.save_pretrained(pruned, tmp_path / "small")
    loaded = sosp_hub.from_pretrained(folder, model=made())
    assert_close(loaded(x), pruned(x), relative=0)
