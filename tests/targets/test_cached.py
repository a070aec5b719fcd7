"""Generation with a cache, outside of transformers: the same tokens."""

import numpy as np
import pytest
import torch

import sosp_hub
from sosp_hub.checkpoint.format.standins import RemovedAttention
from sosp_hub.errors import ModelError
from sosp_hub.targets.writers.cached import Step
from tests.checkpoint import cuts

TOKENS = torch.tensor([[0, 0, 5, 6, 7, 8], [3, 4, 5, 6, 7, 8]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def without_attention(*layers):
    model = cuts.pruned("llama")
    for i in layers:
        model.model.layers[i].self_attn = RemovedAttention(layer_idx=i)
    return model


def with_a_window():
    """A cut Gemma-2, every second layer of which sees four tokens."""
    cls, config, cut = cuts.FAMILIES["gemma2"]
    torch.manual_seed(0)
    model = cls(type(config)(**{**config.to_dict(), "sliding_window": 4})).eval()
    cut(model)
    return model


MODELS = {
    "llama": lambda: cuts.pruned("llama"),
    "no attention in layer 0": lambda: without_attention(0),
    "a sliding window": with_a_window,
    "gpt2": lambda: cuts.pruned("gpt2"),
}


def expected(model, num):
    with torch.no_grad():
        return model.generate(
            TOKENS, attention_mask=MASK, max_new_tokens=num, do_sample=False, pad_token_id=0,
            eos_token_id=None, use_cache=True,
        )  # fmt: skip


def generated(run, past, num):
    """Tokens by a function of names, told to count the padded tokens of the first sample out."""
    tokens, new, mask = TOKENS.numpy(), TOKENS.numpy(), MASK.numpy()
    for _ in range(num):
        logits, *present = run({"input_ids": new, "attention_mask": mask, **past})
        new = np.asarray(logits)[:, -1:].argmax(-1)
        past = dict(zip(past, present, strict=True))
        tokens = np.concatenate([tokens, new], 1)
        mask = np.concatenate([mask, np.ones_like(new)], 1)
    return torch.from_numpy(tokens)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_gives_what_the_library_generates(name):
    model = MODELS[name]()
    step = Step(model)

    def run(inputs):
        with torch.no_grad():
            return [each.numpy() for each in step(*map(torch.from_numpy, inputs.values()))]

    past = zip(step.names("past"), (each.numpy() for each in step.empty(2)), strict=True)
    assert torch.equal(generated(run, dict(past), 8), expected(model, 8))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "no attention in layer 0", "a sliding window"])
def test_onnxruntime_generates_the_same_tokens(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = MODELS[name]()
    path = sosp_hub.export(model, "onnx", tmp_path / "model.onnx", cache=True)
    session = runtime.InferenceSession(path)
    past = {
        each.name: np.zeros([2, each.shape[1], 0, each.shape[3]], np.float32)
        for each in session.get_inputs()[2:]
    }
    found = generated(lambda inputs: session.run(None, inputs), past, 8)
    assert torch.equal(found, expected(model, 8))
    assert session.get_outputs()[1].name == "present.0.key"


def test_a_model_without_keys_is_refused():
    with pytest.raises(ModelError, match=r"Mamba.*cache=false"):
        Step(cuts.pruned("mamba"))
    with pytest.raises(ModelError, match="ViT"):
        Step(cuts.pruned("vit"))
