"""Reports as a run writes them, small enough to read."""

import json

import numpy as np
from safetensors.numpy import save_file

RECIPE = """\
model: {library: timm, id: cifar_resnet20, task: image-classification, pretrained: false}
data: {id: sklearn/digits}
criterion: {name: sosp_h}
budget: {macs: 0.5}
"""


def metric(value, n=360, stderr=None):
    return {
        "value": value,
        "n": n,
        "stderr": (value * (1 - value) / n) ** 0.5 if stderr is None else stderr,
    }


def image_report():
    """A conv net cut to half of its MACs."""
    rng = np.random.default_rng(0)
    sizes = {f"layer{s}.{b}.conv1:channel": 8 * 2**s for s in (1, 2, 3) for b in (0, 1, 2)}
    saliency = {
        name: rng.lognormal(-6 + i / 4, 1.2, size).astype("float32")
        for i, (name, size) in enumerate(sizes.items())
    }
    kept = {
        name: sorted(np.argsort(-score)[: max(2, len(score) * (i + 2) // 13)].tolist())
        for i, (name, score) in enumerate(saliency.items())
    }
    classes = {f"accuracy/{d}": metric(0.90 + d / 100, n=36) for d in range(10)}
    worse = {
        f"accuracy/{d}": metric(0.90 + d / 100 - (0.06 if d in (3, 8) else 0.0), n=36)
        for d in range(10)
    }
    report = {
        "plan": {
            "schema_version": 1,
            "base_model": None,
            "base_revision": None,
            "sizes": sizes,
            "kept": kept,
            "provenance": {"floors": ["layer1.0.conv1:channel"]},
        },
        "saliency": {},
        "metrics": {
            "dense": {
                "accuracy": metric(0.983),
                "loss": metric(0.061, stderr=0.008),
                **classes,
            },
            "cut": {"accuracy": metric(0.411), "loss": metric(1.92, stderr=0.05)},
            "recalibrated": {"accuracy": metric(0.925), "loss": metric(0.31, stderr=0.02)},
            "final": {
                "accuracy": metric(0.978),
                "loss": metric(0.075, stderr=0.01),
                **worse,
            },
        },
        "cost": {
            "before": {"macs": 40_813_184, "params": 272_474, "bytes": 1_098_000},
            "after": {"macs": 20_310_112, "params": 146_310, "bytes": 592_340},
        },
        "latency": {
            "before": {
                "seconds": 0.0171,
                "batch": 8,
                "dtype": "float32",
                "threads": 2,
                "hardware": "Example CPU",
            },
            "after": {
                "seconds": 0.0112,
                "batch": 8,
                "dtype": "float32",
                "threads": 2,
                "hardware": "Example CPU",
            },
        },
        "groups": [
            {"name": n, "kind": "channel", "size": s, "kept": len(kept[n]), "exact": True}
            for n, s in sizes.items()
        ],
        "criterion": {"name": "sosp_h", "options": {"mode": "exact", "gate": "activation"}},
        "calibration": {"data": "sklearn/digits", "num_samples": 1024, "seed": 0},
        "versions": {"sosp_hub": "0.1.0", "torch": "2.15.0", "timm": "1.0.31"},
        "timings_s": {"score": 3.1},
        "base": {"model": "cifar_resnet20", "revision": None},
        "recipe": RECIPE,
        "command": "python -m sosp_hub.prune recipes/quickstart.yaml",
        "history": [],
    }
    return report, saliency


def whole_report():
    """Every section that a run may write, with one entry each."""
    share, found = {"macs": 0.5, "params": 0.5}, metric(0.9)
    lost = {"accuracy": {"value": 0.002, "upper": 0.008, "holds": True}}
    report, _ = image_report()
    provenance = {
        "floors": ["layer1.0.conv1:channel"],
        "blocks": [{"kind": "attention", "layer": "layer1", "loss": 0.5}],
        "compensation": {
            **{"groups": 2, "least_gate": 0.5, "largest_gate": 1.5, "damping": 0.1},
            "steps": [{"divergence": 0.5}, {"divergence": 0.25}],
        },
        "masks": {
            **{"sparsity": 0.1, "num_steps": 10, "num_penalized": 5, "num_off": 3},
            "shares": share,
        },
        "shifted_biases": 3,
    }
    layer = {"tensor": "a", "inputs": 40, "rows": 8, "damping": 0.1, "error_cut": 0.5, "error": 0.1}
    return report | {
        "task": "text-generation",
        "plan": {"sizes": {}, "kept": {}, "provenance": provenance},
        "groups": report["groups"][:1],
        "metrics": {
            "dense": {"accuracy": found, "accuracy/a": found},
            "rebuilt": {"accuracy": found},
            "recalibrated": {"accuracy": found},
            "final": {"accuracy": found, "accuracy/a": found, "accuracy@other": found},
        },
        "cost": {**report["cost"], "tokens": 7, "of_one": "7 tokens"},
        "latency": {
            "before": {"seconds": 1.0, "quartiles": [0.9, 1.1], "passes": 8},
            "after": {
                **{"seconds": 0.5, "quartiles": [0.4, 0.6], "passes": 8},
                **{"length": 7, "of_one": "x"},
            },
            "decode": {"before": {"seconds": 0.1}, "after": {"seconds": 0.05}},
        },
        "peak_memory": {
            "before": {"bytes": 100},
            "after": {"bytes": 50, "batch": 1, "length": 5, "dtype": "float32"},
        },
        "calibration": {
            **{"data": "d", "num_samples": 5, "seed": 0, "drawn_labels": 2, "seen": ["other"]},
            "curvature": "empirical",
        },
        "rebuild": {
            **{"layers": [layer], "left": {"d": "why"}},
            **{"num_samples": 8, "seconds": 1.0, "peak_bytes": 100},
        },
        "history": [{"epoch": 1}],
        "recovery": {
            "selected": {"epoch": 1.0, "loss": 0.5},
            **{"num_held_out": 10, "num_samples": 100, "num_tokens": 1000},
            "rates": [[0.1, 0.5], [0.01, 0.6]],
            "teacher": {"id": "x", "distill": 0.5, "hidden": 1.0, "relations": 1.0, "top_k": 3},
            "promise": {"lost": lost, "undone": False},
        },
        "promise": {
            "max_drop": [{"metric": "accuracy", "amount": 0.01, "relative": False}],
            **{"confidence": 0.95, "num_proof": 1000, "chosen": 0},
            "curve": [{"cost": share, "proof": lost}],
        },
        "rounds": [
            {"kept": share, "metrics": {"cut": {"accuracy": found}, "trained": {"accuracy": found}}}
        ],
    }


def text_report(layers=16):
    """A language model: two kinds of structure in every layer, perplexity, a base on the hub."""
    rng = np.random.default_rng(1)
    groups, saliency, kept = [], {}, {}
    for i in range(layers):
        for kind, part, size in (("kv_group", "self_attn", 3), ("neuron", "mlp", 1536)):
            name = f"model.layers.{i}.{part}:{kind}"
            saliency[name] = rng.lognormal(-9 + 2 * abs(i / layers - 0.4), 1.0, size).astype(
                "float32"
            )
            count = (
                3
                if kind == "kv_group" and i % 4
                else max(1, int(size * (0.5 + 0.4 * abs(i / layers - 0.4))))
            )
            kept[name] = sorted(np.argsort(-saliency[name])[:count].tolist())
            groups.append({"name": name, "kind": kind, "size": size, "kept": count, "exact": True})
    report, _ = image_report()
    report |= {
        "plan": {
            "kept": kept,
            "sizes": {g["name"]: g["size"] for g in groups},
            "provenance": {"floors": []},
        },
        "groups": groups,
        "metrics": {
            "dense": {"perplexity": metric(22.4, 3066, 0.6)},
            "cut": {"perplexity": metric(611.0, 3066, 19.0)},
            "final": {"perplexity": metric(29.9, 3066, 0.8)},
        },
        "base": {
            "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "revision": "12fd25f77366fa6b3b4b768ec3050bf629380bac",
            "license": "apache-2.0",
            "language": ["en"],
            "pipeline_tag": "text-generation",
        },
        "cost": {
            "before": {"macs": 69_700_000_000, "params": 134_515_008, "bytes": 538_060_032},
            "after": {"macs": 50_100_000_000, "params": 101_203_200, "bytes": 404_812_800},
        },
        "recipe": "model: {library: transformers, id: HuggingFaceTB/SmolLM2-135M-Instruct,"
        " task: causal-lm}\n"
        "data: {id: Salesforce/wikitext, name: wikitext-2-raw-v1}\n",
        "calibration": {"data": "Salesforce/wikitext", "num_samples": 256, "seed": 0},
    }
    del report["latency"]
    return report, saliency


def write(folder, report, saliency):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sosp_report.json").write_text(json.dumps(report), encoding="utf-8")
    save_file(saliency, folder / "saliency.safetensors")
    return folder
