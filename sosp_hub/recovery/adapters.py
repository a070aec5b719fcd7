"""What is trained instead of all weights, or with less memory: adapters, checkpointed gradients."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sosp_hub.compat.torch import forward_hook_table, parameter_table
from sosp_hub.errors import ModelError
from sosp_hub.recipe.schema import LoraSection


@contextmanager
def adapted(model: nn.Module, config: LoraSection | None, seed: int) -> Iterator[None]:
    """Inside, low-rank adapters (Hu et al., arXiv 2106.09685) are what can be trained.

    Afterwards they are merged into the weights: the model has the modules and shapes that it had,
    and computes what it computed with them. After an exception they are taken out unmerged.

    Args:
        model: Is changed in place.
        config: Of the adapters; None = none.
        seed: Of their beginning, with which they change nothing.

    Raises:
        ModelError: PEFT is missing, or nothing can have an adapter.
    """
    if config is None:
        yield
        return
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise ModelError("finetune.lora: needs PEFT; pip install peft, or leave it out") from error
    names = _targets(model, config)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    made: Any = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.dropout,
        target_modules="|".join(map(re.escape, names)),  # a list of names would be one of ends
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tuner = LoraModel(model, {"default": made}, "default")
    ended = False
    try:
        yield
        ended = True
    finally:
        if ended:
            tuner.merge_and_unload()
        else:
            tuner.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        for attribute in ("peft_config", "peft_type"):
            model.__dict__.pop(attribute, None)


def _targets(model: nn.Module, config: LoraSection) -> list[str]:
    """Names of the layers that get an adapter."""
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    able = [
        name
        for name, module in model.named_modules()
        if (
            isinstance(module, nn.Linear)
            or (isinstance(module, nn.Conv2d) and module.groups == 1)
            or type(module).__name__ == "Conv1D"
        )
        and users.get(id(parameter_table(module).get("weight"))) == 1  # neither tied nor computed
    ]
    chosen = [
        name
        for name in able
        if config.modules is None
        or any(name == end or name.endswith(f".{end}") for end in config.modules)
    ]
    if not chosen:
        raise ModelError(
            f"finetune.lora.modules: {list(config.modules or ())} fits no linear layer or "
            f"convolution with weights of its own; there are {', '.join(able[:8]) or 'none'}"
        )
    return chosen


@contextmanager
def checkpointed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside, activations are computed again in the backward pass; afterwards as before.

    Raises:
        ModelError: A model that cannot.
    """
    if not wanted:
        yield
        return
    before = [
        (module, _switches(module), set(forward_hook_table(module))) for module in model.modules()
    ]
    stop = _checkpointing(model)
    if stop is None:
        raise ModelError(
            f"finetune.gradient_checkpointing: a {type(model).__name__} cannot; leave it out, or "
            "use smaller batches with gradient_accumulation"
        )
    try:
        yield
    finally:
        stop()
        for module, switches, hooks in before:
            for name in _switches(module).keys() - switches.keys():
                del vars(module)[name]
            vars(module).update(switches)
            table = forward_hook_table(module)
            for number in table.keys() - hooks:
                del table[number]


def _switches(module: nn.Module) -> dict[str, Any]:
    """What a module says of checkpointed gradients, and of inputs that need some for them."""
    own = vars(module).items()
    return {k: v for k, v in own if "checkpointing" in k or "require_grads" in k}


def _checkpointing(model: Any) -> Callable[[], Any] | None:
    """Turns it on; what turns it off again, None where the model cannot."""
    if hasattr(model, "set_grad_checkpointing"):  # timm
        model.set_grad_checkpointing(True)
        return lambda: model.set_grad_checkpointing(False)
    for name in ("activation", "gradient"):  # transformers from 5.24 on, and before
        enable = getattr(model, f"{name}_checkpointing_enable", None)
        if enable is not None:
            try:
                enable({"use_reentrant": False})
            except ValueError:  # this class does not support it
                return None
            return getattr(model, f"{name}_checkpointing_disable")
    return None
