"""Smoke tests of `sosp_hub.compat.huggingface_hub`."""

import tempfile
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, get_session
from torch import nn

from sosp_hub.compat import huggingface_hub as compat
from sosp_hub.compat.smoke import expect, smoke


@smoke("which files a push leaves out, and what `inspect --verify` compares")
def hash_of_git() -> None:
    given = compat.git_hash(b"")
    expect(given == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", f"an empty file is {given}")


@smoke("trying a push again after the connection broke")
def errors_of_the_transport() -> None:
    error = compat.transport_error()
    names = {cls.__name__ for cls in error.__subclasses__()}
    expect(issubclass(error, Exception), f"{error} is no error")
    expect({"NetworkError", "TimeoutException"} <= names, f"kinds of it are {sorted(names)}")


@smoke("limits of size and time for the answers of a hub")
def answers_as_streams() -> None:
    stream, hooks = compat.byte_stream(), get_session().event_hooks
    expect(hasattr(stream, "close"), f"{stream} has no close()")
    expect(isinstance(hooks, dict), f"event_hooks of the session are {hooks}")


class _Mixed(nn.Linear, PyTorchModelHubMixin):
    def __init__(self, width: int = 2) -> None:
        super().__init__(width, width)


@smoke("cut models of PyTorchModelHubMixin: their own save_pretrained and from_pretrained")
def steps_of_the_mixin() -> None:
    expect(compat.is_mixin(_Mixed) and not compat.is_mixin(nn.Linear), "classes are taken for it")
    expect(compat.mixin_config(_Mixed(3)) == {"width": 3}, "arguments are kept elsewhere")
    expect(compat.mixin_config(nn.Linear(2, 2)) is None, "a plain module has a config of it")
    seen: list[str] = []
    originals = {name: compat.get_mixin_step(name) for name in compat.MIXIN_STEPS}

    def watched(name: str) -> Any:
        def step(cls: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return originals[name].__get__(None, cls)(*args, **kwargs)

        return classmethod(step)

    try:
        for name in compat.MIXIN_STEPS[1:]:
            compat.set_mixin_step(name, watched(name))
        with tempfile.TemporaryDirectory() as folder:
            model = _Mixed(3)
            model.save_pretrained(folder)
            loaded = _Mixed.from_pretrained(folder)
    finally:
        for name, step in originals.items():
            compat.set_mixin_step(name, step)
    expect(seen == list(compat.MIXIN_STEPS[1:]), f"from_pretrained takes the steps {seen}")
    expect(torch.equal(loaded.weight, model.weight), "other weights are loaded")
