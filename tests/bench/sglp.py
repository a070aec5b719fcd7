"""SGLP: CPU time of segmentation and of scoring, on deep nets with random weights.

    python -m tests.bench.sglp                           # ResNet-56 and a decoder of 30 layers
    python -m tests.bench.sglp --models cifar_resnet110

The gradient norms of fresh nets take most of the time: 128 samples for each layer that may go, and
for each subset of a segment with few.

Measured at commit bac2de0, Intel Xeon 2.10 GHz, one thread, CPU time: ResNet-56 (27 blocks, 21
subsets) 16 s for similarity and segments, 81 s in all; the decoder of 30 layers 8 s and 24 s.
"""

import argparse
import logging
import math
import time

import timm
import torch
import transformers

import sosp_hub
import sosp_hub.zoo.timm
from sosp_hub.criteria.compute.context import Context
from sosp_hub.criteria.sglp import Sglp
from sosp_hub.scoring import scorable_groups
from tests.bench.saliency import SMOLLM2_135M


def subject(name: str) -> tuple[torch.nn.Module, object, list[object]]:
    """A model, its example inputs and calibration batches: 2,500 images, or 16 texts."""
    torch.manual_seed(0)
    if name == "smollm2_135m":
        config = transformers.LlamaConfig(**SMOLLM2_135M, use_cache=False)
        tokens = torch.randint(config.vocab_size, (16, 128))
        batches = [{"input_ids": part, "labels": part} for part in tokens.split(4)]
        model = transformers.LlamaForCausalLM(config).eval()
        return model, {"input_ids": tokens[:, :16]}, list(batches)
    images, labels = torch.randn(2500, 3, 32, 32), torch.arange(2500) % 10
    batches = list(zip(images.split(500), labels.split(500), strict=True))
    return timm.create_model(name).eval(), (images[:2],), list(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["cifar_resnet56", "smollm2_135m"])
    given = parser.parse_args()
    logging.getLogger("sosp_hub").setLevel(logging.WARNING)
    for name in given.models:
        model, inputs, batches = subject(name)
        graph = sosp_hub.trace(model, inputs)
        groups = scorable_groups(graph, Sglp)
        seconds = {}
        for what, criterion in (
            ("similarity", Sglp(norm_samples=1, keep=1.0)),
            ("all", Sglp()),
        ):
            start = time.process_time()
            found = criterion.partition(Context(model, groups, batches))
            seconds[what] = time.process_time() - start
        lengths = [
            end - start
            for start, end in zip(
                found.borders, (*found.borders[1:], len(found.blocks)), strict=True
            )
        ]
        print(
            f"{name:<16} {len(found.blocks)} blocks in segments of {lengths}: "
            f"{seconds['similarity']:.0f} s for similarity and segments, {seconds['all']:.0f} s "
            f"in all; {len(found.norms)} layers and {sum(found.num_subsets)} subsets tried "
            f"(all would be {_all(found, lengths)})",
            flush=True,
        )


class _Only:
    def __init__(self, groups):
        self.groups = groups


def _all(found, lengths):
    return sum(math.comb(n, n // 2) for n in lengths)


if __name__ == "__main__":
    main()
