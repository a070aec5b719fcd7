"""Seconds that a table of layers tells of a plan, beside those measured once it is cut.

    python -m tests.bench.latency [--plans 12] [--threads 1]

Random weights and random plans that keep 30 to 90 % of the parameters. Dense and cut model are
timed in turns, and shares of the dense model's time are compared, so that a machine that slows down
for a while changes little. Prints for each model the mean and largest difference in points, and the
rank correlation (Spearman) of told and measured shares.
"""

import argparse
import random
import statistics

import timm
import torch
from scipy.stats import spearmanr
from transformers import LlamaConfig, LlamaForCausalLM

import sosp_hub
from sosp_hub.evaluate import measure_latency
from sosp_hub.latency import Decoder, LatencyTable


def llama():
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens(batch, length):
    return torch.randint(0, 4096, (batch, length))


MODELS = {
    "ResNet-50, 8 images of 160": (
        lambda: timm.create_model("resnet50").eval(), lambda: (torch.randn(8, 3, 160, 160),),
    ),
    "MobileNetV2, 8 images of 160": (
        lambda: timm.create_model("mobilenetv2_100").eval(),
        lambda: (torch.randn(8, 3, 160, 160),),
    ),
    "ViT-S, 4 images": (
        lambda: timm.create_model("vit_small_patch16_224").eval(),
        lambda: (torch.randn(4, 3, 224, 224),),
    ),
    "Llama of 8 x 512, 4 x 256 tokens": (llama, lambda: {"input_ids": tokens(4, 256)}),
    "the same, a token after 1 x 256": (llama, lambda: {"input_ids": tokens(1, 256)}),
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--plans", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| model | dense | mean difference | largest | rank correlation |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, (build, make) in MODELS.items():
        random.seed(0)
        torch.manual_seed(0)
        model, inputs = build(), make()

        def runs(one, inputs=inputs, step="a token after" in name):
            if not step:
                return one, inputs
            return Decoder(one, inputs["input_ids"]), (inputs["input_ids"][:, :1],)

        with torch.no_grad():
            graph = sosp_hub.trace(model, inputs)
            table = LatencyTable(*runs(model)[:1], graph, runs(model)[1])
            told, seen = [], []
            for _ in range(args.plans):
                saliency = sosp_hub.score(
                    model, graph, [], "random", seed=random.randrange(1 << 30)
                )
                plan = sosp_hub.allocate(graph, saliency, params=random.uniform(0.3, 0.9))
                small = sosp_hub.apply(model, graph, plan, "fast")
                dense_s, small_s = measure_latency(
                    [runs(model)[0], runs(small)[0]], runs(model)[1], 2.0
                )
                told.append(100 * table(plan) / table.dense_s)
                seen.append(100 * small_s / dense_s)
        apart = [abs(one - other) for one, other in zip(told, seen, strict=True)]
        print(
            f"| {name} | {1000 * table.dense_s:.1f} ms | {statistics.mean(apart):.1f} points "
            f"| {max(apart):.1f} | {spearmanr(told, seen).statistic:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
