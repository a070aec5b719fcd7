"""What ``rebuild`` wins right after a cut: accuracy of ResNet-20, perplexity of SmolLM2.

    python -m tests.bench.rebuild resnet FOLDER [--kept 0.3 0.5] [--criteria surgeon fisher]
    python -m tests.bench.rebuild normed FOLDER [--macs 0.7 0.5 0.35]
    python -m tests.bench.rebuild text MODEL_FOLDER TEXT_FOLDER OTHER_TEXT_FOLDER [--params 0.8 0.7]
        [--beside TEXT_FOLDER]

``FOLDER`` holds Fashion-MNIST's IDX files (it trains ResNet-20 for two short epochs first;
``normed``: a ResNet-20 with layers normalised over all channels, and a small ConvNeXt V2), text
folders hold ``*.txt`` files; every fifth file of the first is held out, the second is another
domain. With ``--beside`` half of the calibration windows come from a third folder. Prints one line
a variant.
"""

import argparse
import copy
import gzip
import itertools
import time
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import sosp_hub
import sosp_hub.zoo.cifar_resnet
from sosp_hub.reconstruction.norms import recalibrate_norm
from sosp_hub.reconstruction.rebuild import rebuilt_weights

DAMPINGS = ("auto", 0.01, 0.1, 0.3)


def idx(path):
    raw = gzip.decompress(path.read_bytes())
    num_dims = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(num_dims)]
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * num_dims)
    return torch.from_numpy(data.reshape(shape).copy())


def images_of(folder, stem, num, seed=0):
    chosen = torch.randperm(10_000, generator=torch.Generator().manual_seed(seed))[:num]
    images = idx(folder / f"{stem}-images-idx3-ubyte.gz")[chosen].float().div(255)
    labels = idx(folder / f"{stem}-labels-idx1-ubyte.gz").long()[chosen]
    return F.pad((images - 0.286) / 0.353, (2, 2, 2, 2))[:, None], labels


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)


def train(model, images, labels, epochs, make=SGD, most=0.2):
    optimizer = make(model.parameters())
    steps = epochs * (len(images) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, most, total_steps=steps)
    for _ in range(epochs):
        for at in torch.randperm(len(images)).split(128)[: len(images) // 128]:
            loss = F.cross_entropy(model.train()(images[at]), labels[at])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model, images, labels):
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in images.split(250)])
    return 100 * (found == labels).float().mean().item()


def resnet(args):
    torch.manual_seed(args.seed)
    images, labels = images_of(args.folder, "train", 8000)
    model = timm.create_model("cifar_resnet20", num_classes=10, in_chans=1)
    model = train(model, images, labels, 2)
    test = images_of(args.folder, "t10k", 2000)
    print(f"dense {accuracy(model, *test):.1f}", flush=True)
    num = args.num_images
    calibration = list(zip(images[:num].split(64), labels[:num].split(64), strict=True))
    graph = sosp_hub.trace(model, (images[:2],))
    inner = {n: g for n, g in graph.groups.items() if ".conv1:" in n and n.startswith("layer")}
    for name in args.criteria:
        options = {"selection": "surgeon"} if name == "surgeon" else {}
        start = time.process_time()
        saliency = sosp_hub.score(
            model, graph, calibration[:8], "sosp_i" if name == "surgeon" else name, **options
        )
        scoring = time.process_time() - start
        for kept in args.kept:
            saliency = {group: saliency[group] for group in inner}
            plan = sosp_hub.allocate(graph, saliency, structures=kept)
            print(f"{name} {kept} scored in {scoring:.1f} s", flush=True)
            report("cut", sosp_hub.apply(model, graph, plan, "fast"), calibration, test)
            for damping, steps in itertools.product(args.dampings, args.refine_steps):
                start = time.process_time()
                found = rebuilt_weights(
                    model, graph, plan, calibration, damping=damping, refine_steps=steps
                )
                seconds = time.process_time() - start
                small = sosp_hub.apply(found.model, graph, found.plan, "fast")
                what = f"damping {damping}, {steps} steps, {seconds:.1f} s"
                report(what, small, calibration, test)


def report(what, small, calibration, test):
    plain = accuracy(small, *test)
    again = copy.deepcopy(small)
    assert any(isinstance(module, _BatchNorm) for module in again.modules())
    recalibrate_norm(again, calibration)
    print(f"  {what}: {plain:.1f}, norms re-estimated {accuracy(again, *test):.1f}", flush=True)


def windows(tokenizer, texts, num, length, seed):
    generator, found = torch.Generator().manual_seed(seed), []
    ids = [tokenizer(text)["input_ids"] for text in texts]
    ids = [one for one in ids if len(one) > length]
    while len(found) < num:
        one = ids[int(torch.randint(len(ids), (1,), generator=generator))]
        start = int(torch.randint(len(one) - length, (1,), generator=generator))
        found.append(one[start : start + length])
    return torch.tensor(found)


def group_normed(model):
    """The model with a norm over all channels in the place of each BatchNorm."""
    for name, module in list(model.named_modules()):
        if isinstance(module, _BatchNorm):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, nn.GroupNorm(1, module.num_features))
    return model


NORMED = {
    "ResNet-20, GroupNorm": lambda: group_normed(
        timm.create_model("cifar_resnet20", num_classes=10, in_chans=1)
    ),
    "ConvNeXt V2": lambda: timm.create_model(
        "convnextv2_atto", num_classes=10, in_chans=1, patch_size=2, depths=(2, 2, 4, 2),
        dims=(32, 64, 128, 256),
    ),
}  # fmt: skip


def normed(args):
    for name, make in NORMED.items():
        torch.manual_seed(args.seed)
        images, labels = images_of(args.folder, "train", 8000, args.seed)
        model = train(make(), images, labels, 2, partial(torch.optim.AdamW, lr=2e-3), 2e-3)
        test = images_of(args.folder, "t10k", 2000)
        print(f"{name}, seed {args.seed}: dense {accuracy(model, *test):.1f}", flush=True)
        calibration = list(zip(images[:512].split(64), labels[:512].split(64), strict=True))
        graph = sosp_hub.trace(model, (images[:2],))
        saliency = sosp_hub.score(model, graph, calibration, "fisher", per="macs")
        for macs in args.macs:
            plan = sosp_hub.allocate(graph, saliency, macs=macs)
            cut = accuracy(sosp_hub.apply(model, graph, plan), *test)
            start = time.process_time()
            small = sosp_hub.rebuild(model, graph, plan, calibration)
            seconds = time.process_time() - start
            told = f"cut {cut:.1f}, rebuilt {accuracy(small, *test):.1f} ({seconds:.0f} s)"
            print(f"  macs {macs}: {told}", flush=True)


def perplexity(model, tokens):
    losses = []
    with torch.no_grad():
        for part in tokens.split(4):
            logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
            losses.append(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()))
    return torch.stack(losses).mean().exp().item()


def text(args):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.model_max_length = 10**9
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
    files = [path.read_text("utf8", "ignore") for path in sorted(args.texts.glob("*.txt"))]
    others = [path.read_text("utf8", "ignore") for path in sorted(args.others.glob("*.txt"))]
    length = args.length
    num_beside = args.num // 2 if args.beside else 0
    own = [f for i, f in enumerate(files) if i % 5]
    seen = windows(tokenizer, own, args.num - num_beside, length, 0)
    if args.beside:
        beside = [path.read_text("utf8", "ignore") for path in sorted(args.beside.glob("*.txt"))]
        both = torch.cat([seen, windows(tokenizer, beside, num_beside, length, 3)])
        seen = both[torch.randperm(args.num, generator=torch.Generator().manual_seed(0))]
    test = {
        "in": windows(tokenizer, files[::5], args.num_test, 128, 1),
        "out": windows(tokenizer, others, args.num_test, 128, 2),
    }
    dense = {name: perplexity(model, tokens) for name, tokens in test.items()}
    print("dense", {name: round(value, 2) for name, value in dense.items()}, flush=True)
    graph = sosp_hub.trace(model, {"input_ids": seen[:2]})
    batches = [{"input_ids": part, "labels": part} for part in seen.split(4)]
    start = time.process_time()
    saliency = sosp_hub.score(
        model, graph, batches[: args.num_scored // 4], "fisher", kinds=args.kinds,
        per_token=args.per_token,
    )  # fmt: skip
    print(f"scored in {time.process_time() - start:.0f} s", flush=True)
    for params in args.params:
        plan = sosp_hub.allocate(graph, saliency, params=params, kinds=args.kinds)
        show(f"cut {params}", sosp_hub.apply(model, graph, plan, "fast"), test, dense)
        for damping, steps in itertools.product(args.dampings, args.refine_steps):
            start = time.process_time()
            found = rebuilt_weights(
                model, graph, plan, batches, damping=damping, refine_steps=steps
            )
            seconds = time.process_time() - start
            small = sosp_hub.apply(found.model, graph, found.plan, "fast")
            show(f"{params} damping {damping}, {steps} steps, {seconds:.0f} s", small, test, dense)


def show(what, small, test, dense):
    found = {name: perplexity(small, tokens) for name, tokens in test.items()}
    told = [f"{name} {value:.1f} = {value / dense[name]:.3f} x" for name, value in found.items()]
    print(f"  {what}: {', '.join(told)}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("resnet")
    one.add_argument("folder", type=Path)
    one.add_argument("--kept", type=float, nargs="+", default=[0.5, 0.3])
    one.add_argument("--criteria", nargs="+", default=["surgeon", "fisher", "magnitude"])
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--num-images", type=int, default=512, help="to rebuild with (512)")
    one.set_defaults(run=resnet)
    three = verbs.add_parser("normed")
    three.add_argument("folder", type=Path)
    three.add_argument("--macs", type=float, nargs="+", default=[0.7, 0.5, 0.35])
    three.add_argument("--seed", type=int, default=0)
    three.set_defaults(run=normed)
    two = verbs.add_parser("text")
    for name in ("model", "texts", "others"):
        two.add_argument(name, type=Path)
    two.add_argument("--params", type=float, nargs="+", default=[0.8, 0.7])
    two.add_argument("--num", type=int, default=128)
    two.add_argument("--num-scored", type=int, default=32)
    two.add_argument("--num-test", type=int, default=16)
    two.add_argument("--length", type=int, default=128)
    two.add_argument("--beside", type=Path)
    two.add_argument("--per-token", action="store_true")
    two.add_argument("--kinds", nargs="+", default=["kv_group", "neuron"])
    two.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    two.set_defaults(run=text)
    for verb in (one, two):
        verb.add_argument(
            "--dampings", nargs="+", default=DAMPINGS,
            type=lambda given: given if given == "auto" else float(given),
        )  # fmt: skip
        verb.add_argument("--refine-steps", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.run(args)


if __name__ == "__main__":
    main()
