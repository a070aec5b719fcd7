"""Random budgets for each target: how many plans its reader would refuse.

    python -m tests.bench.serving.budgets [--num 1000] [--only gguf]

So many random saliencies and budgets for each setting of a target, shared among Llamas of three
layers with several shapes of attention; what a reader takes is written down in
``tests/targets/test_targets.py``. Targets that take any sizes are not listed: ``onnx``,
``openvino``, ``torch_export``, ``executorch``, and ``padded``, which fills up. Nothing is cut.
Results: tests/bench/results/serving.md.
"""

import argparse

from tests.targets.test_targets import CASES, SHAPES, TAKES, num_refused, traced_llama


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--only", metavar="TARGET")
    args = parser.parse_args()
    graphs = {name: traced_llama(**sizes)[1] for name, sizes in SHAPES.items()}
    for name, options, takes in TAKES:
        if args.only not in (None, name):
            continue
        shapes = [case[3] for case in CASES if case[:2] == (name, options)]
        found = [
            num_refused(
                graphs[shape], name, options, takes, SHAPES[shape], -(-args.num // len(shapes))
            )
            for shape in shapes
        ]
        plans, refused = map(sum, zip(*found, strict=True))
        print(f"{name} {options or ''}: {plans} plans, {refused} refused", flush=True)


if __name__ == "__main__":
    main()
