"""One step of generation as a function of plain tensors: the cache goes in and comes out again.

Inputs and outputs have the names that exporters of transformers' models agree on:
``past_key_values.N.key`` and ``.value`` (samples, KV heads, tokens so far, size of a head) go in,
``present.N.key`` and ``.value`` with the new tokens come out.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from sosp_hub.checkpoint.format.proof import cached_sizes
from sosp_hub.checkpoint.inputs import made_up_inputs
from sosp_hub.compat.transformers import cache_in
from sosp_hub.errors import ModelError
from sosp_hub.structure.isolation import isolated
from sosp_hub.targets.writers.forms import write_onnx

_PAST, _NEW = 3, 2


class Step(nn.Module):
    """A decoder that takes tokens and the keys and values of the tokens before them.

    Args:
        model: A causal language model that keeps a cache of keys and values.

    Raises:
        ModelError: A model that keeps none.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        inputs = made_up_inputs(model)
        tokens = inputs.get("input_ids") if isinstance(inputs, dict) else None
        with isolated(model), torch.no_grad():
            self.sizes = [] if tokens is None else cached_sizes(model, {"input_ids": tokens})
            if not self.sizes or not all(map(min, self.sizes)):
                raise ModelError(
                    f"{type(model).__name__}: keeps no cache of keys and values in every layer; "
                    f"export it without one (cache=false)"
                )
            (self.cache_name,) = cache_in(model(input_ids=tokens, use_cache=True))
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *past: Tensor) -> tuple[Any, ...]:
        """Logits of the new tokens, and all keys and values.

        Args:
            input_ids: New tokens (samples, new).
            attention_mask: 1 where a token counts (samples, so far + new).
            *past: Key and value of each layer in turn.
        """
        pairs = list(zip(past[::2], past[1::2], strict=True))
        cache: Any = DynamicCache(pairs)
        options: dict[str, Any] = {self.cache_name: cache, "use_cache": True}
        if self.takes_positions:
            counted = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            options["position_ids"] = counted[:, -input_ids.shape[1] :]
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **options)
        return output.logits, *(
            each for layer in cache.layers for each in (layer.keys, layer.values)
        )

    def names(self, ahead: str) -> list[str]:
        """Names of the keys and values."""
        return [f"{ahead}.{i}.{part}" for i in range(len(self.sizes)) for part in ("key", "value")]

    def empty(self, num_samples: int, tokens: int = 0) -> list[Tensor]:
        """Keys and values of so many tokens, all zero."""
        dtype = next(self.model.parameters()).dtype
        shapes = [(num_samples, heads, tokens, size) for heads, size in self.sizes for _ in "kv"]
        return [torch.zeros(shape, dtype=dtype) for shape in shapes]


def to_onnx_with_cache(model: nn.Module, path: str | Path) -> Path:
    """Writes one step of generation as an ONNX file, for any number of samples and tokens.

    Args:
        model: A pruned causal language model.
        path: The file.

    Raises:
        ModelError: A model that keeps no cache of keys and values.
        CheckpointError: The packages are missing, or torch cannot export the model.
    """
    step = Step(model).eval()
    tokens = torch.arange(3, 3 + 2 * _NEW).reshape(2, _NEW)
    args = (tokens, torch.ones(2, _PAST + _NEW, dtype=torch.long), *step.empty(2, _PAST))
    free = torch.export.Dim.DYNAMIC
    shapes = ({0: free, 1: free}, {0: free, 1: free}, tuple({0: free, 2: free} for _ in args[2:]))
    return write_onnx(
        step,
        path,
        args,
        shapes,
        input_names=["input_ids", "attention_mask", *step.names("past_key_values")],
        output_names=["logits", *step.names("present")],
    )
