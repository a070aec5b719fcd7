"""A language model pruned non-uniformly and rebuilt, as a folder for the other commands here.

    python -m tests.bench.serving.prepare MODEL_FOLDER TEXT_FOLDER OUT [--params 0.8] [--plain]

``TEXT_FOLDER`` holds ``*.txt`` files; every fifth one stays unseen. Scored by ``fisher`` on 32
windows of 128 tokens, rebuilt on 128, cut for rows that GGUF's types of 32 values pack. ``--plain``
scores by magnitude and rebuilds nothing, which takes a minute.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sosp_hub
from sosp_hub.recipe.targets import make_target
from sosp_hub.reconstruction.rebuild import rebuilt_weights
from tests.bench.rebuild import windows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "texts", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--params", type=float, default=0.8)
    parser.add_argument("--num", type=int, default=128)
    parser.add_argument("--plain", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.model_max_length = 10**9
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    files = [path.read_text("utf8", "ignore") for path in sorted(args.texts.glob("*.txt"))]
    seen = windows(tokenizer, [f for i, f in enumerate(files) if i % 5], args.num, 128, 0)
    batches = [{"input_ids": part, "labels": part} for part in seen.split(4)]
    graph = sosp_hub.trace(model, {"input_ids": seen[:2]})
    criterion, scored = ("magnitude", []) if args.plain else ("fisher", batches[:8])
    saliency = sosp_hub.score(model, graph, scored, criterion, kinds=["kv_group", "neuron"])
    target = make_target("gguf", ValueError, quantization="q8_0")
    plan = sosp_hub.allocate(graph, saliency, params=args.params, target=target)
    if not args.plain:
        found = rebuilt_weights(model, graph, plan, batches)
        model, plan = found.model, found.plan
    small = sosp_hub.apply(model, graph, plan, "fast")
    print(sosp_hub.save_pretrained(small, args.out, tokenizer=tokenizer))


if __name__ == "__main__":
    main()
