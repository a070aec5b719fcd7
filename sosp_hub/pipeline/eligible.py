"""Which groups of a model a recipe lets go."""

import fnmatch

from sosp_hub.criteria.registry import scorable_kinds
from sosp_hub.errors import TraceError
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
            {group.kind for group in graph.groups.values()}
            & set(scorable_kinds(recipe.criterion.name))
        )
        raise TraceError(
            f"{recipe.model.id}: nothing in it can be cut as {', '.join(kinds)}; "
            + (
                f"it has {', '.join(there)}: write structure.kinds: [{', '.join(there)}]"
                if there
                else "no structure of it can be cut at all; choose another model"
            )
        )
    if only is None:
        return found
    for pattern in only:
        if not fnmatch.filter(found, pattern):
            raise TraceError(
                f"structure.only: {pattern!r} is no group of {recipe.model.id}; its groups of "
                f"these kinds are {', '.join(list(found)[:20])}"
            )
    return {
        name: group
        for name, group in found.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in only)
    }
