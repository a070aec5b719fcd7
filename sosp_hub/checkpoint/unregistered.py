"""Parameters that a model computes with and does not register: no file will hold them."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

_LOG = logging.getLogger("sosp_hub")


def tell_unregistered(model: nn.Module) -> None:
    """Says which parameters a module keeps in plain lists, tuples or dicts alone.

    Neither ``state_dict`` nor ``save_pretrained`` knows of them: what is loaded has others.
    """
    if names := [*unregistered(model)]:
        _LOG.warning(
            "%s: %s%s not among the parameters of the model, so that a cut leaves them whole and "
            "no file will hold them; keep modules in an nn.ModuleList or nn.ModuleDict, and "
            "parameters in an nn.ParameterList or nn.ParameterDict",
            type(model).__name__,
            repr(names[0]),
            " is" if len(names) == 1 else f" and {len(names) - 1} more are",
        )


def unregistered(model: nn.Module) -> Iterator[str]:
    """Names, such as ``projections[0].weight``, of what is a parameter and not registered."""
    seen = {id(each) for each in (*model.parameters(), *model.modules())}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, list | tuple | Mapping):
                yield from _within(f"{name}.{key}".lstrip("."), value, seen)


def _within(name: str, value: Any, seen: set[int]) -> Iterator[str]:
    if id(value) in seen:
        return
    if isinstance(value, nn.Module):
        for own, parameter in value.named_parameters():
            yield from _within(f"{name}.{own}", parameter, seen)
        return
    if isinstance(value, nn.Parameter):
        seen.add(id(value))
        yield name
    elif isinstance(value, list | tuple | Mapping):
        seen.add(id(value))
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _within(f"{name}[{key!r}]", item, seen)
