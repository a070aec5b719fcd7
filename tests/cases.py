"""Small models of real architectures with random weights, as data: tests iterate over them.

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_something(case):
        model, inputs = case.model(), case.inputs()

Each has well under two million parameters and runs in milliseconds on one core.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn

from sosp_hub.types import Library

NUM_CLASSES = 5


@dataclass(frozen=True)
class Case:
    """One model, in eval mode, the same weights each time.

    Attributes:
        name: timm's name, or the transformers model type.
        task: What its head does.
        build: Makes the model.
        make_inputs: Example inputs for a batch: a tuple for timm, a dict for transformers.
        traits: What is special about it, to choose by: "residual", "depthwise", "grouped", "mha",
            "gqa", "gated", "fused_qkv", "layernorm", "groupnorm", "tied", "no_norm".
    """

    name: str
    task: str
    build: Callable[[], nn.Module] = field(repr=False)
    make_inputs: Callable[[int], Any] = field(repr=False)
    traits: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.name

    @property
    def library(self) -> Library:
        return "timm" if self.name.startswith("test_") else "transformers"

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build().eval()

    def inputs(self, num_samples: int = 2) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return self.make_inputs(num_samples)

    def batch(self, num_samples: int = 2) -> tuple[Any, Tensor] | dict[str, Tensor]:
        """Inputs with labels, as criteria and training take them."""
        inputs = self.inputs(num_samples)
        labels = torch.arange(num_samples) % NUM_CLASSES
        if self.library == "timm":
            return inputs, labels
        return {
            **inputs,
            "labels": inputs["input_ids"] if self.task == "text-generation" else labels,
        }


def _timm(name: str, traits: str, size: int = 32) -> Case:
    return Case(
        name,
        "image-classification",
        lambda: timm.create_model(name, num_classes=NUM_CLASSES),
        lambda num_samples: (torch.randn(num_samples, 3, size, size),),
        frozenset(traits.split()),
    )


def _text(num_samples: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 100, (num_samples, 12))}


def _image(num_samples: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(num_samples, 3, 32, 32)}


def _transformers(head: str, traits: str, make_inputs=_text, **config: Any) -> Case:
    """`head` is the model class; its config class gets the small numbers."""
    model_class = getattr(transformers, head)
    task: str = "text-generation"
    if head.endswith("SequenceClassification"):
        task = "text-classification"
    elif head.endswith("ImageClassification"):
        task = "image-classification"
    if task != "text-generation":
        config["num_labels"] = NUM_CLASSES
    make_config = model_class.config_class
    return Case(
        make_config.model_type,
        task,
        lambda: model_class(make_config(**config)),
        make_inputs,
        frozenset(traits.split()),
    )


_DECODER = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

TIMM = (
    _timm("test_resnet", "residual"),
    _timm("test_byobnet", "residual grouped"),
    _timm("test_efficientnet", "residual depthwise"),
    _timm("test_efficientnet_gn", "residual depthwise groupnorm"),
    _timm("test_convnext", "residual depthwise layernorm"),
    _timm("test_nfnet", "residual no_norm"),
    _timm("test_vit", "residual mha fused_qkv layernorm", size=160),
    _timm("test_vit3", "residual mha fused_qkv layernorm", size=160),
)

TRANSFORMERS = (
    _transformers("LlamaForCausalLM", "residual gqa gated", num_key_value_heads=2, **_DECODER),
    _transformers(
        "Qwen3ForCausalLM", "residual gqa gated", num_key_value_heads=2, head_dim=16, **_DECODER
    ),
    _transformers(
        "GPT2LMHeadModel",
        "residual mha fused_qkv layernorm tied",
        **{"vocab_size": 100, "n_embd": 64, "n_inner": 96, "n_layer": 2, "n_head": 4},
        **{"n_positions": 64, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2},
    ),
    _transformers("BertForSequenceClassification", "residual mha layernorm", **_ENCODER),
    _transformers(
        "DistilBertForSequenceClassification",
        "residual mha layernorm",
        **{"vocab_size": 100, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4},
        max_position_embeddings=64,
    ),
    _transformers(
        "ViTForImageClassification",
        "residual mha layernorm",
        _image,
        **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "image_size": 32, "patch_size": 8},
    ),
)

CASES = TIMM + TRANSFORMERS


def with_trait(*traits: str) -> tuple[Case, ...]:
    """The cases that have every one of these traits; raises where there is none."""
    chosen = tuple(case for case in CASES if case.traits.issuperset(traits))
    assert chosen, f"no case has the traits {traits}"
    return chosen
