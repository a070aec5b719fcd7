"""Random small runs: does any end worse than its cut?

    python -m tests.bench.recovery [--runs 50] [--first 0]

Each run trains a small network (an MLP or a small convolutional one on scikit-learn's digits, or a
tiny Llama on Markov text), cuts it by a random criterion to a random budget, rebuilds it or not,
and fine-tunes it with random settings: a learning rate between 1e-5 and 1, the optimizer, batch,
schedule, distillation, hidden states, adapters, a probe. Prints a line a run: the loss of dense
model, cut and final one on the held-out part of train that selects, and on test data, which nothing
selects on; then how many ended worse.
"""

import argparse
import random
import time
from functools import partial

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sosp_hub
from sosp_hub.data.split import Split
from sosp_hub.data.texts import WindowSplit
from sosp_hub.evaluate import evaluate
from sosp_hub.recipe.schema import FinetuneSection
from sosp_hub.reconstruction.rebuild import rebuilt_weights
from sosp_hub.recovery.recover import recover


class Digits(Split):
    def __init__(self, chosen, flat):
        data = load_digits()
        images = torch.tensor(data.images[chosen], dtype=torch.float32) / 16
        self.images = images.flatten(1) if flat else images[:, None]
        self.labels = torch.tensor(data.target[chosen])
        self.num_labels, self.class_names = 10, tuple("0123456789")

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, indices):
        return self.images[list(indices)], self.labels[list(indices)]


def markov(num, seed, length=24):
    """Texts of 32 letters, each of which likes four to follow it."""
    table = np.random.default_rng(0).dirichlet(np.full(32, 0.1), 32)
    rng = np.random.default_rng(seed)
    rows = np.zeros((num, length), dtype=np.int64)
    rows[:, 0] = rng.integers(32, size=num)
    for at in range(1, length):
        draws = rng.random(num)[:, None] > table[rows[:, at - 1]].cumsum(1)
        rows[:, at] = np.minimum(draws.sum(1), 31)
    return WindowSplit(torch.from_numpy(rows))


def mlp():
    return nn.Sequential(
        nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10)
    )


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        )
    )  # fmt: skip


def one(seed):
    chance = random.Random(seed)
    torch.manual_seed(seed)
    kind = chance.choice(["mlp", "conv", "llama"])
    number = chance.choice([64, 200, 600])
    if kind == "llama":
        model, train, test = llama(), markov(number, seed), markov(300, seed + 1000)
        inputs = {"input_ids": torch.zeros(2, 24, dtype=torch.long), "use_cache": False}
    else:
        order = np.random.default_rng(seed).permutation(1797)
        model = mlp() if kind == "mlp" else convolutional()
        train, test = (Digits(part, kind == "mlp") for part in (order[:number], order[-500:]))
        inputs = (train.images[:2],)
    dense_training = FinetuneSection(epochs=chance.choice([2, 8]), held_out=0.0, batch_size=32)
    recover(model, train, dense_training, seed=seed)
    graph = sosp_hub.trace(model, inputs)
    most = min(128, number)
    batches = [train.__getitems__(range(i, min(i + 32, most))) for i in range(0, most, 32)]
    criterion = chance.choice(["random", "magnitude", "taylor", "fisher"])
    saliency = sosp_hub.score(model, graph, batches, criterion=criterion)
    kept = chance.uniform(0.3, 0.95)
    plan = sosp_hub.allocate(graph, saliency, params=kept)
    rebuild = chance.random() < 0.5
    if rebuild:
        made = rebuilt_weights(model, graph, plan, batches)
        pruned = sosp_hub.apply(made.model, graph, made.plan, verify="fast")
    else:
        pruned = sosp_hub.apply(model, graph, plan, verify="fast")
    keys = {
        "epochs": chance.choice([1, 3]),
        "learning_rate": 10 ** chance.uniform(-5, 0),
        "optimizer": chance.choice(["adamw", "sgd"]),
        "batch_size": chance.choice([8, 32]),
        "schedule": chance.choice(["cosine", "constant"]),
        "max_grad_norm": chance.choice([None, 1.0]),
        "distill": chance.choice([0.0, 0.5, 1.0]),
        "held_out": chance.choice([0.1, 0.3]),
        "probe_steps": chance.choice([None, None, 3]),
    }
    if kind == "llama" and chance.random() < 0.3:
        keys["hidden"] = 1.0
    if chance.random() < 0.2:
        keys["lora"] = {"rank": 4}
    measure = partial(losses_of, test=test)
    before = measure(pruned)
    try:
        found = recover(pruned, train, FinetuneSection(**keys), teacher=model, seed=seed)
        first, last = found.selected.losses[0][1], found.selected.loss
    except sosp_hub.errors.ModelError as error:
        return kind, criterion, kept, keys["learning_rate"], None, str(error)[:40]
    return (
        kind, criterion, kept, keys["learning_rate"], (measure(model), before, measure(pruned)),
        (first, last),
    )  # fmt: skip


def losses_of(model, test):
    batches = [test.__getitems__(range(i, min(i + 64, len(test)))) for i in range(0, len(test), 64)]
    return evaluate(model, batches, ["loss"])["loss"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    start, worse, worse_on_test, refused = time.process_time(), 0, 0, 0
    print("| run | model | criterion | params | rate | held out: cut, final | test |")
    print("|---|---|---|---|---|---|---|")
    for seed in range(given.first, given.first + given.runs):
        kind, criterion, kept, rate, tested, held_out = one(seed)
        if tested is None:
            refused += 1
            print(f"| {seed} | {kind} | {criterion} | {kept:.2f} | {rate:.1e} | {held_out} | |")
            continue
        first, last = held_out
        worse += last > first
        _, cut, final = tested
        worse_on_test += final.value - cut.value > cut.stderr
        shown = ", ".join(f"{metric.value:.3f}" for metric in tested)
        print(
            f"| {seed} | {kind} | {criterion} | {kept:.2f} | {rate:.1e} | {first:.3f}, {last:.3f} "
            f"| {shown} |",
            flush=True,
        )
    print(
        f"{worse} of {given.runs} end worse than their cut on held-out data, {worse_on_test} by "
        f"more than a standard error on test data, {refused} stop with a loss that is not finite; "
        f"{time.process_time() - start:.0f} s of CPU"
    )


if __name__ == "__main__":
    main()
