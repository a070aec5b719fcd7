"""Which part of a teacher helps a cut model: its outputs, its hidden states, their cosines.

    python -m tests.bench.following FOLDER [--seeds 0 1] [--epochs 1]

``FOLDER`` is what a recipe made with ``finetune.epochs=0``: a cut model, its dense one in
``dense/``, and ``recipe.private.yaml``, whose data is opened again. Each way trains as long, at the
rate that a probe on held-out training samples finds; test data is measured at the end. Prints a
table: loss and metric of the test split, mean over seeds, and each seed's metric.
"""

import argparse
from pathlib import Path

import torch

import sosp_hub
from sosp_hub.data.loading import load_split
from sosp_hub.data.source import open_data
from sosp_hub.evaluate import evaluate
from sosp_hub.recipe.load import load_recipe
from sosp_hub.recipe.schema import FinetuneSection
from sosp_hub.recovery.recover import recover
from sosp_hub.zoo.load import load_model

WAYS = {
    "task's loss": {},
    "outputs, 0.5": {"distill": 0.5},
    "outputs, 1": {"distill": 1.0},
    "hidden, 1": {"hidden": 1.0},
    "relations, 10": {"relations": 10.0},
    "outputs, 0.5; hidden, 1": {"distill": 0.5, "hidden": 1.0},
    "outputs, 0.5; relations, 10": {"distill": 0.5, "relations": 10.0},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe(args.folder / "recipe.private.yaml")
    data = open_data(recipe.data, recipe.model.task)
    loaded = load_model(recipe.model, data=data.info)
    train, test = (load_split(data, name, loaded.processor) for name in ("train", "test"))
    batches = [
        test.__getitems__(range(start, min(start + 64, len(test))))
        for start in range(0, len(test), 64)
    ]
    metric = (recipe.evaluate.metrics or ("accuracy",))[0]
    dense = sosp_hub.from_pretrained(args.folder / "dense")

    def measured(model):
        found = evaluate(model, batches, ("loss", metric))
        return found["loss"].value, found[metric].value

    cut = measured(sosp_hub.from_pretrained(args.folder))
    print(f"| | test loss | {metric} | of each seed | rates |\n| --- | ---: | ---: | --- | --- |")
    for name, (loss, value) in {"dense": measured(dense), "not trained": cut}.items():
        print(f"| {name} | {loss:.3f} | {value:.4f} | | |", flush=True)
    for name, way in WAYS.items():
        found, rates = [], []
        for seed in args.seeds:
            model = sosp_hub.from_pretrained(args.folder)
            config = FinetuneSection(
                epochs=args.epochs, batch_size=32, learning_rate=5e-5, probe_steps=15, **way
            )
            done = recover(model, train, config, teacher=dense, seed=seed)
            rates.append(f"{min(done.rates, key=lambda each: each[1])[0]:.1e}")
            found.append(measured(model))
        loss, value = torch.tensor(found).mean(0).tolist()
        each = ", ".join(f"{value:.4f}" for _, value in found)
        print(f"| {name} | {loss:.3f} | {value:.4f} | {each} | {', '.join(rates)} |", flush=True)


if __name__ == "__main__":
    main()
