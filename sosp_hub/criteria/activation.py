"""Size of activations."""

from typing import TYPE_CHECKING, ClassVar, Literal

from sosp_hub.recipe.criteria import CRITERIA, Needs, WatchedCriterion

if TYPE_CHECKING:
    from torch import Tensor

    from sosp_hub.criteria.compute.activations import Seen
    from sosp_hub.criteria.compute.context import Context
    from sosp_hub.types import Saliency


@CRITERIA.declare
class Activation(WatchedCriterion):
    """How large a structure's activation is: mean over places, root mean square over samples.

    ``sqrt(E_n (mean_t ||a_nts||_2)^2)`` with ``a_nts`` what structure ``s`` hands on at token or
    pixel ``t`` of sample ``n``: one number of a channel or neuron, a vector of a head.

    Paper: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation"
    (Minitron), arXiv 2407.14679, with mean over the sequence and L2 over the batch.

    Differs from the paper: root mean square for L2, so that the number of samples does not matter;
    padding does not count; scores are standardised within each group, so that layers compare (our
    choice); places that read the same group are averaged.
    """

    paper: ClassVar[str] = "arXiv 2407.14679"
    needs: ClassVar[Needs] = "inputs"
    formula: ClassVar[str] = "sqrt(mean over samples of (mean over places of ||a_s||_2)^2)"
    words: ClassVar[str] = "a is what the structure hands on at a pixel or token"

    name: Literal["activation"] = "activation"

    def saliency(self, context: "Context") -> "Saliency":
        """One forward pass per batch."""
        from sosp_hub.criteria.compute.activations import mean_of_sites, site_means
        from sosp_hub.criteria.compute.ranking import standardized

        means = site_means(
            context.model, context.groups, context.batches, _squares, context.process_sum
        )
        roots = {name: {i: m.sqrt() for i, m in sites.items()} for name, sites in means.items()}
        scores = mean_of_sites(roots)
        return standardized(scores, "the size of activations") if self.standardize else scores


def _squares(seen: "Seen") -> "tuple[Tensor, int]":
    import torch

    sizes = torch.linalg.vector_norm(seen.by_structure(), dim=-1)
    return (sizes.sum(-1) / seen.places.clamp(min=1)).square().sum(-1), len(seen.rows)
