"""Which groups are read behind a BatchNorm and a ReLU alone, as a criterion on the pair asks."""

from collections.abc import Sequence

from torch import nn

from sosp_hub.compat.torch import BatchNorm
from sosp_hub.structure.axes import Atom, atoms
from sosp_hub.structure.groups import Site
from sosp_hub.structure.terms import Axes, Step

Behind = dict[int, dict[int, frozenset[str]]]
"""BatchNorms that an activation comes from through a ReLU, by id of its axes and of an atom."""


def behind_pairs(model: nn.Module, steps: Sequence[Step]) -> Behind:
    """Follows every activation from the ReLU directly behind a BatchNorm.

    Pooling, dropout, concatenation and sums of such activations stay behind the pair; what meets a
    weight or any other activation does not.
    """
    scaled = {
        name
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) and module.affine
    }
    normed: dict[int, str] = {}
    behind: Behind = {}
    for step in steps if scaled else ():
        if "batch_norm" in step.name and step.module in scaled:
            normed[id(step.outputs[0])] = step.module
            continue
        norm = normed.get(id(step.inputs[0])) if step.inputs and _rectifies(step) else None
        for output in step.outputs:
            behind[id(output)] = norms_of = {}
            for atom in _atoms(output):
                if norm is not None:
                    norms_of[atom] = frozenset([norm])
                    continue
                sources = [
                    behind.get(id(i), {}).get(atom) for i in step.inputs if atom in _atoms(i)
                ]
                if sources and all(sources):
                    norms_of[atom] = frozenset[str]().union(*filter(None, sources))
    return behind


def rectified(
    behind: Behind, atom: Atom, sites: Sequence[Site], entries: dict[str, Axes]
) -> tuple[str, ...]:
    """The BatchNorms behind which all sites read, in order; none where a site reads otherwise."""
    norms: dict[str, None] = {}
    for site in sites:
        entry = entries.get(site.module or "")
        norms_before = behind.get(id(entry), {}).get(atom.id)
        if not norms_before:
            return ()
        norms |= dict.fromkeys(sorted(norms_before))
    return tuple(norms)


def _rectifies(step: Step) -> bool:
    name = step.name.split(".")[1] if "." in step.name else step.name
    return name in ("relu", "relu_", "relu6") or (
        name in ("hardtanh", "hardtanh_") and step.floats[:1] == (0.0,)
    )


def _atoms(axes: Axes) -> set[int]:
    return {atom.id for axis in axes for atom in atoms(axis)}
