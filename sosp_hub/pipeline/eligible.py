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
    of_kinds = {name: group for name, group in graph.groups.items() if group.kind in kinds}
    if not of_kinds:
        kinds_here = sorted(
            {group.kind for group in graph.groups.values()} & set(recipe.criterion.kinds)
        )
        raise TraceError(
            f"{recipe.model.id}: nothing in it can be cut as {', '.join(kinds)}; "
            + (
                f"it has {', '.join(kinds_here)}: write structure.kinds: [{', '.join(kinds_here)}]"
                if kinds_here
                else "no structure of it can be cut at all; choose another model"
            )
        )
    try:
        names = selected(of_kinds, only, recipe.structure.exclude)
    except BudgetError as error:
        raise TraceError(f"{recipe.model.id}: structure.{error}") from error
    return {name: of_kinds[name] for name in names}
