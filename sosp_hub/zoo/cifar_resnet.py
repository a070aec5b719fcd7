"""The CIFAR ResNets of He et al. (arXiv 1512.03385, section 4.2), registered with timm.

Depths 20, 32, 44, 56 and 110.
"""

from typing import Any, cast

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

__all__ = ["CifarResNet"]

_WIDTHS = (16, 32, 64)


class CifarResNet(ResNet):
    """A timm ResNet: three stages of 16, 32 and 64 channels behind a 3x3 stem of stride 1.

    Takes images from 8x8 pixels up. Differs from the paper: where width changes the shortcut is a
    1x1 convolution, as in timm's other ResNets (the paper's option B), not zero padding.
    """

    def __init__(self, layers: tuple[int, int, int], in_chans: int = 3, **kwargs: Any) -> None:
        options = {"zero_init_last": False, **kwargs}
        # A deep stem of width 8 makes timm build the first stage for 16 channels; replaced below.
        stem: dict[str, Any] = {
            "stem_type": "deep",
            "stem_width": _WIDTHS[0] // 2,
            "in_chans": in_chans,
        }
        super().__init__(cast("Any", BasicBlock), layers, channels=_WIDTHS, **stem, **options)
        where = {key: kwargs[key] for key in ("device", "dtype") if key in kwargs}
        self.conv1 = nn.Conv2d(in_chans, _WIDTHS[0], 3, padding=1, bias=False, **where)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        self.layer4 = nn.Sequential()
        for info, reduction in zip(self.feature_info, (1, 1, 2, 4), strict=True):
            info["reduction"] = reduction


def _config() -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.4914, 0.4822, 0.4465),  # CIFAR-10, train
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "conv1",
        "classifier": "fc",
    }


_DEPTHS = (20, 32, 44, 56, 110)
default_cfgs = generate_default_cfgs({f"cifar_resnet{depth}": _config() for depth in _DEPTHS})


def _build(depth: int, pretrained: bool, **kwargs: Any) -> CifarResNet:
    num_blocks = (depth - 2) // 6
    options = {"layers": (num_blocks,) * 3, **kwargs}
    return build_model_with_cfg(CifarResNet, f"cifar_resnet{depth}", pretrained, **options)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20: 0.27 M parameters."""
    return _build(20, pretrained, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32: 0.47 M parameters."""
    return _build(32, pretrained, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44: 0.66 M parameters."""
    return _build(44, pretrained, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56: 0.86 M parameters."""
    return _build(56, pretrained, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110: 1.7 M parameters."""
    return _build(110, pretrained, **kwargs)
