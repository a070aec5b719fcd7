"""Proof at save time: what the files will build is the model that was saved."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.errors import CheckpointError

OTHER_OUTPUT = (
    "{}: the config and the delta build a model of the same shapes that computes something else; "
    "an attribute was changed that is no number"
)
_TOLERANCE = 1e-6  # of the largest output


def check_tensors(rebuilt: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Compares the names and shapes of a rebuilt model's tensors with what will be written.

    Raises:
        CheckpointError: Names the first tensor that differs.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in rebuilt.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            raise CheckpointError(
                f"tensor {name!r}: the model holds {given.get(name)}, "
                f"the files would build {expected.get(name)}"
            )


def changed_buffers(rebuilt: nn.Module, model: nn.Module) -> list[str]:
    """Buffers outside the state dict that the rebuilt model computes differently.

    Args:
        rebuilt: With data in its buffers.
        model: The pruned model.
    """
    kept = model.state_dict(keep_vars=True).keys()
    ours = dict(rebuilt.named_buffers())
    return [
        name
        for name, buffer in model.named_buffers()
        if name not in kept and not (name in ours and _same(buffer, ours[name]))
    ]


def adopt(rebuilt: nn.Module, model: nn.Module) -> None:
    """Gives a rebuilt model the weights and buffers of ``model``; nothing is copied."""
    rebuilt.load_state_dict(model.state_dict(), strict=False, assign=True)
    theirs = dict(model.named_buffers())
    for name, module in rebuilt.named_modules():
        for key in module._buffers:
            if (full := f"{name}.{key}".lstrip(".")) in theirs:
                module._buffers[key] = theirs[full]
    if callable(tie := getattr(rebuilt, "tie_weights", None)):
        tie()


def same_output(
    rebuilt: nn.Module,
    model: nn.Module,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    relative: float = _TOLERANCE,
) -> bool | None:
    """Whether both models compute the same; None where ``model`` cannot run the inputs.

    Args:
        rebuilt: Another model with the weights of ``model``.
        model: The pruned model; left as it was.
        inputs: Keyword or positional arguments of a forward pass.
        relative: Largest difference that passes, in units of the largest output.
    """
    with _eval(model), _eval(rebuilt), torch.no_grad():
        try:
            expected = _tensors(_run(model, inputs))
        except Exception:  # noqa: BLE001 - inputs that we made up; the caller does without
            return None
        given = _tensors(_run(rebuilt, inputs))
    return len(given) == len(expected) and all(
        _close(a, b, relative) for a, b in zip(given, expected, strict=True)
    )


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Builds modules whose parameters have no data and whose buffers have."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        yield


def _run(model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...]) -> Any:
    call: Callable[..., Any] = model
    return call(**inputs) if isinstance(inputs, Mapping) else call(*inputs)


@contextlib.contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    return [each for each in values if isinstance(each, Tensor)]


def _same(a: Tensor, b: Tensor) -> bool:
    b = b.to(a.device, a.dtype)
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _close(a: Tensor, b: Tensor, relative: float) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return not a.numel() or bool((a - b).abs().max() <= relative * b.abs().max().clamp(min=1e-6))
