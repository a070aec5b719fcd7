"""Making the scores of different groups comparable."""

from typing import TYPE_CHECKING

import torch

from sosp_hub.errors import CriterionError

if TYPE_CHECKING:
    from sosp_hub.types import Saliency


def standardized(saliency: "Saliency", quantity: str) -> "Saliency":
    """Mean 0 and standard deviation 1 within each group.

    One structure, or two that are alike, get 0: there is nothing to tell apart.

    Args:
        saliency: One tensor per group.
        quantity: What was measured, for the message.

    Raises:
        CriterionError: More than two structures that are all alike: nothing to rank.
    """
    result = {}
    for name, scores in saliency.items():
        centred = scores - scores.mean()
        spread = centred.square().mean().sqrt()
        alike = bool(spread <= 1e-12 * scores.abs().max())
        if alike and len(scores) > 2:
            raise CriterionError(
                f"group {name!r}: {quantity} has zero variance over its {len(scores)} "
                "structures, so it cannot rank them; look at the weights and the data, write "
                "standardize=False, or score other kinds (`kinds=`)"
            )
        result[name] = torch.zeros_like(scores) if alike else centred / spread
    return result
