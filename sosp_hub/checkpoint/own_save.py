"""A cut model carries its delta, so that the ways of saving of its library write it too."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sosp_hub.compat.timm import is_whole
from sosp_hub.compat.torch import child_table
from sosp_hub.errors import CheckpointError


def skeleton_before(model: nn.Module) -> nn.Module | None:
    """What a model that is about to be cut has to remember; None where its library builds it."""
    if _is_transformers(model) or _is_timm(model):
        return None
    from sosp_hub.checkpoint.torch.skeleton import skeleton_of

    return skeleton_of(model)


def describe_cut(model: nn.Module, skeleton: nn.Module | None, inputs: Any) -> None:
    """Gives a model that was just cut, or those inside it, what their own ways of saving need.

    Args:
        model: The cut model. Inside a plain module or a wrapper, such as one with adapters, the
            outermost models of libraries are described too.
        skeleton: What `skeleton_before` gave before the cut.
        inputs: Arguments of a forward pass on which a plain module is compared with what its delta
            builds; None = do not compare.
    """
    with torch.random.fork_rng(devices=[]):  # building a skeleton may draw
        emptied = [] if skeleton is None else list(_identities(model))
        for part in _outermost(model):
            if _is_transformers(part):
                from sosp_hub.checkpoint.transformers.own_save import describe_cut as describe
            else:
                from sosp_hub.checkpoint.timm.own_save import describe_cut as describe
            describe(part)  # type: ignore[arg-type]
        if skeleton is None:
            return
        for children, name, child in emptied:  # of whoever wrote the module around the model
            children[name] = child
        from sosp_hub.checkpoint.torch.own_save import describe_cut as describe_plain

        describe_plain(model, skeleton, inputs)


def _identities(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, nn.Module]]:
    """Where there are modules that do nothing, which the description of a part may exchange."""
    for module in model.modules():
        children = child_table(module)
        for name, child in children.items():
            if type(child) is nn.Identity:
                yield children, name, child


def why_not_plain(model: nn.Module) -> str:
    """Why a cut transformers model cannot be described by a plain config; empty where it can."""
    if not _is_transformers(model):
        return ""
    from sosp_hub.checkpoint.transformers.save import describe

    with torch.random.fork_rng(devices=[]):
        try:
            return describe(model).obstacle  # type: ignore[arg-type]
        except CheckpointError as error:
            return str(error)


def _outermost(model: nn.Module) -> Iterator[nn.Module]:
    if _is_transformers(model) or _is_timm(model):
        yield model
    else:
        for child in model.children():
            yield from _outermost(child)


def _is_transformers(model: nn.Module) -> bool:
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(model, library.PreTrainedModel)


def _is_timm(model: nn.Module) -> bool:
    return "timm" in sys.modules and is_whole(model)
