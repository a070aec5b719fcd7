"""Eval mode for a while; afterwards every module is in the mode that it was in."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """The models are in eval mode; norms that a caller froze in a training model stay so.

    Modes belong to the names of modules: a cut in place puts others where they were.
    """
    before = [{name: each.training for name, each in model.named_modules()} for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, modes in zip(models, before, strict=True):
            for name, module in model.named_modules():
                module.training = modes.get(name, modes[""])
