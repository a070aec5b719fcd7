"""Other formats of a pruned model, each compared with it before the file counts.

``to_onnx`` and ``to_archive`` write one file.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.checkpoint.format.modules import own_config
from sosp_hub.checkpoint.inputs import made_up_inputs
from sosp_hub.compat.transformers import EXPERTS_KEY
from sosp_hub.errors import CheckpointError
from sosp_hub.modes import collector_paused
from sosp_hub.progress import only_errors

Inputs = Mapping[str, Any] | tuple[Any, ...]


def to_onnx(model: nn.Module, path: str | Path, inputs: Inputs | None = None) -> Path:
    """Writes an ONNX file (needs the packages ``onnx`` and ``onnxscript``).

    Args:
        model: Any pruned model.
        path: The file.
        inputs: Keyword or positional arguments of a forward pass; made up from the config if None.
            Their first dimension may have any size in the file.

    Raises:
        CheckpointError: The packages are missing, or torch cannot export the model.
    """
    args, kwargs = arguments(model, inputs)
    return write_onnx(model, path, args, _any_batch(args, kwargs), kwargs=kwargs)


def write_onnx(
    model: nn.Module, path: str | Path, args: tuple[Any, ...], shapes: Any, **options: Any
) -> Path:
    """Writes an ONNX file of one call.

    Args:
        model: What is called.
        path: The file.
        args: Positional arguments.
        shapes: Which of their dimensions may have any size, as ``torch.export`` takes it.
        **options: Of ``torch.onnx.export``.

    Raises:
        CheckpointError: The packages are missing, or torch cannot export the model.
    """
    try:
        from onnxscript import optimizer

        with _plain_experts(model), only_errors("onnxscript"), collector_paused():
            program: Any = torch.onnx.export(
                model.eval(),
                args,
                dynamo=True,
                dynamic_shapes=shapes,
                optimize=False,  # half of the time, for what readers do themselves as they load
                verbose=False,
                **options,
            )
            optimizer.fold_constants(program.model)
            optimizer.remove_unused_nodes(program.model)
            program.save(str(path), external_data=False)
    except ImportError as error:
        raise CheckpointError(f"ONNX: {error}; pip install onnx onnxscript") from error
    except Exception as error:
        raise CheckpointError(
            f"ONNX: torch cannot export {type(model).__name__} "
            f"({last_cause(error)}); the target torch_export writes a torch.export archive, and "
            f"sosp_hub.save_pretrained what transformers and timm load"
        ) from error
    return Path(path)


def to_archive(model: nn.Module, path: str | Path, inputs: Inputs | None = None) -> Path:
    """Writes a ``torch.export`` archive, which ``torch.export.load`` reads.

    Args:
        model: Any pruned model.
        path: The file, by convention ``.pt2``.
        inputs: See `to_onnx`.

    Raises:
        CheckpointError: torch cannot export the model.
    """
    args, kwargs = arguments(model, inputs)
    try:
        program = torch.export.export(
            model.eval(), args, kwargs, dynamic_shapes=_any_batch(args, kwargs), strict=False
        )
        torch.export.save(program, str(path))
    except Exception as error:
        raise CheckpointError(
            f"torch cannot export {type(model).__name__} ({last_cause(error)}); "
            f"sosp_hub.save_pretrained writes what transformers and timm load"
        ) from error
    return Path(path)


def arguments(model: nn.Module, inputs: Inputs | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of one forward pass without a cache.

    Raises:
        CheckpointError: None were given, and the config does not tell how they look.
    """
    inputs = made_up_inputs(model) if inputs is None else inputs
    if inputs is None:
        raise CheckpointError(
            f"{type(model).__name__}: its config does not tell how its inputs look; give them to "
            f"torch itself: torch.export.export(model, inputs), torch.onnx.export(model, inputs, "
            f"PATH)"
        )
    if isinstance(inputs, Mapping):
        caches = hasattr(getattr(model, "config", None), "use_cache")
        return (), {**inputs, **({"use_cache": False} if caches else {})}
    return tuple(inputs), {}


@contextlib.contextmanager
def _plain_experts(model: nn.Module) -> Iterator[None]:
    """Products of gathered weights in a mixture of experts: grouped ones are no part of ONNX.

    The model gets back what it had.
    """
    configs = {id(each): each for module in model.modules() if (each := own_config(module))}
    before = [
        (each, vars(each)[EXPERTS_KEY]) for each in configs.values() if vars(each).get(EXPERTS_KEY)
    ]
    try:
        for each, _ in before:
            setattr(each, EXPERTS_KEY, "batched_mm")
        yield
    finally:
        for each, was in before:
            setattr(each, EXPERTS_KEY, was)


def last_cause(error: BaseException) -> str:
    """First line of what went wrong in the first place; torch's exporter wraps it many times."""
    while (cause := error.__cause__) is not None:
        error = cause
    (line, *_) = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {line}"


def _any_batch(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    batch = torch.export.Dim.DYNAMIC

    def shape(value: Any) -> Any:
        return {0: batch} if isinstance(value, Tensor) else None

    return {name: shape(value) for name, value in kwargs.items()} or tuple(map(shape, args))
