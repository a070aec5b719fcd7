"""A graph in words: stable text for reviews and golden files."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sosp_hub.structure.graph import Graph


def show(graph: "Graph") -> str:
    """One line a group, then its members; then ties and what is pinned, by reason."""
    exact = graph.num_cuttable_params.get("exact", 0)
    everything = graph.num_cuttable_params.get("all", 0)
    total = max(graph.num_params, 1)
    lines = [
        f"{len(graph.groups)} groups; {100 * everything / total:.1f} % of "
        f"{graph.num_params:,} parameters can be cut "
        f"({100 * exact / total:.1f} % exactly)"
    ]
    for group in graph.groups.values():
        tail = "" if group.exact else f"  inexact: {'; '.join(group.reasons[:2])}"
        if group.barred:
            tail = f"  never {', '.join(map(str, sorted(group.barred)[:8]))}{tail}"
        lines.append(f"{group.name}  size {group.size}{tail}")
        lines += [f"    layer {layer}" for layer in group.layers]
        for member in group.members:
            verb = "reads" if member.reads else "makes"
            lines.append(f"    {verb} {member.tensor}[{member.dim}]")
    lines += [f"tied: {', '.join(tie)}" for tie in graph.ties]
    by_reason: dict[str, list[str]] = {}
    for pinned in graph.pinned:
        by_reason.setdefault(pinned.reason, []).append(f"{pinned.tensor}[{pinned.dim}]")
    for reason, dims in by_reason.items():
        more = f" and {len(dims) - 3} more" if len(dims) > 3 else ""
        lines.append(f"pinned: {', '.join(dims[:3])}{more}: {reason}")
    for reason in sorted(set(graph.undroppable.values())):
        stacks = [stack for stack, why in graph.undroppable.items() if why == reason]
        more = f" and {len(stacks) - 3} more" if len(stacks) > 3 else ""
        lines.append(f"undroppable: layers of {', '.join(stacks[:3])}{more}: {reason}")
    for modules, what in (
        (graph.only_in_training, "only training uses"),
        (graph.never_used, "nothing uses"),
    ):
        more = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
        if modules:
            lines.append(f"{what}: {', '.join(modules[:3])}{more}")
    return "\n".join(lines)
