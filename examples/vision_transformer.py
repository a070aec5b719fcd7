"""A vision transformer, from zero to the hub: `python examples/vision_transformer.py`.

Trains a small ViT on handwritten digits (they come with scikit-learn), cuts 40 % of its
multiply-accumulates, rebuilds, fine-tunes and shows what a push would send. With
`SMALL=1` in the environment everything is a hundredth of the size.
"""

# %% A model and data. For real weights: timm.create_model("vit_tiny_patch16_224", pretrained=True)
import os

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import sosp_hub

SMALL = bool(os.environ.get("SMALL"))
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None].repeat(1, 3, 1, 1) / 16
images, labels = F.interpolate(images, size=32), torch.tensor(digits.target)
train, test = slice(0, 100 if SMALL else 1400), slice(1400, 1797)
model = timm.create_model(
    "vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=8, depth=2 if SMALL else 6
)


# %% Train, or begin with weights that are trained
def fit(model: torch.nn.Module, epochs: int, learning_rate: float) -> None:
    """Plain training; any loop will do."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels[train])).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[train][chosen]), labels[train][chosen]).backward()
            optimizer.step()
    model.eval()


def accuracy(model: torch.nn.Module) -> float:
    """On the test images, with its standard error."""
    metric = sosp_hub.evaluate(model, [(images[test], labels[test])])["accuracy"]
    print(f"accuracy {100 * metric.value:.1f} ± {100 * (metric.stderr or 0):.1f} %")
    return metric.value


fit(model, epochs=1 if SMALL else 12, learning_rate=1e-3)
accuracy(model)

# %% Score, plan, cut, rebuild
calibration = [(images[train][i : i + 64], labels[train][i : i + 64]) for i in range(0, 512, 64)]
calibration = [batch for batch in calibration if len(batch[1])]
graph = sosp_hub.trace(model, (images[:2],))
print(graph)
saliency = sosp_hub.score(model, graph, calibration, criterion="sosp_h")
plan = sosp_hub.allocate(graph, saliency, macs=0.6)
print(plan)
accuracy(sosp_hub.apply(model, graph, plan))
pruned = sosp_hub.rebuild(model, graph, plan, calibration)
accuracy(pruned)

# %% Fine-tune, save, load, publish
fit(pruned, epochs=1 if SMALL else 4, learning_rate=3e-4)
accuracy(pruned)
sosp_hub.save_pretrained(pruned, "out/small-vit")
accuracy(sosp_hub.from_pretrained("out/small-vit"))
print(sosp_hub.push_to_hub("out/small-vit", "me/small-vit", dry_run=True).added)  # without: sent
