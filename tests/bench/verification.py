"""What it costs to verify a cut in every way that a model is run, beside the traced inputs alone.

Run: ``python tests/bench/verification.py [ROUNDS]``. Prints CPU seconds (least of the rounds) of
``apply`` on a graph that was not cut before, with all ways and with the traced inputs alone, and
the median ratio of pairs taken in turn.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import timm
import torch
import transformers as tf
from torch import nn

from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply
from sosp_hub.surgery.verification import check
from tests.structure.oracles import fill, half

_BERT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8,
    "vocab_size": 96,
}  # fmt: skip
_SIZES = {**_BERT, "num_key_value_heads": 2, "head_dim": 8}
_IMAGE = {"img_size": 32, "patch_size": 8, "depth": 4}
_MODELS: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SIZES)),
    "Mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_SIZES, num_local_experts=4)),
    "Qwen3-MoE": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**_SIZES, num_experts=8, moe_intermediate_size=16)
    ),
    "BERT": lambda: tf.BertForSequenceClassification(tf.BertConfig(**_BERT)),
    "ViT-Ti": lambda: timm.create_model("vit_tiny_patch16_224", **_IMAGE),
    "ResNet-18": lambda: timm.create_model("resnet18"),
}


def main() -> None:
    """Prints a table."""
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    for name, build in _MODELS.items():
        model = fill(build().eval())
        inputs: Any = (torch.randn(2, 3, *[64 if name == "ResNet-18" else 32] * 2),)
        if isinstance(model, tf.PreTrainedModel):
            inputs = {"input_ids": torch.arange(18).view(2, 9)}
        outputs = "logits" if isinstance(inputs, dict) else None
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(rounds + 1):
            for alone in (True, False):
                graph = trace(model, inputs, outputs)
                plan = half(graph)
                patch = mock.patch.object(check, "_equal_on_all_ways", return_value=True)
                start = time.process_time()
                if alone:
                    with patch:
                        apply(model, graph, plan)
                else:
                    apply(model, graph, plan)
                seconds[alone].append(time.process_time() - start)
        plain, every = (seconds[alone][1:] for alone in (True, False))
        ratio = statistics.median(b / a for a, b in zip(plain, every, strict=True))
        sys.stdout.write(f"{name:10} {min(plain):.3f} s  {min(every):.3f} s  {ratio:.2f}\n")


if __name__ == "__main__":
    main()
