"""Coverage of the structure engine: trace, cut half of everything, compare, model by model.

    python -m tests.bench.coverage                   # all; what the records hold is skipped
    python -m tests.bench.coverage --only bert swin  # some, by name or module
    python -m tests.bench.coverage --table           # the records as a Markdown table
    python -m tests.bench.coverage --peer            # Torch-Pruning beside it

The smallest architecture of every timm model module and tiny models of more than a hundred layouts
of transformers families, with random weights, each in its own process with a time limit.

The cut is compared with two references. *Gates* is the dense model with hooks that multiply each
activation by 0 or 1 where it is read: it holds for the exact groups and knows nothing of how the
engine follows operations. *Masked* is the replay that verification uses: it also holds where a
normalisation runs over the cut axis. Results other than ok:

    trace, cut, run, shapes, masked   that stage raised
    refused   the cut differs from the masked model, so verification refuses it
    wrong     verification lets it through and it differs from the dense model with gates
    gates     the cut is right (zeros where the structures are made), but the gates are not
    cost      predicted and measured cost differ
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import multiprocessing
import re
import resource
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn

from sosp_hub.cost import cost
from sosp_hub.errors import SospHubError
from sosp_hub.plan import PruningPlan
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.trace import trace
from sosp_hub.surgery.apply import cut
from sosp_hub.surgery.verify import check_shapes, masked_outputs
from tests.bench.families import FAMILIES
from tests.bench.timm_smallest import SMALLEST
from tests.structure.oracles import difference, fill, gated, half, run, unmade

ALLOWED = 1e-5
"""Largest error relative to the largest output; above it the comparison is repeated in float64."""

Record = dict[str, Any]
Built = tuple[nn.Module, Any, str | None]


# --- models ---


def timm_model(name: str) -> Built:
    """An architecture with random weights at its own or a smaller legal input size."""
    model = timm.create_model(name).eval()
    config = model.default_cfg
    channels, *size = config.get("min_input_size") or config["input_size"]
    return model, (torch.randn(2, channels, *size),), None


def models() -> dict[str, tuple[str, Callable[[], Built]]]:
    """Library and builder by the name that records use."""
    found: dict[str, tuple[str, Callable[[], Built]]] = {}
    for module, name in SMALLEST.items():
        found[f"timm/{module}/{name}"] = ("timm", lambda name=name: timm_model(name))
    for family in FAMILIES:
        found[f"transformers/{family.name}"] = (
            "transformers",
            lambda family=family: (family.build(), family.inputs(), family.outputs),
        )
    return found


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


def measure(name: str) -> Record:
    """Everything the table says of one model."""
    library, build = models()[name]
    torch.manual_seed(0)
    model, inputs, outputs = build()
    record: Record = {
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
    for label, chosen in (("exact", lambda group: group.exact), ("all", lambda _: True)):
        record |= {
            f"{label}_{key}": value
            for key, value in check(model, graph, half(graph, chosen), label).items()
        }
    states = record["exact_state"], record["all_state"]
    record["status"] = next((state for state in states if state != "ok"), "ok")
    record["message"] = record.get("exact_message") or record.get("all_message") or ""
    record["total_s"] = round(time.perf_counter() - start, 1)
    return record


def check(model: nn.Module, graph: Graph, plan: PruningPlan, label: str) -> Record:
    """Cuts by a plan and compares. ``wrong``: an error that verification would let through."""
    if not plan.kept:
        return {"state": "ok", "error": 0.0}
    found: Record = {}
    stage = "cut"
    try:
        graph.check(plan)
        pruned = cut(copy.deepcopy(model), graph, plan)
        stage = "run"
        run(pruned, graph)
        stage = "shapes"
        check_shapes(pruned, graph, plan)
        stage = "masked"
        found["error"] = error_against(masked_outputs, model, graph, plan)
        if label == "exact":
            stage = "gates"
            found["gate_error"] = error_against(gated, model, graph, plan)
            if not found["gate_error"] <= ALLOWED:
                found["unmade_error"] = error_against(unmade, model, graph, plan)
        stage = "cost"
        small = trace(pruned, graph.example_inputs, graph.outputs)
        found["cost_equal"] = cost(graph, plan) == cost(small)
    except Exception as error:  # noqa: BLE001 - the benchmark is about failures
        refused = isinstance(error, SospHubError)
        return {
            **found,
            "state": stage,
            "message": short(error) if refused else short(error, with_place=True),
        }
    if not found["error"] <= ALLOWED:
        found |= {
            "state": "refused",
            "message": f"differs from the masked model by {found['error']:.1e}",
        }
    elif not found.get("gate_error", 0.0) <= ALLOWED:
        state = "gates" if found["unmade_error"] <= ALLOWED else "wrong"
        message = f"differs from the gated model by {found['gate_error']:.1e}"
        found |= {"state": state, "message": message}
    elif not found["cost_equal"]:
        found |= {
            "state": "cost",
            "message": f"predicted {cost(graph, plan)}, measured {cost(small)}",
        }
    else:
        found["state"] = "ok"
    return found


def short(error: BaseException, *, with_place: bool = False) -> str:
    """One line about an error, with the innermost places of the package and of the model's code."""
    text = f"{type(error).__name__}: {error}".replace("\n", " ")[:400]
    if with_place:
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        text += " @ " + " > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames)
    return text


def reasons(graph: Graph, model: nn.Module) -> dict[str, float]:
    """Share of the parameters that no group cuts, by why; names of modules are left out."""
    cuttable = {member.tensor for group in graph.groups.values() for member in group.members}
    why = {pinned.tensor: pinned.reason for pinned in graph.pinned}
    shares: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if name not in cuttable:
            reason = why.get(name, "not used in the forward pass")
            shares[re.sub(r" in [\w.]+(?= |$)", "", reason)] += parameter.numel()
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


def in_own_process(name: str, limit_s: float, work_on: Callable[[str], Record]) -> Record:
    """Runs ``work_on`` in a fork, so that a crash, a hang or a patched library stays there.

    Its time is that of the processor; what sleeps is stopped after ten times as long.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit_s), int(limit_s) + 5))
        try:
            sender.send(work_on(name))
        except Exception as error:  # noqa: BLE001 - the benchmark is about failures
            sender.send(
                {"model": name, "status": "build", "message": short(error, with_place=True)}
            )

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        record = receiver.recv() if receiver.poll(10 * limit_s) else None
    except EOFError:
        record = None
        process.join()
    slow = process.exitcode in (None, -signal.SIGXCPU)
    if record is None:
        process.kill()
    process.join()
    told = "time" if slow else "crash"
    return record or {"model": name, "status": told, "message": f"after {limit_s:.0f} s"}


def read(path: Path) -> dict[str, Record]:
    """The latest record of each model."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["model"]: record for record in map(json.loads, lines)}


def table(records: dict[str, Record], peers: dict[str, Record]) -> str:
    """The records as Markdown, with a summary line for each library."""
    lines = []
    for library in ("timm", "transformers"):
        mine = [records[name] for name in sorted(records) if name.startswith(library)]
        good = sum(record["status"] == "ok" for record in mine)
        wrong = sum(record["status"] == "wrong" for record in mine)
        lines.append(
            f"**{library}**: {good} of {len(mine)} equal both references; {wrong} silently wrong."
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
    errors = [record.get(key) for key in ("exact_error", "exact_gate_error", "all_error")]
    worst = max((error for error in errors if error is not None), default=float("nan"))
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


def main() -> None:
    """Parses, runs what is missing, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=Path("coverage.jsonl"), help="JSON lines")
    parser.add_argument("--peer-records", type=Path, default=Path("coverage_peer.jsonl"))
    parser.add_argument("--only", nargs="+", help="names or parts of names")
    parser.add_argument("--again", action="store_true", help="also models whose record is not ok")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one model")
    parser.add_argument("--table", action="store_true", help="print the records, run nothing")
    parser.add_argument("--peer", action="store_true", help="run Torch-Pruning, not the engine")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    work_on, path = (measure_other, args.peer_records) if args.peer else (measure, args.records)
    known = read(path)
    for name in () if args.table else models():
        if args.only:
            wanted = any(part in name.split("/") for part in args.only)
        else:
            wanted = name not in known or (args.again and known[name]["status"] != "ok")
        if wanted:
            known[name] = in_own_process(name, args.limit, work_on)
            with path.open("a") as file:
                file.write(json.dumps(known[name]) + "\n")
            print(name, known[name]["status"], known[name].get("message", "")[:160], flush=True)
    if args.table or not args.only:
        print(table(read(args.records), read(args.peer_records)))


if __name__ == "__main__":
    main()
