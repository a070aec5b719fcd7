"""A detector of torchvision: `python examples/torchvision_detector.py`.

Its models take lists of images and of boxes, give their losses while they train and boxes
otherwise. They need no `loss_fn`, and are saved like any module of no library.
"""

# %% An FCOS on a small backbone; fcos_resnet50_fpn(weights="DEFAULT") and others go the same way
import itertools

import torch
from torch import Tensor, nn
from torchvision.models.detection import fcos
from torchvision.models.detection.anchor_utils import AnchorGenerator

import sosp_hub

SIDE = 64


class Backbone(nn.Sequential):
    """One map of features, an eighth of the image."""

    out_channels = 64

    def __init__(self) -> None:
        sizes = (3, 16, 32, self.out_channels)
        steps: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            steps += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs)]
            steps += [nn.ReLU()]
        super().__init__(*steps)


def build() -> nn.Module:
    """The model as it is before the cut: whoever loads the result builds it the same way."""
    anchors = AnchorGenerator(sizes=((8,),), aspect_ratios=((1.0,),))
    return fcos.FCOS(
        Backbone(), num_classes=4, min_size=SIDE, max_size=SIDE, anchor_generator=anchors
    )


# %% A list of images, a list of what is in them: made up here; yours comes from a DataLoader
torch.manual_seed(0)
model = build().eval()


def batch(number: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images with one box each."""
    corner = torch.rand(number, 2) * SIDE / 2
    boxes = torch.cat([corner, corner + SIDE / 3], dim=1)
    labels = torch.randint(1, 4, (number,))
    images = [torch.rand(3, SIDE, SIDE) for _ in range(number)]
    targets = zip(boxes, labels, strict=True)
    return images, [{"boxes": box[None], "labels": label[None]} for box, label in targets]


batches = [batch(4), batch(4)]

# %% Trace, score, cut
graph = sosp_hub.trace(model, (batches[0][0][:2],))
print(graph)
saliency = sosp_hub.score(model, graph, batches, criterion="taylor")
plan = sosp_hub.allocate(graph, saliency, macs=0.7)
pruned = sosp_hub.apply(model, graph, plan)

# %% It trains like the model that it was
pruned.train()
losses = pruned(*batches[0])
sum(losses.values()).backward()
print({name: round(loss.item(), 3) for name, loss in losses.items()})
pruned.eval()

# %% Save, load, publish
sosp_hub.save_pretrained(pruned, "out/small-fcos")
again = sosp_hub.from_pretrained("out/small-fcos", model=build()).eval()
image = batches[1][0][:1]
for name, value in again(image)[0].items():
    torch.testing.assert_close(value, pruned(image)[0][name])
before, after = (sum(p.numel() for p in one.parameters()) for one in (model, again))
print(f"{before:,} parameters before, {after:,} after")
print(sosp_hub.push_to_hub("out/small-fcos", "me/small-fcos", dry_run=True).added)
