"""A detector of one's own, in the style of YOLO: `python examples/own_detector.py`.

It belongs to no library. Trace, score, cut, save and load work all the same; the reader builds the
module, and the folder says how it is cut.
"""

# %% A small one-stage detector: blocks that split and join, three scales, boxes and classes
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sosp_hub


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, norm, SiLU."""
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.SiLU())


class Split(nn.Module):
    """Half of the channels goes through a bottleneck, all parts are joined."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = conv(channels, channels, 1)
        self.inner = nn.Sequential(
            conv(channels // 2, channels // 2), conv(channels // 2, channels // 2)
        )
        self.last = conv(channels // 2 * 3, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Same size."""
        one, two = self.first(x).chunk(2, dim=1)
        return self.last(torch.cat([one, two, two + self.inner(two)], dim=1))


class Detector(nn.Module):
    """Boxes and classes for each place of two scales."""

    def __init__(self, width: int = 16, num_classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, width, stride=2), conv(width, 2 * width, stride=2))
        self.fine = Split(2 * width)
        self.down = conv(2 * width, 4 * width, stride=2)
        self.coarse = Split(4 * width)
        self.boxes = nn.ModuleList([nn.Conv2d(n * width, 4, 1) for n in (6, 4)])
        self.classes = nn.ModuleList([nn.Conv2d(n * width, num_classes, 1) for n in (6, 4)])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Places of both scales, one behind the other."""
        fine = self.fine(self.stem(images))
        coarse = self.coarse(self.down(fine))
        scales = (torch.cat([fine, F.interpolate(coarse, scale_factor=2)], dim=1), coarse)
        boxes = [head(x).flatten(2) for head, x in zip(self.boxes, scales, strict=True)]
        classes = [head(x).flatten(2) for head, x in zip(self.classes, scales, strict=True)]
        return {"boxes": torch.cat(boxes, dim=2), "classes": torch.cat(classes, dim=2)}


def loss_fn(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Class of each place, and the box there."""
    classes = F.cross_entropy(outputs["classes"], targets["classes"])
    return classes + F.smooth_l1_loss(outputs["boxes"], targets["boxes"])


# %% Trace, score, cut. The data here is made up; yours comes from a DataLoader
torch.manual_seed(0)
model = Detector().eval()
images = torch.randn(8, 3, 64, 64)
places = model(images)["classes"].shape[2]
targets = {"classes": torch.randint(4, (8, places)), "boxes": torch.randn(8, 4, places)}
batches = [(images, targets)]
graph = sosp_hub.trace(model, (images[:2],))
print(graph)
saliency = sosp_hub.score(model, graph, batches, loss_fn=loss_fn)
plan = sosp_hub.allocate(graph, saliency, macs=0.5)
pruned = sosp_hub.rebuild(model, graph, plan, batches)

# %% Save, load, publish
sosp_hub.save_pretrained(pruned, "out/small-detector")
again = sosp_hub.from_pretrained("out/small-detector", model=Detector())
for name, value in again.eval()(images).items():
    torch.testing.assert_close(value, pruned.eval()(images)[name])
before, after = (sum(p.numel() for p in one.parameters()) for one in (model, again))
print(f"{before:,} parameters before, {after:,} after")
print(sosp_hub.push_to_hub("out/small-detector", "me/small-detector", dry_run=True).added)
