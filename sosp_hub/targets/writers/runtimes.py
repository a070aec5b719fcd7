"""Files of runtimes that start from ONNX or ``torch.export``: OpenVINO and ExecuTorch."""

import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sosp_hub.errors import CheckpointError, ModelError
from sosp_hub.targets.writers.cached import to_onnx_with_cache
from sosp_hub.targets.writers.forms import arguments, last_cause, to_onnx


def to_openvino(model: nn.Module, path: str | Path, *, cache: bool = False) -> Path:
    """Writes OpenVINO's ``.xml`` and ``.bin`` by way of ONNX (needs the package ``openvino``).

    Weights keep the model's type. On the CPU OpenVINO computes in bfloat16 where the processor has
    it, unless it is compiled with ``INFERENCE_PRECISION_HINT: f32``.

    Args:
        model: Any pruned model.
        path: The ``.xml``; the ``.bin`` has the same name.
        cache: One step of generation instead of one forward pass.

    Raises:
        ModelError: With ``cache``, a model that keeps no cache of keys and values.
        CheckpointError: A package is missing, or the model cannot be exported.
    """
    openvino = _package("openvino", "OpenVINO")
    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder) / "model.onnx"
        (to_onnx_with_cache if cache else to_onnx)(model, onnx)
        openvino.save_model(openvino.convert_model(onnx), path, compress_to_fp16=False)
    return Path(path)


def to_executorch(model: nn.Module, path: str | Path) -> Path:
    """Writes an ExecuTorch program for the portable kernels (needs the package ``executorch``).

    Args:
        model: A pruned model that generates no text.
        path: The file, by convention ``.pte``; it takes one sample in the shapes of the config.

    Raises:
        ModelError: A model that generates text.
        CheckpointError: The package is missing, or the model cannot be exported.
    """
    check_generates_no_text(model)
    exir = _package("executorch.exir", "ExecuTorch")
    args, kwargs = arguments(model, None)
    one = tuple(each[:1] for each in args)
    named = {
        key: each[:1] if isinstance(each, torch.Tensor) else each for key, each in kwargs.items()
    }
    try:
        program = torch.export.export(model.eval(), one, named, strict=False)
        written = exir.to_edge(program).to_executorch()
    except Exception as error:
        raise CheckpointError(
            f"ExecuTorch: {type(model).__name__} cannot be exported ({last_cause(error)}); "
            f"try the targets onnx or torch_export"
        ) from error
    Path(path).write_bytes(written.buffer)
    return Path(path)


def check_generates_no_text(model: Any) -> None:
    """Refuses a model whose programs would need a cache of keys and values.

    Raises:
        ModelError: A model that generates text.
    """
    if getattr(model, "can_generate", lambda: False)():
        raise ModelError(
            f"ExecuTorch: {type(model).__name__} generates text, which needs a cache of keys and "
            f"values, and programs with one are not supported; write onnx or openvino with "
            f"cache=true, or gguf or mlx"
        )


def _package(name: str, who: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise CheckpointError(f"{who}: {error}; pip install {package}") from error
