"""Whole blocks that go: the attention of a layer, its MLP, or the layer, by measured loss."""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sosp_hub.cost import CostModel
from sosp_hub.distributed import OnDevice, from_main, logger
from sosp_hub.errors import TraceError
from sosp_hub.evaluate import evaluate
from sosp_hub.pipeline.context import Context
from sosp_hub.pipeline.stage_cache import step
from sosp_hub.pipeline.training import dense
from sosp_hub.recipe.tasks import find_task
from sosp_hub.structure.graph import Graph
from sosp_hub.surgery.layers import hand_on
from sosp_hub.surgery.tensors import get_tensor
from sosp_hub.types import BlockKind


@dataclass(frozen=True)
class Block:
    """What goes as a whole.

    Attributes:
        name: Of its group of heads, KV groups or neurons; of its module where it is a layer.
        kind: What it is.
        group: The group that loses something.
        layer: The layer that it is, or is in.
    """

    name: str
    kind: BlockKind
    group: str
    layer: str


def blocks_of(graph: Graph, kinds: Sequence[BlockKind]) -> list[Block]:
    """The blocks of a model, in its order.

    Raises:
        TraceError: A kind that the model has none of.
    """
    stacks = [group for group in graph.groups.values() if group.kind == "layer"]
    layers = [(layer, group.name) for group in stacks for layer in group.layers]
    shared = {
        m.tensor
        for group in graph.groups.values()
        if group.kind == "kv_group"
        for m in graph.readers(group.name)
    }
    found = [Block(layer, "layer", group, layer) for layer, group in layers]
    for name, group in graph.groups.items():
        readers = graph.readers(name)
        inside = [at for at, _ in layers if readers and readers[0].tensor.startswith(f"{at}.")]
        if not inside or group.reasons or any(m.tensor in graph.normalised for m in readers):
            continue
        if group.kind == "kv_group" or (
            group.kind == "head" and not any(m.tensor in shared for m in readers)
        ):
            found.append(Block(name, "attention", name, inside[-1]))
        elif group.kind == "neuron" and all(m.dim < 2 for m in readers):
            found.append(Block(name, "mlp", name, inside[-1]))
    for kind in kinds:
        if not any(block.kind == kind for block in found):
            raise TraceError(
                f"structure.blocks.kinds: the model has no {kind} that can be left out whole; it "
                f"has {', '.join(sorted({block.kind for block in found})) or 'none'}"
            )
    return [block for block in found if block.kind in kinds]


def left_of(graph: Graph, gone: Sequence[Block]) -> dict[str, list[float]]:
    """Scores of groups whose blocks go: 0 for what goes, and 1."""
    found = {block.group: [0.0] * graph.groups[block.group].size for block in gone}
    for block in gone:
        if block.kind == "layer":
            kept = _kept(graph, block.group, gone)
            found[block.group] = [float(i in kept) for i in range(graph.groups[block.group].size)]
    return found


def shares(graph: Graph, gone: Sequence[Block]) -> dict[str, float]:
    """For ``allocate(groups=)``: what the groups keep whose blocks go."""
    layers = [block for block in gone if block.kind == "layer"]
    found = {block.group: 0.0 for block in gone if block.kind != "layer"}
    for name in dict.fromkeys(block.group for block in layers):
        size = graph.groups[name].size
        found[name] = (size - sum(block.group == name for block in layers)) / size
    return found


@step("blocks", dense, "structure", "budget", "criterion.scores", with_peak=True)
def blocks(context: Context) -> dict[str, Any]:
    """Removes the block whose removal costs least for what it saves, again and again.

    What a removal costs is the measured loss of the model with that block alone gone too. It is
    measured anew after each removal, but only of blocks that could be the next: a block is taken
    to cost no less once others are gone.
    """
    section = context.recipe.structure.blocks
    assert section is not None
    graph, budget = context.graph, context.recipe.budget.targets()
    able = [each for each in blocks_of(graph, section.kinds) if each.group not in context.stuck]
    model = context.model
    cost_of, unit = CostModel(graph), "macs" if "params" not in budget else "params"
    gone: list[Block] = []

    def left(blocks: Sequence[Block]) -> float:
        found = shares(graph, blocks)
        counts = {name: round(share * graph.groups[name].size) for name, share in found.items()}
        kept = {name: _kept(graph, name, blocks) for name in counts}
        return getattr(cost_of(counts, kept), unit)

    def loss(blocks: Sequence[Block]) -> float:
        with without(model, graph, blocks):
            return _loss(context, model, section.num_samples)

    whole, before = left(()), loss(())
    told, now = [], before
    queue = [(-1.0, number, -1) for number in range(len(able))]  # never measured: first of all
    while queue and len(gone) < section.most:
        price, number, when = heapq.heappop(queue)
        block = able[number]
        if any(block.layer == other.layer for other in gone if "layer" in (block.kind, other.kind)):
            continue
        if when < len(gone):
            saved = left(gone) - left([*gone, block])
            price = (loss([*gone, block]) - now) / max(saved, 1.0)
            heapq.heappush(queue, (price, number, len(gone)))
            continue
        if left([*gone, block]) < budget.get(unit, 0.0) * whole:
            continue  # more than the budget asks for
        gone.append(block)
        now = loss(gone)
        told.append({"name": block.name, "kind": block.kind, "group": block.group,
                     "layer": block.layer, "loss": now})  # fmt: skip
        logger.info(
            "without the %s %s: loss %.4g (dense %.4g)", block.kind, block.name, now, before
        )
    return from_main({"dense_loss": before, "removed": told})


def removed(context: Context) -> list[dict[str, Any]]:
    """The blocks that go, as plain data, in their order; those of an earlier run's scores."""
    if context.recipe.structure.blocks is None:
        return []
    if context.scores is not None:
        known = context.scores.blocks
        return [dict(block) for block in known if block["group"] not in context.stuck]
    return blocks(context)["removed"]


def as_blocks(told: Sequence[Mapping[str, Any]]) -> list[Block]:
    """What a plan says of them."""
    return [Block(one["name"], one["kind"], one["group"], one["layer"]) for one in told]


@contextmanager
def without(model: nn.Module, graph: Graph, gone: Sequence[Block]) -> Iterator[None]:
    """While this lasts the blocks add nothing."""
    handles, saved = [], {}
    try:
        for block in gone:
            if block.kind == "layer":
                layer = model.get_submodule(block.layer)
                handles.append(layer.register_forward_hook(hand_on, prepend=True))
                continue
            for member in graph.readers(block.group):
                weight = get_tensor(model, member.tensor)
                saved.setdefault(member.tensor, weight.detach().clone())
                at = torch.as_tensor(np.flatnonzero(member.index >= 0), device=weight.device)
                with torch.no_grad():
                    weight.index_fill_(member.dim, at, 0.0)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in saved.items():
            with torch.no_grad():
                get_tensor(model, name).copy_(weight)


def _kept(graph: Graph, name: str, gone: Sequence[Block]) -> Sequence[int]:
    group = graph.groups[name]
    layers = {block.layer for block in gone if block.kind == "layer"}
    return [i for i, layer in enumerate(group.layers) if layer not in layers]


def _loss(context: Context, model: nn.Module, num_samples: int) -> float:
    batches = OnDevice(context.calibration_batches(0, context.at_most(num_samples)))
    task, data = find_task(context.recipe.model.task), context.data
    assert data is not None
    meters: Mapping[str, Any] = task.meters(data.info, context.loaded.processor)
    found = evaluate(model, batches, ("loss",), loss_fn=context.loss_fn(model), meters=meters)
    return found["loss"].value
