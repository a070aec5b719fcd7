"""How a transformers model takes the delta from its config while it is built."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import transformers

from sosp_hub.checkpoint.format.delta import apply_section, versions_said
from sosp_hub.checkpoint.format.record import KEY, Delta, Section
from sosp_hub.compat.torch import child_table
from sosp_hub.errors import CheckpointError

if TYPE_CHECKING:  # the hook that its import sets off needs this file
    from transformers.modeling_utils import PreTrainedModel

APPLIED = "_sosp_hub_applied"
"""Set on a model that took its part of the delta."""


def shrink(model: "PreTrainedModel", parse: Callable[[Any, str], Delta]) -> None:
    """Applies the delta in the model's config to this class; does nothing without one.

    Args:
        model: While it is built.
        parse: From the delta's JSON and its place to the delta.

    Raises:
        CheckpointError: The delta is damaged, or for another class, library or version.
    """
    record = vars(model.config).get(KEY)
    if record is None or getattr(model, APPLIED, False):
        return
    where = f"config.json: {KEY}"
    delta = parse(record, where)
    if delta.library != "transformers":
        raise CheckpointError(
            f"{where}.library: {delta.library!r}, but a transformers model is being built"
        )
    with versions_said(delta, transformers.__version__):
        if _shrink_part(model, delta, where):
            setattr(model, APPLIED, True)


def _shrink_part(model: "PreTrainedModel", delta: Delta, where: str) -> bool:
    if type(model).__name__ == delta.base.cls:
        apply_section(model, delta.base, f"{where}.base")
    elif any(type(module).__name__ == delta.base.cls for module in model.modules()):
        _shrink_head(model, delta, f"{where}.head")
    elif delta.head is None and (part := _of_sibling(model, delta.base)) is not None:
        apply_section(model, part, f"{where}.base")
    else:
        return False
    return True


def _shrink_head(model: "PreTrainedModel", delta: Delta, where: str) -> None:
    head = delta.head
    if head is None or head.empty:
        return
    if head.cls != type(model).__name__:
        raise CheckpointError(
            f"{where}.class: the checkpoint holds a {head.cls} whose head was cut too; "
            f"a {type(model).__name__} has another head. "
            f"Load it as {head.cls} or as {delta.base.cls}"
        )
    apply_section(model, head, where)


def _of_sibling(model: "PreTrainedModel", section: Section) -> Section | None:
    """The part of a section that concerns a class with other children; None where it shares none.

    An encoder on its own, out of an encoder-decoder that is its own base model, is such a class.
    """

    def here(name: str) -> bool:
        return name.partition(".")[0] in child_table(model)

    roots = {name.partition(".")[0] for name in (*section.modules, *section.tensors) if name}
    if not any(hasattr(child_table(model).get(root), "base_model_prefix") for root in roots):
        return None
    return dataclasses.replace(
        section,
        modules={name: values for name, values in section.modules.items() if name and here(name)},
        configs={name: values for name, values in section.configs.items() if name and here(name)},
        tensors={name: shape for name, shape in section.tensors.items() if here(name)},
        replaced={name: one for name, one in section.replaced.items() if here(name)},
        buffers=tuple(filter(here, section.buffers)),
        biases=tuple(filter(here, section.biases)),
        dropped=tuple(filter(here, section.dropped)),
    )
