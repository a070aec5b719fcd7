"""Sizes that standard layers keep beside their tensors: one table, read in both directions.

Copied beside weights that carry their own code (``ship_code``), so it imports torch alone.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from sosp_hub.compat.torch import Convolution, RunningNorm

Sizes = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


class StandardLayer(NamedTuple):
    """A class of layers.

    Attributes:
        matches: Whether a module is one.
        sizes: From a module and the shape of its weight to the attributes that repeat it.
        shapes: From a module and such attributes to the shapes of its tensors.
        input_dim: Dimension of its input that its weight is multiplied with; None = none is.
    """

    matches: Callable[[nn.Module], bool]
    sizes: Callable[[Any, tuple[int, ...]], dict[str, Any]]
    shapes: Callable[[Any, Sizes], Shapes]
    input_dim: int | None = None


def standard_layer(module: nn.Module) -> StandardLayer | None:
    """What is known of a module's class; None for others than the standard ones."""
    return next((layer for layer in _LAYERS if layer.matches(module)), None)


def _is(*classes: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: isinstance(module, classes)


def _convolution_sizes(module: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    if module.transposed:
        return {"in_channels": shape[0], "out_channels": shape[1] * module.groups}
    depthwise = shape[1] == 1 and module.groups == module.out_channels  # which nobody has read
    groups = shape[0] if depthwise else module.groups
    return {"out_channels": shape[0], "in_channels": shape[1] * groups, "groups": groups}


def _convolution_shapes(module: Any, sizes: Sizes) -> Shapes:
    groups = max(sizes["groups"], 1)
    channels = (sizes["out_channels"], sizes["in_channels"] // groups)
    if module.transposed:
        channels = (sizes["in_channels"], sizes["out_channels"] // groups)
    return {"weight": (*channels, *sizes["kernel_size"]), "bias": (sizes["out_channels"],)}


def _conv1d_shapes(_: Any, sizes: Sizes) -> Shapes:
    if not {"nf", "nx"} <= sizes.keys():  # another class of this name
        return {}
    return {"weight": (sizes["nx"], sizes["nf"]), "bias": (sizes["nf"],)}


_LAYERS = (
    StandardLayer(
        _is(nn.Linear),
        lambda _, shape: {"out_features": shape[0], "in_features": shape[1]},
        lambda _, sizes: {
            "weight": (sizes["out_features"], sizes["in_features"]),
            "bias": (sizes["out_features"],),
        },
        input_dim=-1,
    ),
    StandardLayer(_is(Convolution), _convolution_sizes, _convolution_shapes, input_dim=1),
    StandardLayer(
        _is(RunningNorm),
        lambda _, shape: {"num_features": shape[0]},
        lambda _, sizes: dict.fromkeys(
            ("weight", "bias", "running_mean", "running_var"), (sizes["num_features"],)
        ),
    ),
    StandardLayer(
        _is(nn.GroupNorm),
        lambda _, shape: {"num_channels": shape[0]},
        lambda _, sizes: dict.fromkeys(("weight", "bias"), (sizes["num_channels"],)),
    ),
    StandardLayer(
        _is(nn.LayerNorm, nn.RMSNorm),
        lambda _, shape: {"normalized_shape": shape},
        lambda _, sizes: dict.fromkeys(("weight", "bias"), tuple(sizes["normalized_shape"])),
    ),
    StandardLayer(
        _is(nn.Embedding),
        lambda _, shape: {"num_embeddings": shape[0], "embedding_dim": shape[1]},
        lambda _, sizes: {"weight": (sizes["num_embeddings"], sizes["embedding_dim"])},
    ),
    StandardLayer(  # GPT-2's linear layer, of transformers
        lambda module: type(module).__name__ == "Conv1D",
        lambda _, shape: {"nx": shape[0], "nf": shape[1]},
        _conv1d_shapes,
        input_dim=-1,
    ),
)
