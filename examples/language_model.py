"""A language model, from zero to the hub: `python examples/language_model.py MODEL TEXT_FILE`.

Cuts a fifth of the parameters of a causal language model without training: criterion and rebuild
need some pages of text. MODEL is a hub id or a folder, such as
`HuggingFaceTB/SmolLM2-135M-Instruct`. Without arguments a tiny model with random weights and a
file of the package stand in, to show the steps.
"""

# %% Model, tokens. In a notebook the two names are set here
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import sosp_hub

MODEL, TEXT_FILE = "", ""
if "__file__" in globals() and len(sys.argv) == 3:
    MODEL, TEXT_FILE = sys.argv[1:]
torch.manual_seed(0)
if MODEL:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = torch.tensor(tokenizer(Path(TEXT_FILE).read_text())["input_ids"])
else:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model, tokenizer = LlamaForCausalLM(config).eval(), None
    ids = torch.tensor(list(Path(sosp_hub.__file__).read_bytes()))
texts = ids[: len(ids) // 128 * 128].view(-1, 128)
held_out, texts = texts[:4], texts[4:132]
batches = [{"input_ids": part, "labels": part} for part in texts.split(4)]


def perplexity(model: torch.nn.Module) -> None:
    """Of the texts that calibrated nothing."""
    loss = sosp_hub.evaluate(model, [{"input_ids": held_out, "labels": held_out}], ["loss"])["loss"]
    print(f"perplexity {math.exp(loss.value):.1f}")


perplexity(model)

# %% KV groups and neurons, a fifth of the parameters
graph = sosp_hub.trace(model, {"input_ids": texts[:2]}, outputs="logits")
saliency = sosp_hub.score(
    model, graph, batches, criterion="fisher", kinds=["kv_group", "neuron"], per="params"
)
plan = sosp_hub.allocate(graph, saliency, params=0.8)
print(plan)
perplexity(sosp_hub.apply(model, graph, plan))
pruned = sosp_hub.rebuild(model, graph, plan, batches)
perplexity(pruned)

# %% Save, load, generate, publish
sosp_hub.save_pretrained(pruned, "out/small-lm", tokenizer=tokenizer)
loaded = AutoModelForCausalLM.from_pretrained("out/small-lm")  # sosp_hub is imported: it loads
print(loaded.generate(held_out[:1, :8], max_new_tokens=8, do_sample=False))
print(sosp_hub.push_to_hub("out/small-lm", "me/small-lm", dry_run=True).added)  # without: sent
