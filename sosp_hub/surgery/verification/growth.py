"""A widened model is checked: it computes what the model computed."""

from collections.abc import Callable

from torch import nn

from sosp_hub.errors import VerificationError
from sosp_hub.plan import GrowthPlan
from sosp_hub.structure.graph import Graph
from sosp_hub.surgery.verification.outputs import TOLERANCE, outputs_of, relative_error
from sosp_hub.surgery.verification.steps import check_shapes, outputs_instead
from sosp_hub.surgery.verification.twins import twin_of, without_zeros

Grow = Callable[[nn.Module, Graph, GrowthPlan], nn.Module]


def verify_growth(
    model: nn.Module,
    wide: nn.Module,
    graph: Graph,
    growth: GrowthPlan,
    *,
    thorough: bool,
    grow: Grow,
) -> None:
    """Raises unless ``wide`` has the predicted shapes and computes what ``model`` computes."""
    same_steps = check_shapes(wide, graph, growth)
    if not thorough and (same_steps or not outputs_instead(model, "the widened model")):
        return
    dense = without_zeros(model, graph)
    expected = outputs_of(twin_of(dense, graph), graph)
    error = relative_error(outputs_of(grow(twin_of(dense, graph), graph, growth), graph), expected)
    if error <= TOLERANCE:
        return
    for name in growth.copies:
        part = GrowthPlan({name: growth.copies[name]})
        tied = any(name in tie for tie in graph.ties)
        if (
            not tied
            and relative_error(
                outputs_of(grow(twin_of(dense, graph), graph, part), graph), expected
            )
            > TOLERANCE
        ):
            break
    else:
        name = " and ".join(list(growth.copies)[:3])
    raise VerificationError(
        f"the widened model's outputs differ from the model's by {error:.1e} (relative). "
        f"Group {name!r} causes it; leave it out"
    )
