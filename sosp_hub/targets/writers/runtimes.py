"""Files of runtimes that start from ONNX or ``torch.export``: OpenVINO and ExecuTorch."""

import copy
import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sosp_hub.checkpoint.transformers.load import plain_config
from sosp_hub.checkpoint.transformers.per_layer import describe_layers
from sosp_hub.errors import CheckpointError
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


def to_executorch(model: nn.Module, path: str | Path, *, max_tokens: int = 1024) -> Path:
    """Writes an ExecuTorch program for the portable kernels (needs the package ``executorch``).

    A model that generates text takes ``input_ids`` (1, 1) and ``cache_position`` (1) and keeps its
    cache inside, as transformers' own exportable module does; any other takes its inputs in the
    shapes of one sample.

    Args:
        model: Any pruned model, left as it was.
        path: The file, by convention ``.pte``.
        max_tokens: Room in the cache.

    Raises:
        CheckpointError: The package is missing, or the model cannot be exported.
    """
    exir = _package("executorch.exir", "ExecuTorch")
    try:
        with torch.no_grad():
            program = exir.to_edge(_program(model, max_tokens)).to_executorch()
    except Exception as error:
        raise CheckpointError(
            f"ExecuTorch: {type(model).__name__} cannot be exported ({last_cause(error)}); "
            f"the targets onnx and torch_export ask for less"
        ) from error
    Path(path).write_bytes(program.buffer)
    return Path(path)


def _program(model: Any, max_tokens: int) -> Any:
    can_generate = getattr(model, "can_generate", lambda: False)
    if not can_generate() or model.config.is_encoder_decoder:
        args, kwargs = arguments(model, None)
        one = tuple(each[:1] for each in args)
        kwargs = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        return torch.export.export(model.eval(), one, kwargs, strict=False)
    from transformers import GenerationConfig
    from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

    model = copy.copy(model)  # gets other configs; the weights are shared
    model.config = plain_config(model.config)
    describe_layers(model, model.config)
    model.generation_config = GenerationConfig(
        use_cache=True, cache_implementation="static",
        cache_config={"batch_size": 1, "max_cache_len": max_tokens},
    )  # fmt: skip
    place = next(model.parameters()).device
    inputs = {
        "input_ids": torch.ones(1, 1, dtype=torch.long, device=place),
        "cache_position": torch.zeros(1, dtype=torch.long, device=place),
    }
    step = TorchExportableModuleWithStaticCache(model)
    return torch.export.export(step, (), inputs, strict=False)


def _package(name: str, who: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise CheckpointError(f"{who}: {error}; pip install {package}") from error
