"""The teacher of a fine-tuning: the dense model, or another one."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from sosp_hub.errors import ModelError, SospHubError, shortened
from sosp_hub.pipeline.context import Context
from sosp_hub.recipe.schema import ModelSection
from sosp_hub.zoo.load import Loaded, load_model


@contextmanager
def teacher_of(context: Context) -> Iterator[nn.Module | None]:
    """What is followed; None where nothing is. A dense model that is not waits on the CPU."""
    config, device = context.recipe.finetune, context.accelerator.device
    if config.follows() and config.teacher is None:
        yield context.dense
        return
    if getattr(context.loss_fn(context.dense), "at_minimum", False):  # the loss needs it as well
        yield _other(context).to(device) if config.follows() else None
        return
    context.dense.cpu()
    try:
        yield _other(context).to(device) if config.follows() else None
    finally:
        context.dense.to(device)


def _other(context: Context) -> nn.Module:
    """Another model for the same data.

    Raises:
        ModelError: One with another vocabulary, other classes, or these in another order.
    """
    section, mine = context.recipe.finetune.teacher, context.recipe.model
    assert section is not None and context.data is not None  # noqa: PT018
    keys = {"library": section.library or mine.library, "task": mine.task, "num_labels": None}
    given = section.model_dump(exclude={"library"})
    wanted = ModelSection.model_validate({**given, **keys})
    try:
        loaded = load_model(wanted, data=context.data.info)
    except SospHubError as error:
        told = re.sub(r"^model(\.\w+)?: ", "", str(error))
        raise type(error)(f"finetune.teacher: {told}") from error
    if loaded.new_head:
        raise ModelError(
            f"finetune.teacher: {section.id} has no head for this data; write a model that was "
            "trained for it"
        )
    names = context.data.info.class_names
    theirs, ours = (_outputs(names, each) for each in (loaded, context.loaded))
    if theirs != ours:
        raise ModelError(
            f"finetune.teacher: {section.id} has the classes at other outputs ({_shown(theirs)}) "
            f"than the model ({_shown(ours)}); a teacher needs the same, since outputs are "
            "compared one by one"
        )
    if context.loaded.tokenizer is not None:
        theirs = loaded.tokenizer.get_vocab() if loaded.tokenizer is not None else {}
        ours = context.loaded.tokenizer.get_vocab()
        if theirs != ours:
            differing = len(theirs.items() ^ ours.items())
            raise ModelError(
                f"finetune.teacher: {section.id} has {len(theirs):,} tokens, the model "
                f"{len(ours):,}, and {differing:,} entries differ; a teacher needs the same "
                "vocabulary"
            )
    return loaded.model.eval()


def _outputs(names: Sequence[str], loaded: Loaded) -> dict[str, int]:
    """Which output of a model each class of the data is."""
    order = getattr(loaded.processor, "label_order", None) or range(len(names))
    return dict(zip(names, order, strict=True))


def _shown(outputs: Mapping[str, int]) -> str:
    return shortened(", ".join(f"{name} = {number}" for name, number in outputs.items()))
