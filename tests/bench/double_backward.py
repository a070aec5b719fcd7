"""What each part of `sosp_hub.double_backward` buys in exact SOSP-H, against one plain pass.

    python tests/bench/double_backward.py vit_tiny_patch16_224 --rounds 4

Operations are left to PyTorch part by part, whole batches and halves of one; figures stand in
``results/saliency.md``.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F

import sosp_hub
from sosp_hub import double_backward
from sosp_hub.scoring import score
from tests.bench.saliency import MODELS, subject, table, weight_gradient

ATTENTION = {F.scaled_dot_product_attention}
PARTS = {
    "none": set(),
    "maps": set(double_backward._REWRITES) - ATTENTION,
    "maps, attention": set(double_backward._REWRITES),
}


@contextlib.contextmanager
def only(kept: set[object]) -> Iterator[None]:
    """Other operations take PyTorch's own second derivative."""
    rewrites = {f: rewrite for f, rewrite in double_backward._REWRITES.items() if f in kept}
    with mock.patch.object(double_backward, "_REWRITES", rewrites):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.models:
        num_samples, size, _ = MODELS[name]
        model, example_inputs, batch = subject(name, num_samples, size)
        graph = sosp_hub.trace(model, example_inputs)

        def run(kept: set[object], most: int | None) -> Callable[[], None]:
            options = {} if most is None else {"micro_batch_size": most}

            def exact() -> None:
                with only(kept):
                    score(model, graph, [batch], "sosp_h", mode="exact", **options)  # noqa: B023

            return exact

        runs: dict[str, Callable[[], object]] = {
            "weight gradient": lambda: weight_gradient(model, batch)  # noqa: B023
        }
        for most in (None, num_samples // 2) if num_samples > 1 else (None,):
            of = "" if most is None else f", {most} at a time"
            runs |= {f"{part}{of}": run(kept, most) for part, kept in PARTS.items()}
        print(f"\n{name}, {num_samples} samples of size {size}")
        table(runs, arguments.rounds, {})


if __name__ == "__main__":
    main()
