"""Torch-Pruning's own pruner on the dense models of a study, measured as the study measures.

    python -m tests.bench.peers.torch_pruning recipes/studies/resnet20_rebuilt.yaml [KEY=VALUE ...]

``pip install torch-pruning``. Its `BasePruner` cuts the channels of all layers by one global order
in one step, as its documentation has it; the ratio is the least that meets the budget of MACs,
counted on the cut model as the study counts them. Dense models are those of the study, from its
work folder where it is there. Accuracy in percent: right after the cut, with norms re-estimated on
the calibration samples of the study, and after its fine-tuning; mean and standard deviation over
the seeds.
"""

import argparse
import copy
import logging
import statistics
from pathlib import Path

import torch
import torch_pruning

import sosp_hub
from sosp_hub.cost import cost
from sosp_hub.pipeline.context import open_context
from sosp_hub.pipeline.measuring import measured
from sosp_hub.pipeline.stage_cache import StageCache
from sosp_hub.pipeline.training import measure_dense, train_dense
from sosp_hub.recipe.load import load_recipe
from sosp_hub.recipe.study_grid import cells_of
from sosp_hub.reconstruction.norms import recalibrate_norm
from sosp_hub.recovery.recover import recover

WAYS = {
    "random": (torch_pruning.importance.RandomImportance, {}),
    "magnitude (GroupMagnitude, L2)": (torch_pruning.importance.GroupMagnitudeImportance, {}),
    "the same, isomorphic": (
        torch_pruning.importance.GroupMagnitudeImportance, {"isomorphic": True},
    ),
    "Taylor (GroupTaylor)": (torch_pruning.importance.GroupTaylorImportance, {}),
    "the same, isomorphic (Taylor)": (
        torch_pruning.importance.GroupTaylorImportance, {"isomorphic": True},
    ),
}  # fmt: skip
_STEPS = 10  # of the bisection: ratios that differ by a thousandth


def macs_of(model, inputs):
    return cost(sosp_hub.trace(model, inputs)).macs


def cut(dense, inputs, batches, way, most):
    """The model with the least ratio whose MACs are within ``most``."""
    importance, options = WAYS[way]
    low, high, best = 0.0, 1.0, None
    for _ in range(_STEPS):
        ratio, model = (low + high) / 2, copy.deepcopy(dense).eval()
        if "Taylor" in way:
            for images, labels in batches:
                torch.nn.functional.cross_entropy(model(images), labels).backward()
        torch_pruning.pruner.BasePruner(
            model, inputs[0], importance=importance(), global_pruning=True, pruning_ratio=ratio,
            ignored_layers=[model.get_classifier()], **options,
        ).step()  # fmt: skip
        if macs_of(model, inputs) <= most:
            best, high = model, ratio
        else:
            low = ratio
    best.zero_grad(set_to_none=True)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("override", nargs="*")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    recipe = load_recipe(args.recipe, args.override, "compare")
    folder = Path(str(recipe.output.dir)).expanduser()
    folder = folder.with_name(f"{folder.name}.partial")
    cells, _ = cells_of(recipe)
    found = {}
    for cell in {cell.seed: cell for cell in cells}.values():
        base = open_context(cell.recipe, StageCache(folder, cell.recipe, shared=True))
        train_dense(base)
        dense = measure_dense(base)["accuracy"]["value"]
        print(f"seed {cell.seed}: dense {100 * dense:.1f} %", flush=True)
        model, inputs = base.model.cpu(), (base.train[0][0],)
        batches = base.calibration_batches()
        for budget in dict.fromkeys(cell.recipe.budget.macs for cell in cells):
            for way in WAYS:
                torch.manual_seed(cell.seed)
                small = cut(model, inputs, batches, way, budget * macs_of(model, inputs))
                kept = macs_of(small, inputs) / macs_of(model, inputs)
                row = [kept, measured(base, small, "cut")["accuracy"]["value"]]
                recalibrate_norm(small, batches)
                row.append(measured(base, small, "norms")["accuracy"]["value"])
                config = cell.recipe.at_rate(cell.recipe.finetune)
                recover(small, base.train, config, accelerator=base.accelerator, seed=cell.seed)
                row.append(measured(base, small, "final")["accuracy"]["value"])
                found.setdefault((budget, way), []).append(row)
                print(budget, way, [f"{100 * value:.1f}" for value in row], flush=True)
    for (budget, way), rows in found.items():
        told = []
        for values in zip(*rows, strict=True):
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            told.append(f"{100 * statistics.mean(values):.1f} ± {100 * spread:.1f}")
        print(f"| {budget:.0%} of the MACs | {way} | {' | '.join(told)} |")


if __name__ == "__main__":
    main()
