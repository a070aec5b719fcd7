"""Which groups of a model a recipe lets go."""

from sosp_hub.allocation import selected
from sosp_hub.errors import BudgetError, TraceError
from sosp_hub.recipe.criteria import CRITERIA
from sosp_hub.recipe.schema import Recipe
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.groups import Group


def eligible_groups(graph: Graph, recipe: Recipe) -> dict[str, Group]:
    """The groups of the kinds that the recipe names, and of those the ones whose names it gives.

    Raises:
        TraceError: There is none, or none of such a name; says what there is.
    """
    kinds, only = recipe.structure.kinds, recipe.structure.only
    of_kinds = {name: group for name, group in graph.groups.items() if group.kind in kinds}
    if not of_kinds:
        raise TraceError(
            f"{recipe.model.id}: nothing in it can be cut as {', '.join(kinds)}; "
            + _what_can(graph, recipe)
        )
    try:
        names = selected(of_kinds, only, recipe.structure.exclude)
    except BudgetError as error:
        raise TraceError(f"{recipe.model.id}: structure.{error}") from error
    return {name: of_kinds[name] for name in names}


def _what_can(graph: Graph, recipe: Recipe) -> str:
    """Which kinds can be cut instead, and by which criterion where this one scores none of them."""
    here = {group.kind for group in graph.groups.values()}
    if not here:
        return "no structure of it can be cut at all; choose another model"
    scored = sorted(here & set(recipe.criterion.kinds))
    shown = ", ".join(scored or sorted(here))
    instead = f"structure.kinds: [{shown}]"
    if scored:
        return f"it has {shown}: write {instead}"
    able = [name for name, other in CRITERIA.known().items() if here <= set(other.kinds)]
    return (
        f"it has {shown}, which {recipe.criterion.name} does not score: write {instead} and "
        f"criterion.name: {' or '.join(able)}"
    )
