"""Experts that a router chooses among: where their gates sit."""

from collections.abc import Mapping, Sequence

from sosp_hub.structure.axes import Atom, Axis, atoms, index_of
from sosp_hub.structure.groups import Site
from sosp_hub.structure.terms import Axes


def expert_sites(
    atom: Atom,
    members: Sequence[tuple[str, int]],
    tensors: Mapping[str, Axes],
    reads: Mapping[tuple[str, int], Mapping[str, Axis]],
) -> list[Site]:
    """Where an expert's contribution is made: its last product, and what is added to that."""
    dims = dict(members)
    products = [
        (name, axis)
        for (name, _), by_module in reads.items()
        for axis in by_module.values()
        if name in dims and len(tensors[name]) == 3
    ]
    if not products:
        return []
    last, inner = products[-1]
    experts = _ids(tensors[last][dims[last]])
    columns = [_ids(axis) for axis in tensors[last] if _ids(axis) not in (experts, _ids(inner))]
    read = {name for name, _ in reads}
    added = [
        name
        for name in dims
        if name not in read and [_ids(axis) for axis in tensors[name]] == [experts, *columns]
    ]
    return [
        Site(None, name, dims[name], index_of(tensors[name][dims[name]], atom))
        for name in (last, *added)
    ]


def _ids(axis: Axis) -> list[int]:
    return [atom.id for atom in atoms(axis)]
