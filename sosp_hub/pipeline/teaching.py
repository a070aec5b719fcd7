"""The teacher of a fine-tuning: the dense model, or another one."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from sosp_hub.errors import ModelError
from sosp_hub.pipeline.context import Context
from sosp_hub.recipe.schema import ModelSection
from sosp_hub.zoo.load import load_model


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
        ModelError: One with another vocabulary or other classes.
    """
    section, mine = context.recipe.finetune.teacher, context.recipe.model
    assert section is not None and context.data is not None  # noqa: PT018
    keys = {"library": section.library or mine.library, "task": mine.task, "num_labels": None}
    given = section.model_dump(exclude={"library"})
    loaded = load_model(ModelSection.model_validate({**given, **keys}), data=context.data.info)
    if loaded.new_head:
        raise ModelError(
            f"finetune.teacher: {section.id} has no head for this data; write a model that was "
            "trained for it"
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
