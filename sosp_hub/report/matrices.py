"""Pictures of matrices: what goes with what."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from sosp_hub.report.drawing import (
    CUT,
    INK,
    KEPT,
    MOST_NAMED_GROUPS,
    bare,
    new_figure,
    short_name,
)


def draw_correlation(
    matrix: NDArray[Any], groups: Sequence[Mapping[str, Any]], step: int = 1
) -> Figure:
    """Correlation between all structures as SOSP-I sees it: Q'_ij / sqrt(Q'_ii Q'_jj).

    Args:
        matrix: Gauss-Newton matrix in gate space, structures in the order of the groups.
        groups: Groups with their sizes.
        step: The matrix is of every so many structures.
    """
    size = np.sqrt(np.clip(np.diag(matrix), 0, None))
    correlation = (
        matrix
        / np.where(size > 0, size, np.inf)[:, None]
        / np.where(size > 0, size, np.inf)[None, :]
    )
    figure = new_figure(6.4, 5.6)
    axes = figure.subplots()
    image = axes.imshow(correlation, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    edges = np.cumsum([0, *(group["size"] for group in groups)]) / step
    for edge in edges[1:-1]:
        axes.axhline(edge - 0.5, color="white", linewidth=0.6)
        axes.axvline(edge - 0.5, color="white", linewidth=0.6)
    if len(groups) <= MOST_NAMED_GROUPS:
        names = [short_name(group) for group in groups]
        axes.set_yticks((edges[1:] + edges[:-1]) / 2 - 0.5, names, fontsize=7, color=INK)
    axes.set_xticks([])
    axes.tick_params(length=0, which="both")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.8, label="correlation of the effect on the output")
    return figure


def draw_cka(partition: Mapping[str, Any]) -> Figure:
    """How alike the outputs of blocks are, where SGLP draws borders, and what goes.

    Args:
        partition: `Partition.as_dict` of the criterion.
    """
    blocks, norms, gone = (partition[key] for key in ("blocks", "norms", "removed"))
    figure = new_figure(8.2, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    low = float(np.min(partition["cka"]))
    image = left.imshow(partition["cka"], cmap="viridis", vmin=low, vmax=1, interpolation="nearest")
    for border in partition["borders"]:  # the first row is what goes into the first block
        left.axhline(border + 0.5, color="white", linewidth=0.9)
        left.axvline(border + 0.5, color="white", linewidth=0.9)
    left.set_xlabel("block; the first is what goes in")
    left.tick_params(length=0, which="both")
    left.spines[:].set_visible(False)
    figure.colorbar(image, ax=left, shrink=0.8, label="CKA")
    colours = [CUT if block in gone else KEPT for block in blocks]
    right.barh(range(1, len(blocks) + 1), [norms.get(b, 0) for b in blocks], color=colours)
    right.set_ylim(len(blocks) + 0.5, 0.5)
    right.set_xlabel("gradient norm (none: always stays)")
    figure.legend(
        handles=[Patch(color=KEPT, label="stays"), Patch(color=CUT, label="goes")],
        loc="outside upper left", ncols=2, frameon=False,
    )  # fmt: skip
    bare(right, grid="x")
    return figure
