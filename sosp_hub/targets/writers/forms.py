"""Other formats of a pruned model, each compared with it before the file counts.

``to_onnx`` and ``to_archive`` write one file; ``padded`` gives a model that any loader reads. For
llama.cpp see `sosp_hub.targets.writers.gguf`.
"""

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sosp_hub.checkpoint.format import proof
from sosp_hub.checkpoint.format.modules import own_config
from sosp_hub.checkpoint.format.standins import StandIn
from sosp_hub.checkpoint.inputs import made_up_inputs
from sosp_hub.compat.transformers import EXPERTS_KEY
from sosp_hub.errors import CheckpointError, ModelError

Inputs = Mapping[str, Any] | tuple[Any, ...]


def padded(model: nn.Module) -> nn.Module:
    """The same function in a model that a plain config builds: zeros fill up narrow layers.

    Layers become as wide as the widest of their kind, where the config can say that, else as wide
    as before pruning; what was taken out comes back as zeros. Save it with the library's own
    ``save_pretrained``.

    Args:
        model: A pruned transformers model, cut inside its layers.

    Raises:
        ModelError: No transformers model.
        CheckpointError: Zeros at the end would change what it computes, as they do in a residual
            stream behind a normalisation.
    """
    from sosp_hub.checkpoint.io import library_of

    if library_of(model) != "transformers":
        raise ModelError(f"{type(model).__name__}: only transformers models have a plain config")
    inputs = made_up_inputs(model)
    if inputs is None:
        raise CheckpointError(
            f"{type(model).__name__}: its config does not tell how its inputs look, so padding "
            f"could not be checked"
        )
    for config in _wide_configs(model):
        filled = _filled(model, config)
        if filled is not None and proof.same_output(filled, model, inputs, 1e-5):
            return filled.eval()
    raise CheckpointError(
        f"{type(model).__name__}: zeros at the end of its layers would change what it computes; "
        f"save it with its delta, or export it to ONNX"
    )


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
        with _plain_experts(model):
            torch.onnx.export(
                model.eval(),
                args,
                str(path),
                dynamo=True,
                dynamic_shapes=shapes,
                external_data=False,
                verbose=False,
                **options,
            )
    except ImportError as error:
        raise CheckpointError(f"ONNX: {error}; pip install onnx onnxscript") from error
    except Exception as error:
        raise CheckpointError(
            f"ONNX: torch cannot export {type(model).__name__} "
            f"({last_cause(error)}); export.to_archive writes a torch.export archive, and "
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
        raise CheckpointError(f"{type(model).__name__}: pass inputs= of one forward pass")
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


def _wide_configs(model: Any) -> list[Any]:
    """Plain configs to try: as wide as the widest layer, then as wide as before pruning."""
    from sosp_hub.checkpoint.transformers import load as adapter
    from sosp_hub.checkpoint.transformers import native

    config, delta = native.best_skeleton(model)
    skeleton = adapter.build_meta(type(model), config)
    largest: dict[int, int] = {}
    for old, new in native.all_pairs(skeleton, adapter.base_name(model), delta):
        largest[old] = max(new, largest.get(old, 0))
    narrow = copy.deepcopy(config)
    counts = Counter(value for value in vars(narrow).values() if type(value) is int)
    for key, value in vars(config).items():
        if type(value) is int and value in largest and counts[value] == 1:
            setattr(narrow, key, largest[value])
    return [narrow, config, adapter.plain_config(model.config)]


def _filled(model: Any, config: Any) -> nn.Module | None:
    """The model that a plain config builds, with the weights of ``model`` in its leading slices."""
    from sosp_hub.checkpoint.transformers import load as adapter

    try:
        wide: Any = adapter.build(type(model), adapter.plain_config(config))
    except Exception:  # noqa: BLE001 - a config that makes no sense; the next one is tried
        return None
    removed = tuple(
        f"{name}." for name, module in model.named_modules() if isinstance(module, StandIn)
    )
    state = wide.state_dict()
    given = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (removed and name.startswith(removed))
    }
    gone = {name for name in state.keys() - given.keys() if removed and name.startswith(removed)}
    if state.keys() != given.keys() | gone:
        return None
    with torch.no_grad():
        for name, tensor in state.items():
            if name in gone:
                tensor.zero_()
                continue
            small = given[name]
            if small.dim() != tensor.dim() or any(
                s > t for s, t in zip(small.shape, tensor.shape, strict=True)
            ):
                return None
            tensor.zero_()
            tensor[tuple(slice(size) for size in small.shape)] = small.to(tensor)
    return wide.to(next(model.parameters()).dtype)
