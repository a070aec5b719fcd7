"""An embedding model without labels: `python examples/embedding_model.py MODEL TEXT_FILE`.

The dense model's own embeddings say what is right: second order ranks the neurons and heads, and
the rebuild brings the embeddings back. MODEL is a hub id or a folder, such as
`sentence-transformers/all-MiniLM-L6-v2`. Without arguments a tiny model with random weights and
a file of the package stand in.
"""

# %% Model, sentences. In a notebook the two names are set here
import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import sosp_hub

MODEL, TEXT_FILE = "", ""
if "__file__" in globals() and len(sys.argv) == 3:
    MODEL, TEXT_FILE = sys.argv[1:]
torch.manual_seed(0)
if MODEL:
    model = AutoModel.from_pretrained(MODEL).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    lines = [line for line in Path(TEXT_FILE).read_text().splitlines() if len(line) > 20]
    tokens = tokenizer(
        lines[:320], padding=True, truncation=True, max_length=64, return_tensors="pt"
    )
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
else:
    config = BertConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    model = BertModel(config).eval()
    ids = torch.tensor(list(Path(sosp_hub.__file__).read_bytes()))[: 40 * 32].view(-1, 32)
    mask = torch.ones_like(ids)
split = len(ids) * 4 // 5
batches = [
    {"input_ids": i, "attention_mask": m}
    for i, m in zip(ids[:split].split(16), mask[:split].split(16), strict=True)
]


def embed(model: torch.nn.Module) -> torch.Tensor:
    """Mean over tokens, of sentences that calibrated nothing."""
    weights = mask[split:, :, None].float()
    with torch.no_grad():
        states = model(input_ids=ids[split:], attention_mask=mask[split:]).last_hidden_state
    return (states * weights).sum(1) / weights.sum(1)


dense = embed(model)

# %% Score with the model's own outputs, cut, rebuild
graph = sosp_hub.trace(
    model, {"input_ids": ids[:2], "attention_mask": mask[:2]}, outputs="last_hidden_state"
)
own = sosp_hub.tasks.OwnOutputs(output="last_hidden_state")
saliency = sosp_hub.score(model, graph, batches, criterion="sosp_h", loss_fn=own)
plan = sosp_hub.allocate(graph, saliency, macs=0.7)
print(plan)
for made in (sosp_hub.apply(model, graph, plan), sosp_hub.rebuild(model, graph, plan, batches)):
    print(
        f"mean cosine to the dense embeddings {F.cosine_similarity(embed(made), dense).mean():.4f}"
    )

# %% Save, load, publish
sosp_hub.save_pretrained(made, "out/small-embeddings")
again = AutoModel.from_pretrained("out/small-embeddings").eval()
torch.testing.assert_close(embed(again), embed(made))
print(sosp_hub.push_to_hub("out/small-embeddings", "me/small-embeddings", dry_run=True).added)
