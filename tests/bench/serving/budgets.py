"""Random budgets for each target: how many plans its reader would refuse.

python -m tests.bench.serving.budgets [--num 1000]

Each of five settings gets so many random saliencies and budgets on a Llama of three layers with
four KV groups and 1,280 neurons each; what a reader takes is written down in
``tests/targets/test_targets.py``.
"""

import argparse

import torch

import sosp_hub
from sosp_hub.recipe.targets import TARGETS
from tests.targets.test_targets import TAKES, llama, random_plans


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=1000)
    args = parser.parse_args()
    tokens = {"input_ids": torch.arange(3, 13).reshape(2, 5), "use_cache": False}
    graph = sosp_hub.trace(llama(), tokens)
    for name, options, takes in TAKES:
        plans = list(random_plans(graph, TARGETS.known()[name](**options), args.num))
        refused = sum(not all(takes(*sizes) for sizes in plan) for plan in plans)
        print(f"{name} {options or ''}: {len(plans)} plans, {refused} refused", flush=True)


if __name__ == "__main__":
    main()
