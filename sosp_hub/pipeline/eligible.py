"""Which groups of a model a recipe lets go."""

from sosp_hub.allocation import selected
from sosp_hub.errors import BudgetError, TraceError
from sosp_hub.recipe.schema import Recipe
from sosp_hub.structure.graph import Graph
from sosp_hub.structure.groups import Group


def eligible_groups(graph: Graph, recipe: Recipe) -> dict[str, Group]:
    """The groups of the kinds that the recipe names, and of those the ones whose names it gives.

    Raises:
        TraceError: There is none, or none of such a name; says what there is.
    """
    kinds, only = recipe.structure.kinds, recipe.structure.only
    found = {name: group for name, group in graph.groups.items() if group.kind in kinds}
    if not found:
        there = sorted(
            {group.kind for group in graph.groups.values()} & set(recipe.criterion.kinds)
        )
        raise TraceError(
            f"{recipe.model.id}: nothing in it can be cut as {', '.join(kinds)}; "
            + (
                f"it has {', '.join(there)}: write structure.kinds: [{', '.join(there)}]"
                if there
                else "no structure of it can be cut at all; choose another model"
            )
        )
    try:
        names = selected(found, only, recipe.structure.exclude)
    except BudgetError as error:
        raise TraceError(f"{recipe.model.id}: structure.{error}") from error
    return {name: found[name] for name in names}
