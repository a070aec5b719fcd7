"""Nuclear norm of feature maps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from sosp_hub.criteria.activations import (
    WATCHED,
    Seen,
    is_watched,
    mean_of_sites,
    site_means,
)
from sosp_hub.criteria.ranking import standardized
from sosp_hub.criteria.registry import HasGroups, Needs, register

if TYPE_CHECKING:
    from sosp_hub.types import Batches, Saliency

_STRUCTURES = 64  # feature maps of so many structures are copied at once


@register
@final
@dataclass(frozen=True)
class Eap:
    """Nuclear norm of what a structure hands on, its sum of singular values per sample.

    ``set``: the maps of up to ``set_size`` samples of a batch are the rows of one matrix of each
    structure, samples by places. ``map``: every map is a matrix of its own, height by width (tokens
    by positions of a structure in transformers). Singular values are the roots of the eigenvalues
    of the smaller Gram matrix, which is made in the maps' precision (float32 at least): of float32
    maps, singular values below a few 1e-4 of the largest are rounding. ``set`` costs about as much
    as the forward pass, ``map`` several times that.

    Paper: Yeom et al., "Toward Compact Deep Neural Networks via Energy-Aware Pruning", arXiv
    2103.10858. Which matrix is meant is our reading of the abstract, which is why there are two.

    Differs from the paper: the map is where it is read, after normalisation and activation function
    (our choice); heads, neurons and groups that are read in several places are scored too; padding
    does not count; scores are standardised within each group. With ``set`` the scores depend on how
    the data is cut into batches.

    Attributes:
        reading: What the matrix is.
        set_size: Most samples of one matrix with ``set``.
        standardize: Mean 0 and standard deviation 1 within each group.
        process_sum: Sum over processes.
    """

    reading: Literal["set", "map"] = "set"
    set_size: int = 32
    standardize: bool = True
    process_sum: Callable[[Tensor], Tensor] | None = None
    name: ClassVar[str] = "eap"
    paper: ClassVar[str] = "arXiv 2103.10858"
    needs: ClassVar[Needs] = "inputs"
    scores_only: ClassVar[str] = WATCHED
    able = staticmethod(is_watched)

    def saliency(self, model: nn.Module, graph: HasGroups, batches: "Batches") -> "Saliency":
        """One forward pass per batch."""
        means = site_means(model, graph.groups, batches, self._measure, self.process_sum)
        scores = mean_of_sites(means)
        if not self.standardize:
            return scores
        return standardized(scores, "the nuclear norm of feature maps")

    def _measure(self, seen: Seen) -> tuple[Tensor, int]:
        norms = []
        for part in seen.by_structure().split(_STRUCTURES):  # (structures, samples, places, each)
            if self.reading == "map":
                is_image = len(seen.shape) == 2 and part.shape[-1] == 1
                maps = part.unflatten(2, seen.shape).squeeze(-1) if is_image else part
                norms.append(_nuclear_norms(maps).sum(-1))
            else:
                sets = part.flatten(2).split(self.set_size, 1)
                norms.append(torch.stack([_nuclear_norms(matrix) for matrix in sets]).sum(0))
        return torch.cat(norms), len(seen.rows)


def _nuclear_norms(matrices: Tensor) -> Tensor:
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    gram = (wide @ wide.mT).to(torch.float64)
    if not gram.isfinite().all():  # said by `score`; eigenvalues would not converge
        return gram.new_full(gram.shape[:-2], torch.nan)
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum(-1)
