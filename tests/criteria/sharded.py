"""What each of two processes finds on a model whose weights they share (FSDP2)."""

import json
import sys
from pathlib import Path

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sosp_hub.distributed import process_state, process_sum
from sosp_hub.errors import CriterionError
from sosp_hub.scoring import score
from sosp_hub.structure.trace import trace
from tests.cases import CASES

CASE = next(case for case in CASES if case.name == "llama")
SCORED = {
    "sosp_h auto": {"mode": "auto"},
    "taylor": {},
    "fisher": {},
    "sosp_i drawn": {"num_draws": 2},
    "sosp_i surgeon": {"selection": "surgeon"},
    "magnitude": {},
}
REFUSED = {"sosp_h": {"mode": "exact"}, "activation": {}}


def model():
    return CASE.model()


def shares(num):
    """Batches of each process, whose numbers differ; together they are the samples of one batch."""
    tokens = CASE.batch(5)["input_ids"]
    parts = [[tokens[:1], tokens[1:2], tokens[2:3]], [tokens[3:]]] if num == 2 else [[tokens]]
    return [[{"input_ids": part, "labels": part} for part in mine] for mine in parts]


def results():
    state = process_state()
    rank, world = state.process_index, state.num_processes
    graph = trace(model(), CASE.inputs(), outputs="logits")
    mine = shares(world)[rank]
    whole = model()
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for layer in whole.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(whole, mesh=mesh)
    found = {}
    for name, options in SCORED.items():
        criterion = name.partition(" ")[0]
        if world == 1 and "mode" in options:
            options = {"mode": "differences"}
        saliency = score(whole, graph, mine, criterion, process_sum=process_sum, **options)
        found[name] = {group: values.tolist() for group, values in saliency.items()}
    refused = {}
    for name, options in REFUSED.items() if world > 1 else ():
        try:
            score(whole, graph, mine, name, process_sum=process_sum, **options)
        except CriterionError as error:
            refused[name] = str(error)
    nothing = ""
    if world > 1:
        try:
            score(whole, graph, mine if rank else [], "taylor", process_sum=process_sum)
        except CriterionError as error:
            nothing = str(error)
    return {"scores": found, "refused": refused, "nothing": nothing}


if __name__ == "__main__":
    made = results()
    (Path(sys.argv[1]) / f"{process_state().process_index}.json").write_text(json.dumps(made))
