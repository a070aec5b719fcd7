import pytest
import timm
import torch
from torch import nn

import sosp_hub.zoo.timm  # noqa: F401 - registers the models
from tests.compare import assert_close

DEPTHS = (20, 32, 44, 56, 110)
# Table 6 of arXiv 1512.03385, in millions, for 10 classes and zero-padded shortcuts; the two 1x1
# convolutions with their norms are what option B adds.
PAPER_M = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7}
SHORTCUTS = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)


def formula(depth):
    """Parameters counted by hand: 3x3 convolutions, a norm after each, a classifier."""
    blocks = (depth - 2) // 6
    total, width = 3 * 16 * 9 + 2 * 16, 16
    for out in (16, 32, 64):
        for _ in range(blocks):
            total += (width + out) * out * 9 + 4 * out
            width = out
    return total + 64 * 10 + 10


@pytest.mark.parametrize("depth", DEPTHS)
def test_depth_and_size(depth):
    model = timm.create_model(f"cifar_resnet{depth}")
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convs) + 1 == depth
    params = sum(p.numel() for p in model.parameters())
    assert params == formula(depth) + SHORTCUTS
    assert round((params - SHORTCUTS) / 1e6, 1 if depth == 110 else 2) == pytest.approx(
        PAPER_M[depth], abs=0.011
    )


@pytest.mark.parametrize("size", [8, 28, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_sizes_and_channels(size, channels):
    model = timm.create_model("cifar_resnet20", in_chans=channels, num_classes=7).eval()
    images = torch.randn(2, channels, size, size)
    assert model(images).shape == (2, 7)
    assert model.forward_features(images).shape == (2, 64, size // 4, size // 4)
    assert [info["reduction"] for info in model.feature_info] == [1, 1, 2, 4]
    assert model.forward_intermediates(images)[1][1].shape == (2, 16, size, size)


def test_what_timm_writes_it_reads_again(tmp_path):
    model = timm.create_model("cifar_resnet20", in_chans=1, num_classes=7).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 1, 8, 8)
    assert type(again) is type(model)
    assert_close(again(images), model(images), relative=0)


def test_every_block_starts_as_the_literature_has_it():
    """No residual branch starts at zero, or all its gates would have no gradient."""
    model = timm.create_model("cifar_resnet32")
    assert all((block.bn2.weight == 1).all() for block in model.layer1)
