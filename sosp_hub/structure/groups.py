"""What a trace finds: groups of slices that must be cut together, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sosp_hub.types import Kind


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of a parameter or buffer that loses slices when the group does.

    Attributes:
        tensor: Name in the model's ``state_dict``.
        dim: Dimension of that tensor.
        index: For each position along ``dim`` the structure it belongs to, or -1 (another group's
            position).
        reads: The forward pass sums over this dimension (an input axis); otherwise it makes it (an
            output axis).
    """

    tensor: str
    dim: int
    index: NDArray[np.int64]
    reads: bool


@dataclass(frozen=True, eq=False)
class Site:
    """A place where the group's activation is read: gate 0 at all sites = pruned.

    A gate of an expert scales its contribution, on the weights that make it; an expert that is cut
    is not chosen either, and the router gives its tokens to others, so that its group is inexact.

    Exactly one of ``module`` and ``weight`` is set.

    Attributes:
        module: Module whose first input is the tensor that disappears.
        weight: Parameter that reads it inside a module's code; scaling it along ``dim`` is the
            same linear gate.
        dim: Dimension of that input (1 for convolutions, -1 for linear layers) or of that
            parameter.
        index: For each position along ``dim`` the structure it belongs to, or -1.
    """

    module: str | None
    weight: str | None
    dim: int
    index: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Group:
    """Structures ``0..size-1`` that are cut by the same kept indices everywhere.

    Attributes:
        name: Stable name: the module that makes the slices, then the kind, as in
            ``layer1.0.conv1:channel``.
        kind: What one structure is.
        size: Number of structures.
        members: Every parameter and buffer dimension that is cut.
        sites: Where the activation is read; the gates sit here. Empty where no gate can stand for
            the cut.
        reasons: Why a cut is not equal to a masked model (a normalisation over the axis, ...);
            empty = exact.
        layers: For kind ``layer``: the module that each structure is.
        multiple: A kernel needs kept counts that are multiples of this.
        rectified: The BatchNorms through whose ReLU all sites read the group; empty where one reads
            it otherwise.
        barred: Counts that must not be kept: the code would take another path, or picks more of
            them at once (a router's experts).
    """

    name: str
    kind: Kind
    size: int
    members: tuple[Member, ...]
    sites: tuple[Site, ...]
    reasons: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    multiple: int = 1
    rectified: tuple[str, ...] = ()
    barred: frozenset[int] = frozenset()

    @property
    def exact(self) -> bool:
        """Whether the cut model equals the dense model with these activations at zero."""
        return not self.reasons


Groups = Mapping[str, Group]
