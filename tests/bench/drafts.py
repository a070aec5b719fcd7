"""How small a pruned model should be to draft for its parent: an experiment.

    python -m tests.bench.drafts MODEL_FOLDER TEXT_FOLDER [--params 0.8 0.6 0.4] [--rebuild 64]

Neurons go by `fisher` per token, once scored; each size is rebuilt and then drafts for the dense
model, greedy, four prompts of 64 tokens each. The draft is worth it where tokens a second are more
than the parent's alone; the best size is told last. ``TEXT_FOLDER`` holds ``*.txt`` files.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sosp_hub
from sosp_hub.drafting import PROMPTS, measure_drafting
from tests.bench.rebuild import windows


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--params", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--rebuild", type=int, default=64, help="windows of 128 tokens (64)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.model_max_length = 10**9
    parent = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    texts = [path.read_text("utf8", "ignore") for path in sorted(args.texts.glob("*.txt"))]
    seen = windows(tokenizer, texts, args.rebuild, 128, 0)
    batches = [{"input_ids": part, "labels": part} for part in seen.split(4)]
    graph = sosp_hub.trace(parent, {"input_ids": seen[:2]})
    saliency = sosp_hub.score(
        parent, graph, batches[:8], "fisher", kinds=["neuron"], per_token=True
    )
    prompts = [tokenizer(text, return_tensors="pt")["input_ids"] for text in PROMPTS]
    best = (1.0, "none: the parent alone is fastest")
    for params in args.params:
        plan = sosp_hub.allocate(graph, saliency, params=params)
        draft = sosp_hub.rebuild(parent, graph, plan, batches)
        found = measure_drafting(parent, draft, prompts)
        print(f"{params:.0%} of the parameters, {found}", flush=True)
        gain = found.drafted_tokens_per_s / found.alone_tokens_per_s
        best = max(best, (gain, f"{params:.0%} of the parameters"))
    print(f"best: {best[1]} ({best[0]:.2f} x)")


if __name__ == "__main__":
    main()
