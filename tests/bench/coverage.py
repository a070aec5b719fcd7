"""Coverage of the structure engine: trace, cut half of everything, compare, model by model.

    python -m tests.bench.coverage                   # all; what the records hold is skipped
    python -m tests.bench.coverage --only bert swin  # some, by name or module
    python -m tests.bench.coverage --table           # the records as a Markdown table
    python -m tests.bench.coverage --peer            # Torch-Pruning beside it

The smallest architecture of every timm module, tiny models of many layouts of transformers
families, a small model of every other family that can be built from its shrunk default config,
models of torchvision, with random weights, each in its own process with limits of time and memory.
One layout of each popular family comes first, then one of every other family beside the timm
modules and torchvision, then more layouts and parts of models; a stopped run goes on with the
model that it was at.

Three plans are cut by ``apply(strict=True)``, which verifies against the masked model, also padded,
with other batch sizes and lengths, eager and from a cache: the exact groups, the kinds that are
cut by default, and all. The exact ones are also compared with the dense model with *gates*: hooks
that multiply each activation by 0 or 1 where it is read, which know nothing of how the engine
follows operations. Results other than ok:

    build, run   the model could not be made or run here: no result of the engine
    trace     the forward pass could not be followed
    refused   verification refuses the cut of a group (which then stays whole)
    wrong     verification lets it through and it differs from the dense model with gates
    gates     the cut is right (zeros where the structures are made), but the gates are not
    cost      predicted and measured cost differ
    train     in training mode, with dropout off, the cut model differs from the gated one
    save      the cut model (default kinds) cannot be saved, or what is loaded differs from it
    time, memory, crash   a limit was reached, or the process ended
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import json
import re
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

import sosp_hub
from sosp_hub.checkpoint.io import library_of
from sosp_hub.cost import cost
from sosp_hub.errors import SospHubError
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.groups import Group
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import apply, cut
from sosp_hub.types import DEFAULT_KINDS
from tests.bench import tiny
from tests.bench.bounded import Record, in_own_process, short
from tests.bench.families import FAMILIES
from tests.bench.timm_smallest import SMALLEST
from tests.plain import nets
from tests.structure.oracles import difference, fill, gated, half, run, unmade

ALLOWED = 1e-5
"""Largest error relative to the largest output; above it the comparison is repeated in float64."""

MOST_BYTES = int(2.5 * 2**30)
"""Memory that one model's process may hold, libraries included."""

Item = TypeVar("Item")
Built = tuple[nn.Module, Any, str | tuple[str, ...] | None]


# --- models ---


def timm_model(name: str) -> Built:
    """An architecture with random weights at its own or a smaller legal input size."""
    model = timm.create_model(name).eval()
    config = model.default_cfg
    channels, *size = config.get("min_input_size") or config["input_size"]
    return model, (torch.randn(2, channels, *size),), None


def tiny_model(name: str) -> Built:
    """A small model of a transformers class, and the outputs that its task reads."""
    model, inputs, result = tiny.built(name)
    return model, inputs, tiny.task_outputs(result)


def torchvision_model(name: str) -> Built:
    """An architecture with random weights; detectors get a list of pictures."""
    model = torchvision.models.get_model(name, weights=None, **_OPTIONS.get(name, {})).eval()
    if type(model).__module__.startswith("torchvision.models.detection"):
        return model, ([torch.rand(3, 64, 64)],), None
    if type(model).__module__.startswith("torchvision.models.video"):
        return model, (torch.randn(1, 3, 8, 64, 64),), None
    if type(model).__module__.startswith("torchvision.models.optical_flow"):
        return model, (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)), None
    size = _SIZES.get(name.partition("_")[0], 64)
    return model, (torch.randn(2, 3, size, size),), None


_SIZES = {"vit": 224, "maxvit": 224, "alexnet": 96, "inception": 96}
_TORCHVISION = (
    "alexnet", "vgg11", "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2",
    "densenet121", "squeezenet1_0", "googlenet", "inception_v3", "mobilenet_v2",
    "mobilenet_v3_small", "mobilenet_v3_large", "shufflenet_v2_x0_5", "mnasnet0_5",
    "efficientnet_b0", "efficientnet_v2_s", "regnet_x_400mf", "regnet_y_400mf", "convnext_tiny",
    "swin_t", "swin_v2_t", "vit_b_32", "maxvit_t", "lraspp_mobilenet_v3_large", "fcn_resnet50",
    "deeplabv3_mobilenet_v3_large", "r3d_18", "mc3_18", "r2plus1d_18", "s3d", "mvit_v1_b",
    "swin3d_t", "raft_small", "fasterrcnn_mobilenet_v3_large_320_fpn",
    "ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn", "fcos_resnet50_fpn",
    "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "ssd300_vgg16",
)  # fmt: skip
_OPTIONS = {
    name: {"weights_backbone": None, "num_classes": 4}
    | ({"min_size": 64, "max_size": 64} if "_fpn" in name else {})
    for name in _TORCHVISION
    if any(part in name for part in ("_fpn", "ssd", "lraspp", "fcn_", "deeplab"))
} | {"googlenet": {"init_weights": True}, "inception_v3": {"init_weights": True}}


def plain_model(name: str) -> Built:
    """A module of no library."""
    image, noise = torch.randn(2, 3, 64, 64), torch.randn(2, 4, 4, 4)
    inputs: Any = {
        "Yolo": (image,),
        "UNet": (torch.randn(2, 3, 32, 32),),
        "Denoiser": {
            "sample": noise,
            "timestep": torch.tensor([3, 50]),
            "encoder_hidden_states": torch.randn(2, 5, 12),
        },
        "TwoTowers": (torch.randn(2, 3, 8, 8), torch.randint(40, (2, 5))),
    }
    return getattr(nets, name)().eval(), inputs[name], None


_PLAIN = ("Yolo", "UNet", "Denoiser", "TwoTowers")


def models() -> dict[str, tuple[str, Callable[[], Built]]]:
    """Library and builder by the name that records use; popular and unlike ones come first."""
    found: dict[str, Callable[[], Built]] = {}
    kinds: dict[str, list[str]] = {"popular": [], "other": [], "part": []}
    for model_type, name in tiny.model_types():
        found[f"transformers/{model_type}/{name}"] = lambda name=name: tiny_model(name)
        kinds[tiny.kind_of(model_type)].append(f"transformers/{model_type}/{name}")
    for module, name in SMALLEST.items():
        found[f"timm/{module}/{name}"] = lambda name=name: timm_model(name)
    for name in _TORCHVISION:
        found[f"torchvision/{name}"] = lambda name=name: torchvision_model(name)
    for name in _PLAIN:
        found[f"plain/{name}"] = lambda name=name: plain_model(name)
    for family in FAMILIES:
        found[f"transformers/{family.name}"] = lambda family=family: (
            family.build(), family.inputs(), family.outputs,
        )  # fmt: skip
    others = [name for name in found if not name.startswith("transformers/")]
    unlike = by_turns(kinds["other"], lambda name: tiny.head_of(name.rpartition("/")[2]))
    order = [
        *kinds["popular"],
        *by_turns([*unlike, *others], lambda name: name.partition("/")[0]),
        *(f"transformers/{family.name}" for family in FAMILIES),
        *kinds["part"],
    ]
    return {name: (name.partition("/")[0], found[name]) for name in order}


def by_turns(items: Iterable[Item], kind: Callable[[Item], str]) -> list[Item]:
    """The first of each kind, the second of each, and so on."""
    by_kind: dict[str, list[Item]] = {}
    for item in items:
        by_kind.setdefault(kind(item), []).append(item)
    rows = itertools.zip_longest(*by_kind.values())
    return [item for row in rows for item in row if item is not None]


# --- references ---


def doubled(value: Any) -> Any:
    """Float tensors in double precision."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: doubled(item) for key, item in value.items()}
    return tuple(doubled(item) for item in value) if isinstance(value, tuple) else value


def error_against(
    reference: Callable[[nn.Module, Graph, PruningPlan], list[Tensor]],
    model: nn.Module,
    graph: Graph,
    plan: PruningPlan,
) -> float:
    """Error of the cut model; in float64 where float32 leaves doubt whether it is rounding."""
    error = difference(
        run(cut(copy.deepcopy(model), graph, plan), graph), reference(model, graph, plan)
    )
    if error <= ALLOWED:
        return error
    with contextlib.suppress(Exception):  # models with float32 written into their code
        exact = dataclasses.replace(graph, example_inputs=doubled(graph.example_inputs))
        wide = copy.deepcopy(model).double()
        found = run(cut(copy.deepcopy(wide), exact, plan), exact)
        return difference(found, reference(wide, exact, plan))
    return error


# --- one model ---


def measure(name: str, checks: Sequence[str]) -> Record:
    """Everything the table says of one model."""
    library, build = models()[name]
    torch.manual_seed(0)
    try:
        model, inputs, outputs = build()
    except Exception as error:  # noqa: BLE001 - so is the shrunk config of a family
        return {"model": name, "library": library, "status": "build", "message": short(error)}
    record: Record = {
        "checks": [*checks],
        "model": name,
        "library": library,
        "params": sum(p.numel() for p in model.parameters()),
    }
    fill(model)
    start = time.perf_counter()
    try:
        graph = trace(model, inputs, outputs)
    except Exception as error:  # noqa: BLE001 - the benchmark is about failures
        return {**record, "status": "trace", "message": short(error)}
    record["trace_s"] = round(time.perf_counter() - start, 2)
    total = max(graph.num_params, 1)
    record["groups"] = len(graph.groups)
    record["kinds"] = dict(Counter(group.kind for group in graph.groups.values()))
    record["exact_share"] = round(graph.num_cuttable_params["exact"] / total, 4)
    record["all_share"] = round(graph.num_cuttable_params["all"] / total, 4)
    record["reasons"] = reasons(graph, model)
    for label in checks:
        with contextlib.redirect_stdout(None):
            if label in _PLANS:
                found = check(model, graph, half(graph, _PLANS[label]), label)
            else:
                found = _USES[label](model, graph, build)
        record |= {f"{label}_{key}": value for key, value in found.items()}
    states = [record[f"{label}_state"] for label in checks]
    record["status"] = next((state for state in states if state != "ok"), "ok")
    messages = [record.get(f"{label}_message") for label in checks]
    record["message"] = next(filter(None, messages), "")
    record["unchecked"] = graph.routes.unchecked
    record["total_s"] = round(time.perf_counter() - start, 1)
    return record


DROPOUTS = (nn.modules.dropout._DropoutNd, torchvision.ops.StochasticDepth)

_PLANS: dict[str, Callable[[Group], bool]] = {
    "exact": lambda group: group.exact,
    "default": lambda group: group.kind in DEFAULT_KINDS,
    "all": lambda _: True,
}


def check(model: nn.Module, graph: Graph, plan: PruningPlan, label: str) -> Record:
    """Cuts by a plan and compares. ``wrong``: an error that verification would let through."""
    if not plan.kept:
        return {"state": "ok", "error": 0.0}
    found: Record = {}
    try:
        pruned = apply(model, graph, plan, strict=True)
    except SospHubError as error:
        return {"state": "refused", "message": short(error), "groups": getattr(error, "groups", ())}
    stage = "gates"
    try:
        if label == "exact":
            found["error"] = error_against(gated, model, graph, plan)
            if not found["error"] <= ALLOWED:
                found["unmade_error"] = error_against(unmade, model, graph, plan)
                state = "gates" if found["unmade_error"] <= ALLOWED else "wrong"
                message = f"differs from the gated model by {found['error']:.1e}"
                return found | {"state": state, "message": message}
        stage = "cost"
        small = cost(trace(pruned, graph.example_inputs, graph.outputs))
    except Exception as error:  # noqa: BLE001 - the benchmark is about failures
        return {**found, "state": stage, "message": short(error, with_place=True)}
    if cost(graph, plan) != small:
        return found | {"state": "cost", "message": f"predicted {cost(graph, plan)}, is {small}"}
    return found | {"state": "ok"}


def in_training(model: nn.Module, graph: Graph, _: Callable[[], Built]) -> Record:
    """The cut of exact groups in training mode, where the model itself repeats its outputs.

    In float64 where float32 leaves doubt: statistics of two samples magnify what is rounding.
    """
    found = _in_training(model, graph)
    if found["state"] == "train" and "error" in found:
        exact = dataclasses.replace(graph, example_inputs=doubled(graph.example_inputs))
        wide = _in_training(copy.deepcopy(model).double(), exact)
        found = wide if wide.get("checked") else found
    return found


def _in_training(model: nn.Module, graph: Graph) -> Record:
    plan = half(graph, _PLANS["exact"])
    dense = copy.deepcopy(model)
    for module in dense.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or isinstance(module, DROPOUTS)):
                vars(module)[name] = 0.0

    def trained(reference: Callable[..., list[Tensor]], *args: Any) -> list[Tensor]:
        twin = copy.deepcopy(dense).train()
        return reference(twin, *args)

    try:
        torch.manual_seed(1)
        first = trained(run, graph)
        torch.manual_seed(2)
        repeats = difference(trained(run, graph), first) == 0
    except Exception:  # noqa: BLE001 - training wants labels, or more samples
        repeats = False
    if not repeats:
        return {"state": "ok", "checked": False}
    try:
        small = cut(copy.deepcopy(dense), graph, plan).train()
        found = run(small, graph)
    except Exception as error:  # noqa: BLE001 - the benchmark is about failures
        return {"state": "train", "message": short(error, with_place=True)}
    try:
        error = min(difference(found, trained(gated, graph, plan)), 1e9)
        if error > ALLOWED:
            error = min(error, difference(found, trained(unmade, graph, plan)))
    except Exception as why:  # noqa: BLE001 - gates change what is normalised, or shapes
        return {"state": "ok", "checked": False, "message": short(why)}
    if not error <= 100 * ALLOWED:
        return {"state": "train", "error": error, "message": f"differs by {error:.1e} in training"}
    return {"state": "ok", "checked": True, "error": error}


def saved_and_loaded(model: nn.Module, graph: Graph, build: Callable[[], Built]) -> Record:
    """The cut of default kinds, written to files and read again."""
    plan = half(graph, _PLANS["default"])
    if not plan.kept:
        return {"state": "ok", "checked": False}
    try:
        pruned = sosp_hub.apply(model, graph, plan, verify="fast")
        expected = run(pruned, graph)
        with tempfile.TemporaryDirectory() as folder:
            place = sosp_hub.save_pretrained(pruned, Path(folder) / "cut")
            own = library_of(model) == "torch"
            loaded = sosp_hub.from_pretrained(place, **({"model": build()[0]} if own else {}))
        error = difference(run(loaded, graph), expected)
        if ALLOWED < error < 1e-3:  # memory lies differently: rounding, or other weights
            exact = dataclasses.replace(graph, example_inputs=doubled(graph.example_inputs))
            error = difference(run(loaded.double(), exact), run(pruned.double(), exact))
    except Exception as error:  # noqa: BLE001 - the benchmark is about failures
        return {"state": "save", "message": short(error, with_place=True)}
    if not error <= ALLOWED:
        return {"state": "save", "error": error, "message": f"loaded differs by {error:.1e}"}
    return {"state": "ok", "checked": True}


_USES = {"train": in_training, "save": saved_and_loaded}


def reasons(graph: Graph, model: nn.Module) -> dict[str, float]:
    """Share of the parameters that no group cuts, by why; names of modules are left out."""
    cuttable = {member.tensor for group in graph.groups.values() for member in group.members}
    largest = sorted(graph.pinned, key=lambda pinned: pinned.size)
    why = {pinned.tensor: pinned.reason for pinned in largest}
    shares: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if name not in cuttable:
            reason = re.sub(r" in [\w.]+(?= |$)", "", why.get(name, ""))
            shares[reason or "not used in the forward pass"] += parameter.numel()
    return {reason: round(n / max(graph.num_params, 1), 4) for reason, n in shares.most_common(6)}


# --- many models ---


def measure_other(name: str) -> Record:
    """What the peer makes of one model."""
    from tests.bench.peer import measure_peer

    torch.manual_seed(0)
    model, inputs, outputs = models()[name][1]()
    fill(model)
    found = measure_peer(model, inputs, outputs)
    return {"model": name, "status": found["peer"], **found}


def read(path: Path) -> dict[str, Record]:
    """The latest record of each model."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["model"]: record for record in map(json.loads, lines)}


def table(records: dict[str, Record], peers: dict[str, Record]) -> str:
    """The records as Markdown, with a summary line for each library."""
    lines = []
    for library in ("timm", "torchvision", "transformers", "plain"):
        mine = [
            records[name]
            for name in sorted(records)
            if name.startswith(library) and records[name]["status"] != "build"
        ]
        good = sum(record["status"] == "ok" for record in mine)
        wrong = sum(record["status"] == "wrong" for record in mine)
        lines.append(
            f"**{library}**: {good} of {len(mine)} right with every plan; {wrong} silently wrong."
        )
        theirs = Counter(peer["status"] for name, peer in peers.items() if name.startswith(library))
        if theirs:
            theirs["not run"] = len(mine) - theirs.total()
            told = ", ".join(f"{number} {status}" for status, number in (+theirs).most_common())
            lines += ["", f"Torch-Pruning: {told}."]
        lines += [
            "",
            "| model | groups | exact | cuttable | result | error | trace (s) | rest, why | peer |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [row(record, peers.get(record["model"], {})) for record in mine]
        lines.append("")
    return "\n".join(lines)


def row(record: Record, peer: Record) -> str:
    """One line of the table."""
    name, theirs = record["model"].partition("/")[2], peer.get("status", "")
    if "groups" not in record:
        told = record.get("message", "")[:120]
        return f"| {name} | | | | {record['status']} | | | {told} | {theirs} |"
    worst = record.get("exact_error", float("nan"))
    left = "; ".join(
        f"{100 * share:.1f} %: {reason}"
        for reason, share in record["reasons"].items()
        if share >= 5e-4
    )
    shares = f"{100 * record['exact_share']:.1f} % | {100 * record['all_share']:.1f} %"
    return (
        f"| {name} | {record['groups']} | {shares} | {record['status']} | {worst:.0e} "
        f"| {record['trace_s']} | {left[:160]} | {theirs} |"
    )


def commit() -> str:
    """The commit of the project, with a + where files differ from it."""
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False
    )
    return told.stdout.strip()


def main() -> None:
    """Parses, runs what is missing, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=Path("coverage.jsonl"), help="JSON lines")
    parser.add_argument("--peer-records", type=Path, default=Path("coverage_peer.jsonl"))
    parser.add_argument("--only", nargs="+", help="names or parts of names")
    parser.add_argument("--again", action="store_true", help="also models whose record is not ok")
    parser.add_argument("--limit", type=float, default=120, help="processor seconds for one model")
    parser.add_argument("--memory", type=float, default=MOST_BYTES / 2**30, help="GiB for one")
    every = (*_PLANS, *_USES)
    parser.add_argument("--checks", nargs="+", choices=every, default=every, help="some alone")
    parser.add_argument("--table", action="store_true", help="print the records, run nothing")
    parser.add_argument("--peer", action="store_true", help="run Torch-Pruning, not the engine")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    work_on, path = functools.partial(measure, checks=args.checks), args.records
    if args.peer:
        work_on, path = measure_other, args.peer_records
    known = read(path)
    if not args.table:
        work_on("plain/Denoiser")  # imports once what every process would
        gc.freeze()
    for name in () if args.table else models():
        if args.only:
            wanted = any(part in name.split("/") for part in args.only)
        else:
            wanted = name not in known or (args.again and known[name]["status"] != "ok")
        if wanted:
            known[name] = in_own_process(name, work_on, args.limit, int(args.memory * 2**30))
            known[name]["commit"] = commit()
            with path.open("a") as file:
                file.write(json.dumps(known[name]) + "\n")
            print(name, known[name]["status"], known[name].get("message", "")[:160], flush=True)
    if args.table or not args.only:
        print(table(read(args.records), read(args.peer_records)))


if __name__ == "__main__":
    main()
