"""Size of activations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

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


@register
@final
@dataclass(frozen=True)
class Activation:
    """How large a structure's activation is: mean over places, root mean square over samples.

    ``sqrt(E_n (mean_t ||a_nts||_2)^2)`` with ``a_nts`` what structure ``s`` hands on at token or
    pixel ``t`` of sample ``n``: one number of a channel or neuron, a vector of a head.

    Paper: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation"
    (Minitron), arXiv 2407.14679, with mean over the sequence and L2 over the batch.

    Differs from the paper: root mean square for L2, so that the number of samples does not matter;
    padding does not count; scores are standardised within each group, so that layers compare (our
    choice); places that read the same group are averaged.

    Attributes:
        standardize: Mean 0 and standard deviation 1 within each group.
        process_sum: Sum over processes.
    """

    standardize: bool = True
    process_sum: Callable[[Tensor], Tensor] | None = None
    name: ClassVar[str] = "activation"
    paper: ClassVar[str] = "arXiv 2407.14679"
    needs: ClassVar[Needs] = "inputs"
    scores_only: ClassVar[str] = WATCHED
    able = staticmethod(is_watched)

    def saliency(self, model: nn.Module, graph: HasGroups, batches: "Batches") -> "Saliency":
        """One forward pass per batch."""
        means = site_means(model, graph.groups, batches, _squares, self.process_sum)
        roots = {name: {i: m.sqrt() for i, m in found.items()} for name, found in means.items()}
        scores = mean_of_sites(roots)
        return standardized(scores, "the size of activations") if self.standardize else scores


def _squares(seen: Seen) -> tuple[Tensor, int]:
    sizes = torch.linalg.vector_norm(seen.by_structure(), dim=-1)
    return (sizes.sum(-1) / seen.places.clamp(min=1)).square().sum(-1), len(seen.rows)
